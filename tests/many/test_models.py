"""Mixed batches on the architectures of transformers: each row is that of its adapter alone, or the batch is refused.

A batch of two, with an adapter of another rank and method for each row, on every linear layer of the model: outputs,
gradients, populations, and for decoders the generated tokens. `REFUSED` has the models on which a batch is refused, and
where; `docs/models.md` is written from it.
"""

from __future__ import annotations

import re
from typing import Any

import optree
import pytest
import torch
from architectures import KINDS as ALL_KINDS
from architectures import build
from pages import DOCS
from torch import Tensor

import funclora as fl
from funclora.errors import FuncloraError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the models, on tiny sizes

# Its layers compute gradients in a backward of their own, in which given weights have no part: training refuses it.
KINDS = {kind: [name for name in names if name != "ReformerModelWithLMHead"] for kind, names in ALL_KINDS.items()}
MODELS = [name for names in KINDS.values() for name in names]
IDS = [1, 0]
# Models that compare their images with their texts, every row with every other.
CONTRASTIVE = {
    "AltCLIPModel", "BlipModel", "CLIPModel", "CLIPSegModel", "ChineseCLIPModel", "MetaClip2Model", "SiglipModel"
}  # fmt: skip
Reasons = dict[str, str]
CONSTANT = "the input does not come from the batch"
# Models that refuse a mixed batch, and what the error says.
REFUSED: Reasons = {
    "MraForMaskedLM": CONSTANT,
    "ParakeetForCTC": CONSTANT,
    "PegasusXForConditionalGeneration": CONSTANT,
    "RwkvForCausalLM": "would write to a rewritten weight",
    "SEWDForCTC": CONSTANT,
    "SEWDForSequenceClassification": CONSTANT,
    "SeamlessM4TForSpeechToText": CONSTANT,
    "Swinv2ForImageClassification": CONSTANT,
    "TimesformerForVideoClassification": "row 1 holds values of row 0",
    "Wav2Vec2ConformerForCTC": CONSTANT,
    "Wav2Vec2ConformerForSequenceClassification": CONSTANT,
    "ZayaForCausalLM": CONSTANT,
}
# The same for populations, where the error says something else, or the model takes mixed batches.
NO_POPULATION: Reasons = {"TimesformerForVideoClassification": "mixed or reordered the rows"}


def result(model: Any, out: Any) -> Tensor:
    """The part of an output that is compared, `[rows, *]`."""
    if type(model).__name__ in CONTRASTIVE:
        return torch.cat([out.text_embeds, out.image_embeds], -1)
    found = out.logits if isinstance(getattr(out, "logits", None), Tensor) else out[0]
    assert found.is_floating_point()
    return found


