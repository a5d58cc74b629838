"""The table of layers that every law runs over, and adapters for them.

A `Case` is a model, its inputs and the layouts of the parameters to adapt. `make_adapters` makes rules for them
that change the output clearly: B is not zero, DoRA's magnitudes are not the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from oracle import factor_shapes, to_outputs, weight_norm
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from funclora import DoRA, Full, LoRA, base_params
from funclora.rules.base import Rule
from funclora.rules.layouts import (
    Attention,
    Conv,
    Conv1D,
    ConvTranspose,
    Embedding,
    Layout,
    Linear,
    Parameter,
    Recurrent,
)

# LoRA, DoRA with either gradient, Full, and all of them in one adapter.
KINDS = ("lora", "dora", "dora-exact", "full", "mixed")
SCALING = 1.3


class Setup(NamedTuple):
    """One row of the table, built: everything that `apply` takes but the adapters."""

    model: nn.Module
    params: dict[str, Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: the test's id.
        model: makes the model.
        inputs: makes the positional arguments of `forward`.
        targets: full name of a parameter to adapt -> where its matrix lies.
        kwargs: makes the keyword arguments of `forward`.
        fast: all operations on the targets have a fast form.
        no_vmap: why torch itself cannot run this layer under vmap with batched weights; empty if it can.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    targets: Mapping[str, Layout]
    kwargs: Callable[[], dict[str, Any]] = field(default=dict)
    fast: bool = True
    no_vmap: str = ""

    def setup(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Setup:
        """The model in evaluation mode, its parameters and inputs, all of that dtype; alike for a seed."""

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model().eval().to(dtype)
            args, kwargs = pytree.tree_map(cast, (self.inputs(), self.kwargs()))
        return Setup(model, base_params(model), args, kwargs)

    def __str__(self) -> str:
        return self.name


def gen(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def make_adapters(
    case: Case, params: Mapping[str, Tensor], kind: str, generator: Generator, dtype: torch.dtype | None = None
) -> dict[str, Rule]:
    """An adapter for every target of the case, and with "full" and "mixed" for every vector of the model too.

    The update is about as large as the weight. Leaves have the dtype of their weight unless `dtype` says otherwise.
    """
    kinds = {"mixed": ("lora", "dora")}.get(kind, (kind,))
    adapters: dict[str, Rule] = {}
    for i, (name, layout) in enumerate(case.targets.items()):
        adapters[name] = make_rule(kinds[i % len(kinds)], layout, params[name], generator, dtype)
    if kind in ("full", "mixed"):
        for name, value in params.items():
            if value.dim() == 1 and value.is_floating_point() and not name.startswith("running"):
                adapters[name] = make_rule("full", Linear(), value, generator, dtype)
    return adapters


def make_rule(
    kind: str, layout: Layout, weight: Tensor, generator: Generator, dtype: torch.dtype | None = None, r: int = 2
) -> Any:
    """One rule of that kind for a weight, drawn from the generator."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dtype = dtype or weight.dtype
    size = weight.double().square().mean().sqrt()
    if kind == "full":
        return Full((draw(weight.shape) * size + weight.double().mean()).to(dtype))
    a_shape, b_shape = factor_shapes(layout, tuple(weight.shape), r)
    a, b = (draw(a_shape) * size).to(dtype), (draw(b_shape) / r**0.5).to(dtype)
    if kind == "lora":
        return LoRA(a, b, scaling=SCALING, layout=layout)
    norms = to_outputs(layout, weight_norm(layout, weight.double()))
    magnitude = norms * (0.5 + torch.rand(norms.shape, generator=generator, dtype=torch.float64))
    return DoRA(a, b, magnitude.to(dtype), scaling=SCALING, layout=layout, exact_norm_grad=kind == "dora-exact")


def stack_adapters(adapters: list[dict[str, Rule]]) -> Any:
    """Adapters of the same structure as one, with a leading dimension on every leaf."""
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *adapters)


def dense_call(s: Setup, weights: Mapping[str, Tensor]) -> Any:
    """The model under plain weights; copies, because modules write to buffers and to tables with max_norm."""
    weights = {name: value.clone() for name, value in weights.items()}
    return functional_call(s.model, weights, s.args, s.kwargs, tie_weights=False)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keeps attention from its fused kernels, which round differently and have no batching rules."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- the models of the table -----------------------------------------------------------------------------------


