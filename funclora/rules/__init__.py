"""What a method is made of: rules, layouts, operations, and what makes a class a tree node.

A rule says what an adapter does to one weight. The rules that come with the library are here under the same names as in
`funclora`; the other names are for rules of your own, as `docs/adding-a-method.md` shows.
"""

from funclora._torch.pytree import FROZEN as FROZEN
from funclora._torch.pytree import map_tensors as map_tensors
from funclora._torch.pytree import pytree_node as pytree_node
from funclora.rules.base import Rule as Rule
from funclora.rules.dense import Delta as Delta
from funclora.rules.dense import Full as Full
from funclora.rules.dora import DoRA as DoRA
from funclora.rules.layouts import Attention as Attention
from funclora.rules.layouts import Conv as Conv
from funclora.rules.layouts import Conv1D as Conv1D
from funclora.rules.layouts import ConvTranspose as ConvTranspose
from funclora.rules.layouts import Embedding as Embedding
from funclora.rules.layouts import Layout as Layout
from funclora.rules.layouts import Linear as Linear
from funclora.rules.layouts import Matrices as Matrices
from funclora.rules.layouts import Parameter as Parameter
from funclora.rules.layouts import Recurrent as Recurrent
from funclora.rules.linear_ops import LinearOp as LinearOp
from funclora.rules.low_rank import LoRA as LoRA
from funclora.rules.low_rank import LowRank as LowRank
from funclora.rules.tokens import Tied as Tied
from funclora.rules.tokens import TrainableTokens as TrainableTokens

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
    "map_tensors",
    "pytree_node",
]