def adapters(model: Any, params: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    config = fl.LoraConfig(r=2 + seed, use_dora=bool(seed), target_modules="all-linear")
    made: Any = fl.init(model, config, params=params, generator=generator)
    return optree.tree_map(lambda leaf: leaf + 0.05 * torch.randn(leaf.shape, generator=generator), made)


class Case:
    """A model, its inputs for two rows, two adapters."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = build(name)
        self.model = self.model.float()
        self.params = fl.base_params(self.model)
        self.members = [adapters(self.model, self.params, seed) for seed in range(2)]
        self.stack = fl.stack(self.members)
        # Inputs of several positions for each row, such as the patches of all images; the sizes of images are no rows.
        self.told: dict[str, Any] = {
            key: [row for row in range(2) for _ in range(len(x) // 2)]
            for key, x in self.inputs.items()
            if isinstance(x, Tensor) and len(x) != 2
        }
        if self.told:
            self.told |= {key: None for key in self.inputs if key.endswith("grid_thw")}

    def row(self, i: int) -> dict[str, Any]:
        def own(x: Any) -> Any:
            return x.chunk(2)[i] if isinstance(x, Tensor) else x

        return {key: own(x) for key, x in self.inputs.items()}

    def route(self, stack: Any) -> Any:
        return fl.route(stack, IDS, rows_of=self.told) if self.told else fl.route(stack, IDS)

    def output(self, adapters: Any, inputs: dict[str, Any]) -> Tensor:
        return result(self.model, fl.apply(self.model, self.params, adapters, **inputs))

    def gradients(self, tree: Any, losses: Any) -> Any:
        leaves, spec = optree.tree_flatten(tree)
        found = torch.autograd.grad(losses, leaves, allow_unused=True)
        return optree.tree_unflatten(
            spec, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        )


def trained(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf.detach().requires_grad_(), tree)


def close(found: Tensor, wanted: Tensor, rtol: float) -> None:
    """Equal to a fraction of the largest value."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=rtol * max(wanted.abs().max().item(), 1e-3))


def compare(name: str) -> None:
    case = Case(name)
    both = trained(case.stack)
    together = case.output(case.route(both), case.inputs)
    gradients = case.gradients(both, sum(together[i].square().mean() for i in range(2)))
    effect = 0.0
    for i, member in enumerate(IDS):
        own = trained(case.members[member])
        alone = case.output(own, case.row(i))
        close(together[i], alone[0], 2e-5)
        wanted = case.gradients(own, alone.square().mean())
        largest = max(leaf.abs().max().item() for leaf in optree.tree_leaves(wanted))
        for found, each in zip(optree.tree_leaves(gradients[member]), optree.tree_leaves(wanted), strict=True):
            torch.testing.assert_close(found, each, rtol=0, atol=2e-4 * max(largest, 1e-3))
        with torch.no_grad():
            base = case.output({}, case.row(i))
        effect = max(effect, (alone - base).abs().max().item())
    assert effect > 1e-4


def checked(name: str, check: Any, *tables: Reasons) -> None:
    """Run a check of a model, or see it refused as a table says."""
    reason = next((table[name] for table in tables if name in table), None)
    if reason is None:
        check(name)
        return
    with pytest.raises(FuncloraError, match=re.escape(reason)):
        check(name)


@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_that_of_its_adapter_alone(name: str) -> None:
    checked(name, compare, REFUSED)


def populate(name: str) -> None:
    case = Case(name)
    case.model.train(False)

    def loss_fn(bound: Any, batch: dict[str, Any]) -> Tensor:
        return result(case.model, bound(**batch)).square().mean()

    sgd = fl.optim.sgd(0.1)
    state = fl.optim.per_member(lambda: sgd).init(case.stack)
    rows = [case.row(0), case.row(1)]
    batch = {key: torch.stack([row[key] for row in rows]) if isinstance(x, Tensor) else x for key, x in rows[0].items()}
    sizes = [name for name, rows in case.told.items() if rows is None]
    step = fl.population_step(case.model, loss_fn, sgd, rows_of=dict.fromkeys(sizes))
    after, _, metrics = step(case.params, case.stack, state, batch)
    single = fl.train_step(case.model, loss_fn, sgd)
    for i, member in enumerate(case.members):
        wanted, _, alone = single(case.params, member, sgd.init(member), rows[i])
        close(metrics["loss"][i], alone["loss"], 2e-5)
        moved = max(close_leaf(*leaves) for leaves in leaves_of(member, after[i], wanted))
        assert moved > 0


def leaves_of(*trees: Any) -> Any:
    return zip(*(optree.tree_leaves(tree) for tree in trees), strict=True)


def close_leaf(before: Tensor, found: Tensor, wanted: Tensor) -> float:
    """How far a leaf has moved, after a check that it has moved as wanted."""
    moved = (wanted - before).abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * moved + 1e-5)
    return moved


@pytest.mark.parametrize("name", MODELS)
def test_each_member_of_a_population_is_trained_as_if_alone(name: str) -> None:
    checked(name, populate, NO_POPULATION, REFUSED)


def generate(name: str) -> None:
    case = Case(name)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    bound: Any = fl.bind(case.model, case.params, case.route(case.stack))
    together = bound.generate(**case.inputs, **options)
    for i, member in enumerate(IDS):
        alone: Any = fl.bind(case.model, case.params, case.members[member])
        torch.testing.assert_close(together[i], alone.generate(**case.row(i), **options)[0])


@pytest.mark.parametrize("name", KINDS["decoders"])
def test_each_row_generates_what_its_adapter_alone_does(name: str) -> None:
    checked(name, generate, REFUSED)


# The page of the documentation.

BEGIN, END = "<!-- begin of what the tests say -->", "<!-- end of what the tests say -->"
PAGE = DOCS / "models.md"


def table() -> str:
    """The part of the page that follows from the tables above."""
    lines = []
    for kind, names in KINDS.items():
        works = [name for name in names if name not in REFUSED]
        lines += [
            f"## {kind.capitalize()}: {len(works)} of {len(names)}",
            "",
            ", ".join(f"`{n}`" for n in works) + ".",
            "",
        ]
    only_populations = {name: reason for name, reason in NO_POPULATION.items() if name not in REFUSED}
    for title, reasons in (("Refused", REFUSED), ("Only populations are refused", only_populations)):
        rows = [f"| `{name}` | {reasons[name]} |" for name in MODELS if name in reasons]
        if not rows:
            continue
        lines += [f"## {title}", "", "| model | the error says |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def test_the_page_says_what_the_tests_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == table().strip(), f"write it anew: python {__file__}"


def test_the_tables_name_models() -> None:
    assert {*REFUSED, *NO_POPULATION} <= {*MODELS}
    assert all(REFUSED.get(name) != reason for name, reason in NO_POPULATION.items())


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n{END}{after}", encoding="utf-8")