class RawMatmul(nn.Module):
    """A parameter that is no layer's: `x @ w`, or `x @ w.T`."""

    def __init__(self, *, transpose: bool) -> None:
        super().__init__()
        self.transpose = transpose
        self.w = nn.Parameter(torch.randn((3, 5) if transpose else (5, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T if self.transpose else x @ self.w


class Experts(nn.Module):
    """Expert weights `[E, in, out]` or `[E, out, in]`, used all at once (bmm) or one by one (indexing)."""

    def __init__(self, *, transposed: bool, loop: bool) -> None:
        super().__init__()
        self.transposed = transposed  # stored as [E, in, out]
        self.loop = loop
        self.w = nn.Parameter(torch.randn((2, 5, 3) if transposed else (2, 3, 5)))

    def forward(self, x: Tensor) -> Tensor:  # x: [E, tokens, in]
        if self.loop:
            return torch.stack([x[e] @ (self.w[e] if self.transposed else self.w[e].T) for e in range(len(self.w))])
        return torch.bmm(x, self.w if self.transposed else self.w.mT)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` on one input, or on three of different widths."""

    def __init__(self, *, separate: bool = False, batch_first: bool = False) -> None:
        super().__init__()
        widths = {"kdim": 6, "vdim": 5} if separate else {}
        self.separate = separate
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first, **widths)

    def forward(self, x: Tensor, **masks: Any) -> Any:
        key, value = (x[..., :6], x[..., :5]) if self.separate else (x, x)
        return self.attn(x, key, value, **masks)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3,
            bos_token_id=0, eos_token_id=16, attn_implementation="eager",
        )
    )  # fmt: skip


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.3, bos_token_id=0,
            eos_token_id=16, attn_implementation="eager",
        )
    )  # fmt: skip


def gpt2_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D as HFConv1D

    layer = HFConv1D(3, 5)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


# --- the table -------------------------------------------------------------------------------------------------


def x(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Makes one normal input of that shape."""
    return lambda: (torch.randn(shape),)


def ids(*shape: int, n: int = 7) -> Callable[[], tuple[Tensor, ...]]:
    """Makes one input of ids below n, in which ids repeat and the last id occurs."""
    return lambda: ((torch.arange(torch.Size(shape).numel()) * 3 % n).sort().values.flip(0).reshape(shape) // 2 * 2,)


def embedding(name: str, **options: Any) -> Case:
    layout = Embedding(max_norm="max_norm" in options)
    return Case(name, lambda: nn.Embedding(7, 4, **options), ids(3, 5), {"weight": layout})


def conv(name: str, cls: type[Any], in_out: tuple[int, int], space: tuple[int, ...], **options: Any) -> Case:
    groups = options.get("groups", 1)
    dilated = options.get("dilation", 1) != 1
    layout = (
        ConvTranspose(groups)
        if issubclass(cls, nn.modules.conv._ConvTransposeNd)
        else Conv(groups, dilated, options.get("padding_mode", "zeros"))
    )
    return Case(name, lambda: cls(*in_out, **options), x(2, in_out[0], *space), {"weight": layout})


def causal(n: int) -> Tensor:
    return torch.full((n, n), float("-inf")).triu(1)


NO_LSTM = "aten::lstm, gru and rnn have no batching rule"
RECURRENT = {f"weight_{kind}_l0{back}": Recurrent() for kind in ("ih", "hh") for back in ("", "_reverse")}
SEPARATE = {f"attn.{n}": Attention() for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")}
PACKED = {"attn.in_proj_weight": Attention(), "attn.out_proj.weight": Attention()}
BLOCK = {
    "self_attn.in_proj_weight": Attention(),
    "self_attn.out_proj.weight": Attention(),
    "linear1.weight": Linear(),
    "linear2.weight": Linear(),
}
GPT2 = {
    f"transformer.h.{i}.{n}.weight": Conv1D()
    for i in range(2)
    for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
} | {"transformer.wpe.weight": Embedding()}
LLAMA = {
    f"model.layers.{i}.{n}.weight": Linear()
    for i in range(2)
    for n in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
} | {"model.embed_tokens.weight": Embedding(), "lm_head.weight": Linear()}

CASES = [
    Case("linear", lambda: nn.Linear(5, 3), x(2, 4, 5), {"weight": Linear()}),
    Case("linear-no-bias", lambda: nn.Linear(5, 3, bias=False), x(4, 5), {"weight": Linear()}),
    Case("linear-vector", lambda: nn.Linear(5, 3), x(5), {"weight": Linear()}),
    embedding("embedding"),
    embedding("embedding-padding", padding_idx=-1),
    embedding("embedding-max-norm", max_norm=1.0),
    embedding("embedding-max-norm-1", max_norm=2.0, norm_type=1.0),
    embedding("embedding-scale-grad", scale_grad_by_freq=True),
    embedding("embedding-all", padding_idx=2, max_norm=1.0, scale_grad_by_freq=True),
    conv("conv1d", nn.Conv1d, (4, 6), (7,), kernel_size=3, stride=2, padding=1),
    conv("conv1d-same", nn.Conv1d, (4, 6), (7,), kernel_size=4, padding="same", dilation=2),
    conv("conv1d-depthwise", nn.Conv1d, (4, 8), (7,), kernel_size=3, groups=4, bias=False),
    conv("conv2d", nn.Conv2d, (4, 6), (5, 6), kernel_size=3),
    conv("conv2d-stride", nn.Conv2d, (4, 6), (5, 6), kernel_size=(3, 2), stride=(2, 1), padding=(0, 1)),
    conv("conv2d-same", nn.Conv2d, (4, 6), (5, 6), kernel_size=3, padding="same"),
    conv("conv2d-reflect", nn.Conv2d, (4, 6), (5, 6), kernel_size=3, padding=2, padding_mode="reflect"),
    conv("conv2d-circular", nn.Conv2d, (4, 6), (5, 6), kernel_size=3, padding=(1, 2), padding_mode="circular"),
    conv("conv2d-dilation", nn.Conv2d, (4, 6), (5, 6), kernel_size=2, dilation=(2, 3)),
    conv("conv2d-groups", nn.Conv2d, (4, 6), (5, 6), kernel_size=3, groups=2),
    conv("conv2d-depthwise", nn.Conv2d, (4, 4), (5, 6), kernel_size=3, groups=4),
    conv("conv3d", nn.Conv3d, (4, 2), (3, 4, 3), kernel_size=2, stride=(1, 2, 1), padding=(1, 0, 0)),
    conv("conv3d-groups", nn.Conv3d, (4, 6), (3, 4, 3), kernel_size=(1, 2, 2), groups=2, dilation=(1, 2, 1)),
    conv("conv-t1d", nn.ConvTranspose1d, (4, 6), (5,), kernel_size=3, stride=2, output_padding=1),
    conv("conv-t1d-groups", nn.ConvTranspose1d, (4, 6), (5,), kernel_size=3, groups=2, bias=False),
    conv("conv-t2d", nn.ConvTranspose2d, (4, 6), (4, 3), kernel_size=(2, 3), dilation=(2, 1), padding=1),
    conv("conv-t2d-groups", nn.ConvTranspose2d, (4, 6), (4, 3), kernel_size=2, groups=2, stride=(2, 1)),
    conv("conv-t3d", nn.ConvTranspose3d, (4, 2), (3, 2, 3), kernel_size=2, stride=2, output_padding=(1, 0, 1)),
    conv("conv-t3d-groups", nn.ConvTranspose3d, (4, 8), (3, 2, 3), kernel_size=2, groups=4),
    Case("gpt2-conv1d", gpt2_conv1d, x(2, 4, 5), {"weight": Conv1D()}),
    Case("matmul", lambda: RawMatmul(transpose=False), x(2, 4, 5), {"w": Parameter(stored_transposed=True)}),
    Case("matmul-t", lambda: RawMatmul(transpose=True), x(4, 5), {"w": Parameter()}),
    Case("experts-bmm", lambda: Experts(transposed=True, loop=False), x(2, 4, 5),
         {"w": Parameter(stored_transposed=True)}),
    Case("experts-bmm-t", lambda: Experts(transposed=False, loop=False), x(2, 4, 5), {"w": Parameter()}),
    Case("experts-loop", lambda: Experts(transposed=True, loop=True), x(2, 4, 5),
         {"w": Parameter(stored_transposed=True)}),
    Case("experts-loop-t", lambda: Experts(transposed=False, loop=True), x(2, 4, 5), {"w": Parameter()}),
    Case("mha", SelfAttention, x(4, 2, 8), PACKED, lambda: {"attn_mask": causal(4), "is_causal": True}),
    Case("mha-batch-first", lambda: SelfAttention(batch_first=True), x(2, 4, 8), PACKED,
         lambda: {"key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True]])}),
    Case("mha-separate", lambda: SelfAttention(separate=True), x(4, 2, 8), SEPARATE,
         lambda: {"need_weights": False}),
    Case("lstm", lambda: nn.LSTM(3, 4, bidirectional=True), x(5, 2, 3), RECURRENT, fast=False, no_vmap=NO_LSTM),
    Case("lstm-proj", lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True), x(2, 5, 3),
         {n: Recurrent() for n in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0")}, fast=False, no_vmap=NO_LSTM),
    Case("gru", lambda: nn.GRU(3, 4, num_layers=2), x(5, 2, 3),
         {n: Recurrent() for n in ("weight_ih_l0", "weight_hh_l1")}, fast=False, no_vmap=NO_LSTM),
    Case("rnn", lambda: nn.RNN(3, 4, bidirectional=True), x(5, 2, 3), RECURRENT, fast=False, no_vmap=NO_LSTM),
    Case("encoder-layer", lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), x(2, 4, 8), BLOCK,
         lambda: {"src_mask": causal(4)}),
    Case("gpt2", gpt2, ids(2, 6, n=17), GPT2, lambda: {"use_cache": False}),
    Case("llama", llama, ids(2, 6, n=17), LLAMA, lambda: {"use_cache": False}),
]  # fmt: skip
