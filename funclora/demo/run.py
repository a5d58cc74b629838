"""The demo's work: adapters of one frozen model for many domains, compared, saved, merged and used."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import funclora as fl
from funclora._files.atomic import replace_files
from funclora.demo import corpus
from funclora.demo.model import ByteLM, load_base, next_byte_loss
from funclora.optim import per_member
from funclora.rules.base import Params

METHODS = ("LoRA", "DoRA")
OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """How long and how large.

    Attributes:
        domains: how many of the corpus's domains take part.
        steps: training steps of each adapter.
        batch: rows of each step.
        context: bytes of each row.
        r: rank of the adapters.
        lr: peak learning rate.
        windows: held-out rows for each domain.
        seed: decides the adapters' initial values and the batches.
    """

    domains: int = 8
    steps: int = 36
    batch: int = 4
    context: int = 256
    r: int = 8
    lr: float = 1e-2
    windows: int = 12
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """The domains that take part."""
        return list(corpus.DOMAINS)[: self.domains]

    @property
    def ticks(self) -> int:
        """How often `run` reports progress: each training step, each domain's evaluation, the last three things."""
        return self.steps + len(self.names) + 3


@dataclass(frozen=True)
class Trained:
    """One adapter: where it comes from, what it is."""

    domain: str
    method: str
    adapters: dict[str, fl.Rule]
    config: fl.LoraConfig
    trainable: int

    @property
    def name(self) -> str:
        """A name that files can have."""
        return f"{self.domain}-{self.method.lower()}"


@dataclass(frozen=True)
class Results:
    """What the demo found.

    Attributes:
        settings: what it was run with.
        trained: the adapters.
        seconds: how long the training of all of them took.
        base: held-out loss of the base model by domain, nats per byte.
        losses: held-out loss, `losses[adapter name][domain]`.
        merge_error: largest difference between the logits of the merged and the adapted model.
        merged: name of the adapter that was merged.
        prompt: what two adapters continued.
        continuations: adapter name -> text.
    """

    settings: DemoSettings
    trained: list[Trained]
    seconds: float
    base: dict[str, float]
    losses: dict[str, dict[str, float]]
    merge_error: float
    merged: str
    prompt: str
    continuations: dict[str, str]


