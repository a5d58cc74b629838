"""The parts of a method: rules, layouts, operations, and the decorator that makes a class a tree node.

A rule says what an adapter does to one weight. The rules that come with the library are here under the same names as in
`funclora`; the other names are for rules of your own, as `docs/adding-a-method.md` shows.
"""

from funclora._torch.pytree import FROZEN, map_tensors, pytree_node
from funclora.rules.base import Rule
from funclora.rules.dense import Delta, Full
from funclora.rules.dora import DoRA
from funclora.rules.layouts import (
    Attention,
    Conv,
    Conv1D,
    ConvTranspose,
    Embedding,
    Layout,
    Linear,
    Matrices,
    Parameter,
    Recurrent,
)
from funclora.rules.linear_ops import LinearOp
from funclora.rules.low_rank import LoRA, LowRank, compute_dtype, updated
from funclora.rules.tokens import Tied, TrainableTokens

__all__ = [
    "FROZEN",
    "Attention",
    "Conv",
    "Conv1D",
    "ConvTranspose",
    "Delta",
    "DoRA",
    "Embedding",
    "Full",
    "Layout",
    "Linear",
    "LinearOp",
    "LoRA",
    "LowRank",
    "Matrices",
    "Parameter",
    "Recurrent",
    "Rule",
    "Tied",
    "TrainableTokens",
    "compute_dtype",
    "map_tensors",
    "pytree_node",
    "updated",
]
