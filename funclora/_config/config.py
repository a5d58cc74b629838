"""`LoraConfig`: which parameters an adapter rewrites, and how. Names, meanings and defaults are PEFT's."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, cast

from funclora._config.fields import checked_indices, checked_names, checked_pattern, checked_tokens
from funclora._config.names import named_among
from funclora._config.peft_fields import DECOMPOSITIONS, INITIALISERS, niter_of, own_fields_of, to_peft
from funclora._config.regex import ENDS, Endings, matches, refuse_slow
from funclora.errors import ConfigError, near

# And PEFT's way of finding the index that follows an entry of layers_pattern.
LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
# The fields that name modules or parameters.
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
_LARGEST = 2**31 - 1
# The smallest and the largest scaling that float32 represents in full precision.
_SMALLEST_SCALING, _LARGEST_SCALING = 2.0**-126, (2 - 2.0**-23) * 2.0**127

BIASES = ("none", "all", "lora_only")
TASK_TYPES = (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt and how. Values are checked when the object is created and never change.

    Lists are stored as tuples, a single `layers_to_transform` as a tuple with one element.

    Module names match as in PEFT: an entry of a list matches the module with this full name and every module whose
    name ends with `.entry`; a string is a regular expression that must match the full name.

    Attributes:
        r: rank of every update that no key of `rank_pattern` matches.
        lora_alpha: α. The update is scaled by α/r.
        lora_dropout: probability of dropping inputs of the low-rank path, in training mode.
        target_modules: list of module names or suffixes, a regular expression, or "all-linear".
        exclude_modules: list of names or suffixes, or a regular expression; overrides target_modules.
        use_rslora: scale by α/√r instead (arXiv 2312.03732).
        use_dora: weight-decomposed updates (arXiv 2402.09353).
        bias: train the biases of no module ("none"), of every module ("all"), or of the targets ("lora_only").
        modules_to_save: modules that are fully fine-tuned.
        layers_to_transform: index or indices of layers; targets named by suffix are restricted to these layers.
        layers_pattern: name of the module list with the layers, if it is not the first one.
        rank_pattern: regular expression of a module name -> rank; the first match is used.
        alpha_pattern: regular expression of a module name -> α; the first match is used.
        init_lora_weights: for `init`: True (Kaiming-uniform A, zero B), "gaussian", "orthogonal", or False (random B
            too); for `decompose`: "pissa", "pissa_niter_[k]" with a number for [k], "olora" or "loftq"; for
            `init_eva`: "eva".
        target_parameters: list of names or suffixes of parameters (`experts.gate_up_proj`), for weights that do not
            belong to a supported module. A weight with three or more dimensions gets one update per leading index.
        task_type: PEFT's task type, written to its files. With "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" the head
            (`classifier` or `score`, `qa_outputs`) is fully fine-tuned, as if it were in `modules_to_save`.
        base_model_name_or_path: written to PEFT's files.
        trainable_token_indices: rows of embeddings that are fully fine-tuned: ids for the input embeddings, or a dict
            from the name of a module to its ids. An output layer that transformers ties to the embedding uses the
            same rows.
        lora_bias: give B a bias, which is scaled like B. It is added to the bias of the target, which must have one.
        ensure_weight_tying: weights that transformers ties share one adapter.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other.

    Examples:
        >>> LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).scaling(r=4, lora_alpha=8)
        2.0
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: Collection[str] | None = None
    exclude_modules: Collection[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Collection[str] | None = None
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    target_parameters: Collection[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    lora_bias: bool = False
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            put(name, checked_pattern(name, value) if isinstance(value, str) else checked_names(name, value))
        for name in ("modules_to_save", "target_parameters"):
            put(name, checked_names(name, getattr(self, name)))
        layers_pattern: Any = self.layers_pattern or ()
        listed = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
        put("layers_pattern", checked_names("layers_pattern", listed) or None)
        for pattern in self.layers_pattern or ():
            refuse_slow(LAYER.format(checked_pattern("layers_pattern", pattern, LAYER)))
        if isinstance(self.task_type, str):
            put("task_type", str(getattr(self.task_type, "value", self.task_type)))  # an enumeration in PEFT
        put("layers_to_transform", checked_indices(self.layers_to_transform))
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name) or {}
            if not isinstance(patterns, Mapping):
                raise ConfigError(f"{name}: expected a dict from pattern to number, got {patterns!r}.")
            put(name, {checked_pattern(name, k, ENDS): v for k, v in patterns.items()})
        put("trainable_token_indices", checked_tokens(self.trainable_token_indices))
        self._check_values()
        self._check_together()

    def _check_values(self) -> None:
        for where, rank in [
            ("r", self.r),
            *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()),
        ]:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"{where}: expected a positive integer, got {rank!r}.")
            if rank > _LARGEST:
                raise ConfigError(f"{where}: expected a rank up to {_LARGEST}, got one with {rank.bit_length()} bits.")
        alphas = [("lora_alpha", self.lora_alpha)]
        alphas += [(f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()]
        for where, alpha in alphas:
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
                raise ConfigError(f"{where}: expected a finite number, got {alpha!r}.")
            if alpha == 0:
                raise ConfigError(f"{where}: 0 would make the adapter have no effect; give a number other than 0.")
            ranks = (self.r, *self.rank_pattern.values())
            for scaling in (self.scaling(min(ranks), alpha), self.scaling(max(ranks), alpha)):
                if not _SMALLEST_SCALING <= abs(scaling) <= _LARGEST_SCALING:
                    raise ConfigError(
                        f"{where}: {alpha!r} scales the update by {scaling:g}, which float32 cannot represent. Choose "
                        f"alpha so that the scaling is between {_SMALLEST_SCALING:.1e} and {_LARGEST_SCALING:.1e}."
                    )
        if isinstance(self.lora_dropout, bool) or not isinstance(self.lora_dropout, (int, float)):
            raise ConfigError(f"lora_dropout: expected a number, got {self.lora_dropout!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: expected a number in [0, 1), got {self.lora_dropout!r}.")
        for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}.")
        initialisers = INITIALISERS if self.niter is None else (self.init_lora_weights,)
        allowed = (("bias", BIASES), ("init_lora_weights", initialisers), ("task_type", TASK_TYPES))
        for name, choices in allowed:
            value = getattr(self, name)
            if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
                hint = near(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
                if isinstance(value, str) and value.startswith("pissa"):
                    hint = " The fast variant is 'pissa_niter_[k]' with a number for [k]."
                raise ConfigError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.{hint}")

    def _check_together(self) -> None:
        if not self.target_modules and not self.target_parameters:
            raise ConfigError(
                "name what to adapt: target_modules (a list of names, a regular expression or 'all-linear') or "
                "target_parameters; both are empty."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                "layers_to_transform needs a list as target_modules, got the string "
                f"{self.target_modules!r}. Write the layers into the expression, or give a list."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform, which is None.")
        ranks = (self.r, *self.rank_pattern.values())
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in ranks):
            raise ConfigError(f"init_lora_weights='orthogonal' needs even ranks, got {', '.join(map(str, ranks))}.")
        if self.lora_bias:
            self._check_lora_bias()

    def _check_lora_bias(self) -> None:
        if self.use_dora:
            raise ConfigError("lora_bias and use_dora: DoRA has no bias of B. Set one of them to False.")
        if self.target_parameters:
            raise ConfigError("lora_bias and target_parameters: a single parameter has no bias. Remove one of the two.")
        if self.bias != "none":
            raise ConfigError(
                f"lora_bias and bias={self.bias!r} would train the biases of the targets twice. Set bias='none', or "
                "lora_bias=False."
            )
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"lora_bias needs init_lora_weights=True or False, got {self.init_lora_weights!r}. For a trained "
                "adapter init_lora_weights has no effect: set it to True."
            )

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The indices of `layers_to_transform`."""
        return cast("tuple[int, ...] | None", self.layers_to_transform)

    @property
    def all_linear(self) -> bool:
        """True if the targets are "all-linear"."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @property
    def niter(self) -> int | None:
        """The number of iterations in "pissa_niter_[k]"; None for every other value."""
        return niter_of(self.init_lora_weights)

    @property
    def decomposition(self) -> str | None:
        """The entry of `DECOMPOSITIONS` by which base weights are split; None if they are not changed."""
        kind = "pissa" if self.niter is not None else self.init_lora_weights
        return kind if isinstance(kind, str) and kind in DECOMPOSITIONS else None

    def rank_of(self, name: str) -> int:
        """The rank for the module (or `target_parameters` entry) with this full name."""
        return next((self.rank_pattern[key] for key in self.patterns_of("rank_pattern", name)), self.r)

    def alpha_of(self, name: str) -> float:
        """α for the module (or `target_parameters` entry) with this full name."""
        return next((self.alpha_pattern[key] for key in self.patterns_of("alpha_pattern", name)), self.lora_alpha)

    def patterns_of(self, field: Literal["rank_pattern", "alpha_pattern"], name: str) -> list[str]:
        """The keys of a field that match the name of a module (as in PEFT), in their order."""
        return self._patterns[field].matching(name)

    @cached_property
    def _patterns(self) -> Mapping[str, Endings]:
        return {name: Endings(getattr(self, name)) for name in ("rank_pattern", "alpha_pattern")}

    def names(self, field: str, name: str) -> bool:
        """Whether the list or regular expression in a field matches a module or parameter."""
        wanted = getattr(self, field)
        return matches(wanted, name) if isinstance(wanted, str) else named_among(name, self._entries[field])

    def names_fully(self, field: str, name: str) -> bool:
        """Whether a field names a module or parameter by its full name."""
        return name in self._entries[field]

    @cached_property
    def _entries(self) -> Mapping[str, frozenset[str]]:
        def entries(value: Any) -> frozenset[str]:
            return frozenset((value,) if isinstance(value, str) else value or ())

        return {name: entries(getattr(self, name)) for name in _LISTS}

    def scaling(self, r: int, lora_alpha: float) -> float:
        """s = α/r, or α/√r with `use_rslora`."""
        return lora_alpha / math.sqrt(r) if self.use_rslora else lora_alpha / r

    @property
    def tokens(self) -> Mapping[str | None, tuple[int, ...]]:
        """The ids of `trainable_token_indices` by the name of the module; the key None means the input embeddings."""
        tokens: Any = self.trainable_token_indices
        if tokens is None or isinstance(tokens, Mapping):
            return tokens or {}
        return {None: tokens}

    def replace(self, **changes: Any) -> LoraConfig:
        """A copy with some fields changed. All values are checked again."""
        return LoraConfig(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    @classmethod
    def from_peft(cls, config: Any) -> LoraConfig:
        """Convert a `peft.LoraConfig`.

        Args:
            config: a `peft.LoraConfig`, or a dict as in `adapter_config.json`.

        Returns:
            The configuration, without the fields that have no effect on the result (`inference_mode`,
            `fan_in_fan_out`, ...).

        Raises:
            ConfigError: a field has an invalid value, or a value that is not supported.

        Examples:
            >>> LoraConfig.from_peft({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}).r
            4
        """
        return cls(**own_fields_of(config, [f.name for f in fields(cls)]))

    def to_peft(self) -> Any:
        """The equivalent `peft.LoraConfig`.

        Raises:
            ConfigError: PEFT is not installed.

        Examples:
            >>> LoraConfig(r=4, target_modules=["q_proj"]).to_peft().r
            4
        """
        return to_peft({f.name: getattr(self, f.name) for f in fields(self)})
