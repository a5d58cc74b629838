"""Optimizers and schedules as pure functions over any pytree of tensors.

An optimizer is a pair `init(params) -> state` and `update(grads, state, params=None) -> (updates, state)`, as
in TorchOpt and optax. `update` does not change its arguments; the caller adds its updates to the parameters.
It may also have `step(params, grads, state) -> (params, state)`, which does both.
All functions run under `torch.func.grad`, `torch.func.vmap` and `torch.compile(fullgraph=True)`, except `adamw_8bit`.

One optimizer can train a stack of adapters, with leaves `[n_adapters, ...]`: `lr`, `weight_decay`, `ratio`
and `max_norm` then also take one value per adapter, a tensor `[n_adapters]` on their device (in `adafactor` and
`adamw_8bit` they do not). Inside `vmap` there is one adapter, and its values are `[]`. The state counts the steps taken
in an int64 tensor: `[]`, or `[n_adapters]` if the states of single adapters were stacked.
"""

from funclora.optim._adafactor import adafactor
from funclora.optim._adamw_8bit import adamw_8bit
from funclora.optim._members import MemberTransformation, Optimizer, per_member
from funclora.optim._optimizers import adamw, lora_plus, sgd
from funclora.optim._schedules import (
    constant,
    warmup_cosine,
    warmup_cosine_restarts,
    warmup_linear,
    warmup_polynomial,
    warmup_stable_decay,
)
from funclora.optim._transforms import (
    GradientTransformation,
    SteppingTransformation,
    apply_updates,
    chain,
    clip_by_global_norm,
    global_norm,
)
from funclora.optim._trees import PyTree
from funclora.optim._values import PerMember, Schedule

__all__ = [
    "GradientTransformation",
    "MemberTransformation",
    "Optimizer",
    "PerMember",
    "PyTree",
    "Schedule",
    "SteppingTransformation",
    "adafactor",
    "adamw",
    "adamw_8bit",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "constant",
    "global_norm",
    "lora_plus",
    "per_member",
    "sgd",
    "warmup_cosine",
    "warmup_cosine_restarts",
    "warmup_linear",
    "warmup_polynomial",
    "warmup_stable_decay",
]
