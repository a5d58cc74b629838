"""Arithmetic of adapters: pure functions from adapters to an adapter.

What an adapter does to a weight is its change: s·B·A for `LoRA`, value − W for `Full`. The functions here add, scale
and sparsify changes, and each says whether its result is exact. No function changes its arguments.
"""

from funclora.algebra._combine import COMBINATION_TYPES, combine
from funclora.algebra._low_rank import recompress
from funclora.algebra._methods import dare, magnitude_prune, ties
from funclora.algebra._sums import add, interpolate, negate, scale, task_arithmetic

__all__ = [
    "COMBINATION_TYPES",
    "add",
    "combine",
    "dare",
    "interpolate",
    "magnitude_prune",
    "negate",
    "recompress",
    "scale",
    "task_arithmetic",
    "ties",
]
