"""The embeddings of a model: the input embeddings, the modules tied to them, and the rows that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from funclora._bind.params import named_tensors
from funclora._config.config import LoraConfig
from funclora._config.outlined import asked
from funclora._config.target import Target
from funclora.errors import TargetError, near
from funclora.rules.dense import Full
from funclora.rules.dora import DoRA
from funclora.rules.tokens import Tied, TrainableTokens


def input_embeddings(model: nn.Module) -> str:
    """The full name of the module that turns ids into vectors; "" if the model does not tell it."""
    return asked(model, "input embeddings", partial(_told, "get_input_embeddings"))  # type: ignore[no-any-return]


def output_embeddings(model: nn.Module) -> str:
    """The full name of the module that turns vectors into logits; "" if the model does not tell it."""
    return asked(model, "output embeddings", partial(_told, "get_output_embeddings"))  # type: ignore[no-any-return]


def _told(method: str, model: nn.Module) -> str:
    ask: Any = getattr(model, method, None)
    try:
        module = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):  # transformers, for models without
        module = None
    # Each module once, as in PEFT.
    return next((name for name, other in model.named_modules() if other is module), "")


def setting_of(model: nn.Module, name: str) -> Any:
    """A number or text of the configuration of a transformers model; None for others."""
    return asked(model, ["setting", name], lambda model: getattr(getattr(model, "config", None), name, None))


@dataclass(frozen=True)
class TiedEmbeddings:
    """The input embeddings of a model, and the modules that share their weight.

    Attributes:
        input: the full name of the module that turns ids into vectors; "" if the model does not tell it.
        tied: the full names of the modules that transformers ties to it.
    """

    input: str
    tied: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> TiedEmbeddings:
        """The tied embeddings of a model.

        Weights that are shared without `config.tie_word_embeddings` do not count as tied, as in PEFT.
        """
        name = input_embeddings(model)
        if not name or not setting_of(model, "tie_word_embeddings"):
            return cls(name, ())
        modules = dict(model.named_modules())  # each module once, as in PEFT
        tensors = {name: tensor for name, tensor, _, _ in named_tensors(model)}
        table = tensors.get(f"{name}.weight")
        tied = [n for n in modules if n != name and table is not None and tensors.get(f"{n}.weight") is table]
        return cls(name, tuple(tied))

    def named(self, modules: Iterable[str]) -> bool:
        """Whether one of these modules has the weight."""
        return any(name in (self.input, *self.tied) for name in modules if name)


def tied_targets(
    config: LoraConfig, tables: TiedEmbeddings, found: Mapping[str, Target], parameters: Mapping[str, Sequence[str]]
) -> dict[str, Target]:
    """The parameters that follow the rule of the input embeddings because of `ensure_weight_tying`.

    Args:
        config: the configuration.
        tables: the embeddings of the model.
        found: the targets, including the input embeddings.
        parameters: the parameters of each tied module.

    Raises:
        TargetError: the tied modules cannot share one rule.
    """
    to = f"{tables.input}.weight"
    if found[to].rule is DoRA:
        raise TargetError(
            "ensure_weight_tying and use_dora: the magnitudes of an embedding and of an output layer belong to "
            "different dimensions and cannot be tied. Set one of them to False, or name the embedding in "
            "modules_to_save."
        )
    for module in tables.tied:
        same = config.rank_of(module) == found[to].r and config.alpha_of(module) == config.alpha_of(tables.input)
        if found[to].layout is not None and not same:
            raise TargetError(
                f"ensure_weight_tying: rank_pattern or alpha_pattern gives {module!r} another rank or α than "
                f"{tables.input!r}, to which it is tied. Give both the same."
            )
        others = [name for name in parameters[module] if name != f"{module}.weight"]
        if others and found[to].rule is Full:
            raise TargetError(
                f"ensure_weight_tying: {others[0]!r} is in {module!r}, which modules_to_save would tie to "
                f"{tables.input!r}, and PEFT would drop it. Leave ensure_weight_tying at False."
            )
    return {f"{module}.weight": Target(module, None, rule=Tied, tied_to=to) for module in tables.tied}


def token_targets(
    config: LoraConfig, tables: TiedEmbeddings, modules: Mapping[str, nn.Module], found: Mapping[str, Target]
) -> dict[str, Target]:
    """The rows of `trainable_token_indices`, and the tied modules that follow them.

    Args:
        config: the configuration.
        tables: the embeddings of the model.
        modules: the modules of the model, by full name.
        found: the other targets.

    Raises:
        TargetError: an entry matches no embedding, a token is not in it, or the embedding has another rule.
    """
    rows = _rows(config, tables, modules)
    tied = dict.fromkeys(tables.tied, tables.input) if tables.input in rows else {}
    if any(rows.get(module, rows[tables.input]) != rows[tables.input] for module in tied):
        if config.ensure_weight_tying:
            raise TargetError(
                "ensure_weight_tying: trainable_token_indices names different tokens for tied modules: "
                f"{', '.join(f'{name!r}: {list(ids)}' for name, ids in rows.items())}. Name the same tokens."
            )
        tied = {}  # as in PEFT, each is then trained separately
    targets = {f"{m}.weight": Target(m, None, rule=TrainableTokens, tokens=ids) for m, ids in rows.items()}
    targets |= {f"{m}.weight": Target(m, None, rule=Tied, tied_to=f"{to}.weight") for m, to in tied.items()}
    for name in targets:
        if name in found:
            where = "modules_to_save" if found[name].rule is Full else "target_modules"
            raise TargetError(
                f"trainable_token_indices: {name!r} is also adapted by {where}. An embedding can have either trained "
                "rows or a rule for the whole of it: name it in one of the two."
            )
    return targets


def _rows(config: LoraConfig, tables: TiedEmbeddings, modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The tokens of `trainable_token_indices` by the full names of the modules that hold them."""
    found: dict[str, tuple[int, ...]] = {}
    for key, ids in config.tokens.items():
        entry = key or tables.input or "embed_tokens"
        names = [name for name in modules if name.endswith(entry)]  # PEFT's comparison, which ignores dots
        if not names:
            hint = "" if key else " A list is for the input embeddings; give a dict from the name of the module."
            raise TargetError(f"trainable_token_indices: {entry!r} matches no module.{hint}{near(entry, modules)}")
        for name in names:
            if name != entry and not name.endswith(f".{entry}"):
                raise TargetError(
                    f"trainable_token_indices: {entry!r} names {names[0]!r}, but PEFT would also match {name!r}, whose "
                    "name has the same end. Give the full name of the module."
                )
            if name in found:
                raise TargetError(f"trainable_token_indices: {name!r} is named twice.")
            found[name] = _in_table(name, modules[name], ids)
    return found


def _in_table(name: str, module: nn.Module, ids: tuple[int, ...]) -> tuple[int, ...]:
    where = f"trainable_token_indices: {name!r}"
    if isinstance(module, nn.Embedding):
        n = module.num_embeddings
    elif isinstance(module, nn.Linear):
        if module._parameters.get("bias") is not None:
            raise TargetError(f"{where} has a bias, which PEFT would leave out. Name the input embeddings only.")
        n = module.out_features
    else:
        raise TargetError(
            f"{where} is a {type(module).__name__}; expected an nn.Embedding, or an nn.Linear over tokens."
        )
    if max(ids) >= n:
        raise TargetError(f"{where} has {n} rows; token {max(ids)} does not exist.")
    return ids