def run(out: Path, settings: DemoSettings, progress: OnProgress) -> Results:
    """Train, evaluate, save, merge and generate.

    Args:
        out: the folder for everything that is written; made if it is not there.
        settings: how long and how large.
        progress: called with a description at every step, `settings.ticks` times in all.

    Returns:
        What came out. The folder holds it too: one PEFT folder for each adapter under `adapters/`,
        `merged.safetensors` and `results.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = load_base()
    params = fl.base_params(model)
    texts = {domain: corpus.split(domain) for domain in settings.names}
    heldout = {
        domain: corpus.windows(test, count=settings.windows, context=settings.context)
        for domain, (_, test) in texts.items()
    }
    started = time.perf_counter()
    train = {domain: text for domain, (text, _) in texts.items()}
    trained = _train(model, params, train, settings, progress)
    seconds = time.perf_counter() - started
    base, losses = _evaluate(model, params, trained, heldout, progress)

    progress("saving")
    _save(out, trained)
    progress("merging")
    merge_error = _merge(model, params, trained[0], heldout[trained[0].domain], out)
    progress("continuing a prompt")
    prompt = "class "
    continuations = {t.name: _continue(model, params, t, prompt, settings.seed) for t in (trained[0], trained[-1])}
    results = Results(settings, trained, seconds, base, losses, merge_error, trained[0].name, prompt, continuations)
    _write(out / "results.json", (json.dumps(as_json(results), indent=2) + "\n").encode())
    return results


def train_only(out: Path, settings: DemoSettings, progress: OnProgress) -> Path:
    """Train and save the adapters, without all that is shown of them.

    Args:
        out: as for `run`.
        settings: how long and how large.
        progress: called with a description at every step.

    Returns:
        The folder of the PEFT folders.
    """
    model = load_base()
    texts = {domain: corpus.split(domain)[0] for domain in settings.names}
    return _save(out, _train(model, fl.base_params(model), texts, settings, progress))


def _save(out: Path, trained: list[Trained]) -> Path:
    for t in trained:
        fl.save_peft(out / "adapters" / t.name, t.adapters, t.config)
    return out / "adapters"


def _train(
    model: ByteLM, params: Params, texts: dict[str, bytes], settings: DemoSettings, progress: OnProgress
) -> list[Trained]:
    """Adapters of each method for every text, as one population: each sees its own text and nothing of the others."""
    kinds = [(domain, method) for domain in texts for method in METHODS]
    configs = {
        method: fl.LoraConfig(
            r=settings.r, lora_alpha=2 * settings.r, target_modules="all-linear", use_dora=method == "DoRA"
        )
        for method in METHODS
    }
    members, streams = [], []
    for domain, method in kinds:
        generator = torch.Generator().manual_seed(settings.seed)
        members.append(fl.init(model, configs[method], generator=generator))
        streams.append(
            corpus.batches(texts[domain], batch=settings.batch, context=settings.context, generator=generator)
        )
    schedule = fl.optim.warmup_cosine(settings.lr, max(1, settings.steps // 10), settings.steps + 1)
    optimizer = per_member(
        lambda: fl.optim.chain(fl.optim.clip_by_global_norm(1.0), fl.optim.adamw(schedule, weight_decay=0.0))
    )
    # Activations of all members at once need more than a gigabyte: halves of the batch are as fast.
    step = fl.population_step(model, next_byte_loss, optimizer, accumulate=math.gcd(settings.batch, 2))
    population = fl.stack(members)
    state = optimizer.init(population)
    for _ in range(settings.steps):
        batch = torch.stack([next(batches) for batches in streams])
        population, state, metrics = step(params, population, state, batch)
        progress(f"{len(members)} adapters at once, mean loss {metrics['loss'].mean().item():.3f}")
    return [
        Trained(domain, method, adapters, configs[method], fl.summary(params, adapters).trainable)
        for (domain, method), adapters in zip(kinds, population, strict=True)
    ]


def _evaluate(
    model: ByteLM, params: Params, trained: list[Trained], heldout: dict[str, Tensor], progress: OnProgress
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Held-out losses of the base model by domain, and of each adapter: `losses[name][domain]`."""
    members = fl.stack([{}, *(t.adapters for t in trained)])
    columns = {}
    for domain, windows in heldout.items():
        progress(f"evaluating all adapters on {domain}")
        columns[domain] = fl.evaluate(model, params, members, [windows], next_byte_loss).tolist()
    base, *rows = ({domain: column[i] for domain, column in columns.items()} for i in range(len(members)))
    return base, {t.name: row for t, row in zip(trained, rows, strict=True)}


@torch.no_grad()
def _merge(model: ByteLM, params: Params, trained: Trained, windows: Tensor, out: Path) -> float:
    """Merge an adapter, save the weights, load them into an unmodified model and compare the logits."""
    from safetensors.torch import save

    merged = fl.merge(params, trained.adapters)
    _write(out / "merged.safetensors", save({name: tensor.contiguous() for name, tensor in merged.items()}))
    plain = load_base()
    plain.load_state_dict(merged)
    ids = windows[:, :-1]
    error: Tensor = plain(ids) - fl.apply(model, params, trained.adapters, ids)
    return error.abs().max().item()


def _write(file: Path, data: bytes) -> None:
    def write(draft: Path) -> None:
        draft.write_bytes(data)

    replace_files(file.parent, {file.name: write})


def _continue(model: ByteLM, params: Params, trained: Trained, prompt: str, seed: int) -> str:
    bound = fl.bind(model, params, trained.adapters)
    text = bound.generate(prompt.encode(), n=160, temperature=0.5, generator=torch.Generator().manual_seed(seed))
    return text.decode("utf-8", "replace")


def as_json(results: Results) -> dict[str, object]:
    """What `results.json` holds."""
    return {
        "settings": asdict(results.settings),
        "base": results.base,
        "losses": results.losses,
        "trainable": {t.name: t.trainable for t in results.trained},
        "seconds": round(results.seconds, 2),
        "merged": {"adapter": results.merged, "largest difference of logits": results.merge_error},
        "prompt": results.prompt,
        "continuations": results.continuations,
    }
