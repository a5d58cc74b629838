"""Layers and operations of models: rows equal each row alone, or are refused for a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import gen
from oracle import close
from torch import Tensor, nn

import funclora as fl
from funclora.errors import UnsupportedError, strict

F64 = torch.float64
IDS = [2, 0, 1, -1]
pytestmark = pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")


def members(model: nn.Module, targets: Any, parameters: list[str] | None = None) -> list[Any]:
    """LoRA, DoRA and another rank."""
    found = []
    for seed, (r, dora) in enumerate(((2, False), (3, True), (4, False))):
        config = fl.LoraConfig(r=r, target_modules=targets, target_parameters=parameters, use_dora=dora)
        adapters: Any = fl.init(model, config, generator=gen(seed))
        for name, rule in adapters.items():
            leaves = {leaf: getattr(rule, leaf).to(F64) for leaf in rule.leaf_names}
            adapters[name] = replace(
                rule, **leaves | {"b": 0.2 * torch.randn(rule.b.shape, generator=gen(seed)).to(F64)}
            )
        found.append(adapters)
    return found


def check(
    model: nn.Module, *inputs: Any, dim: int = 0, rows_of: Any = None, targets: Any = "all-linear",
    parameters: list[str] | None = None,
) -> None:  # fmt: skip
    """Rows along `dim` of the inputs and the output equal each row alone."""
    model = model.to(F64).eval()
    params, alone = fl.base_params(model), members(model, targets, parameters)
    got = fl.apply(model, params, fl.route(fl.stack(alone), IDS, rows_of=rows_of), *inputs)
    want = [
        fl.apply(model, params, alone[j] if j >= 0 else {}, *(x.narrow(dim, i, 1) for x in inputs))
        for i, j in enumerate(IDS)
    ]
    close(got, torch.cat(want, dim), 1e-10)
    assert not torch.allclose(got, fl.apply(model, params, {}, *inputs))


X = torch.randn(4, 5, 8, generator=gen(0), dtype=F64)
Y = torch.randn(4, 3, 8, generator=gen(1), dtype=F64)
TOKENS = torch.randint(0, 20, (4, 6), generator=gen(2))


class Attention(nn.Module):
    def __init__(self, *, weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.weights = weights
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.attn(x, x, x, need_weights=self.weights)[0])


class Recurrent(nn.Module):
    """All steps, or the last states."""

    def __init__(self, kind: Any, *, batch_first: bool, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.r = kind(8, 6, 2, batch_first=batch_first, bidirectional=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        y, h = self.r(x)
        h = h[0] if isinstance(h, tuple) else h
        return self.out(h.transpose(0, 1)[:, -2:].flatten(1) if self.last else y)


class Cell(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.out = kind(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h, c = x.new_zeros(x.shape[0], 8), x.new_zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
        return self.out(h)


class Bag(nn.Module):
    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.e, self.out = nn.EmbeddingBag(20, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Any:
        return self.out(self.e(ids))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.out = nn.Bilinear(8, 8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(x, x.flip(1)))


class Head(nn.Module):
    """A score at one position of each row."""

    def __init__(self, at: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.at = at
        self.e, self.l, self.score = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Any:
        h = self.l(self.e(ids))
        return self.score(h[torch.arange(len(ids)), self.at(ids)])


class TimeFirst(nn.Module):
    """Attention over `[time, rows·heads, width]`, by views that need the memory format of a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        x = x.transpose(0, 1)
        t, b, h = x.shape
        q = self.q(x).view(t, b * 2, 4).transpose(0, 1)
        y = (q @ q.mT).softmax(-1) @ q
        return self.o(y.transpose(0, 1).contiguous().view(t, b, h)).transpose(0, 1)


class Shifted(nn.Module):
    """Windows of a picture that is rolled, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        b = len(x)
        y = torch.roll(self.l(x).view(b, 4, 4, 8), (-1, -1), (1, 2))
        windows = y.view(b, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, 8)
        y = self.o(windows).view(b, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, 4, 4, 8)
        return torch.roll(y, (1, 1), (1, 2))


def last_token(ids: Tensor) -> Tensor:
    return ((ids != 0).int() * torch.arange(ids.shape[1])).argmax(-1)


ROWS_SECOND: dict[str, tuple[nn.Module, dict[str, int]]] = {
    "attention": (Attention(), {"x": 1}),
    "attention-weights": (Attention(weights=True), {"x": 1}),
    "encoder": (nn.TransformerEncoderLayer(8, 2, 12), {"src": 1}),
    "decoder": (nn.TransformerDecoderLayer(8, 2, 12), {"tgt": 1, "memory": 1}),
    "lstm": (Recurrent(nn.LSTM, batch_first=False), {"x": 1}),
    "gru": (Recurrent(nn.GRU, batch_first=False), {"x": 1}),
}
LAYERS: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]] = {
    "attention": (Attention(batch_first=True), (X,), {}),
    "attention-weights": (Attention(batch_first=True, weights=True), (X,), {}),
    "attention-bias": (Attention(batch_first=True, add_bias_kv=True, add_zero_attn=True), (X,), {}),
    "encoder": (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2), (X,), {}),
    "decoder": (nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), (X, Y), {}),
    "transformer": (nn.Transformer(8, 2, 1, 1, 12, batch_first=True), (X, Y), {}),
    **{kind.__name__: (Recurrent(kind, batch_first=True), (X,), {"targets": ["out"]})
       for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    **{f"{kind.__name__}-adapted": (Recurrent(kind, batch_first=True), (X,), {"targets": ["r", "out"]})
       for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    **{f"{kind.__name__}-states": (Recurrent(kind, batch_first=True, last=True), (X,), {"targets": ["r", "out"]})
       for kind in (nn.LSTM, nn.GRU)},
    **{kind.__name__: (Cell(kind), (X,), {"targets": ["out"]}) for kind in (nn.LSTMCell, nn.GRUCell)},
    **{f"bag-{mode}": (Bag(mode), (TOKENS,), {"targets": ["out"]}) for mode in ("sum", "mean", "max")},
    "bag-adapted": (Bag("sum"), (TOKENS,), {"targets": ["out"], "parameters": ["e.weight"]}),
    "bilinear": (Pair(), (X,), {"targets": ["out"]}),
    "bilinear-adapted": (Pair(), (X,), {"targets": ["out"], "parameters": ["b.weight"]}),
    "reward": (Head(last_token), (TOKENS,), {"targets": ["l", "score"]}),
    "end-of-text": (Head(lambda ids: ids.argmax(-1)), (TOKENS,), {"targets": ["l", "score"]}),
    "time-first": (TimeFirst(), (X,), {}),
    "shifted": (Shifted(), (torch.randn(4, 16, 8, generator=gen(3), dtype=F64),), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    model, inputs, options = LAYERS[name]
    check(model, *inputs, **options)


@pytest.mark.parametrize("name", ROWS_SECOND)
def test_inputs_whose_rows_are_second(name: str) -> None:
    model, rows_of = ROWS_SECOND[name]
    inputs = [x.transpose(0, 1).contiguous() for x in (X, Y)][: len(rows_of)]
    options = {"targets": ["r", "out"]} if name in ("lstm", "gru") else {}
    check(model, *inputs, dim=1, rows_of=rows_of, **options)


class Parts(nn.Module):
    """A layer whose weight is read in another form."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.w = read, nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.w.weight, x)


PARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "T": lambda w, x: x @ w.T,
    "t": lambda w, x: x @ w.t(),
    "mT": lambda w, x: x @ w.mT,
    "transpose": lambda w, x: x @ w.transpose(0, 1),
    "permute": lambda w, x: x @ w.permute(1, 0),
    "left": lambda w, x: (w @ x.mT).mT,
    "chunk": lambda w, x: torch.cat([F.linear(x, part) for part in w.chunk(2, 0)], -1),
    "slice": lambda w, x: F.linear(x, w[2:6]),
    "columns": lambda w, x: F.linear(x[..., :4], w[:, :4]),
    "chunk of T": lambda w, x: x @ w.T.chunk(2, 1)[0],
    "falcon": lambda w, x: (x @ w.T).view(len(x), 5, 2, 2, 2)[..., [-2], :].flatten(2),
}


@pytest.mark.parametrize("name", PARTS)
def test_weights_in_other_forms(name: str) -> None:
    check(Parts(PARTS[name]), X, targets=["w"])


class Between(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between

    def forward(self, x: Tensor) -> Any:
        return self.two(self.between(self.one(x)))


def halves(y: Tensor) -> Tensor:
    out = y.new_empty(len(y), 5, 8)
    out[:, :, :3] = y[:, :, :3]
    out[:, :, 3:] = y[:, :, 3:]
    return out


def copied(y: Tensor) -> Tensor:
    out = torch.empty(len(y), 5, 16, dtype=y.dtype)
    out[..., :8].copy_(y)
    out[..., 8:].copy_(y * 2)
    return out[..., 4:12]


def steps(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    for t in range(5):
        out[:, t] = y[:, t] * 2
    return out


def cached(y: Tensor) -> Tensor:
    return torch.zeros(len(y), 9, 8, dtype=y.dtype).index_copy_(1, torch.arange(5), y)[:, :5]


def sorted_and_back(y: Tensor) -> Tensor:
    flat = y.flatten(0, 1)
    order = flat[:, 0].argsort()
    out = torch.empty_like(flat)
    out[order] = flat[order] * 2
    return out.view_as(y)


def by_row(y: Tensor) -> Tensor:
    return torch.stack([y[i] * (2 if y[i].max().item() > 0 else 1) for i in range(len(y))])


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda y: y.repeat(1, 2, 1)[:, :5], "repeat rows": lambda y: y.repeat(2, 1, 1)[: len(y)],
    "tile": lambda y: y.tile(2, 1, 1)[len(y) :], "flip": lambda y: y.flip(1), "roll": lambda y: y.roll(1, 1),
    "flip twice": lambda y: y.flip(0).flip(0), "type_as": lambda y: y + torch.ones(5, 8).type_as(y),
    "expand_as": lambda y: y + torch.ones(8, dtype=F64).expand_as(y), "halves": halves, "copied": copied,
    "steps": steps, "cached": cached, "sorted": sorted_and_back, "by row": by_row,
    "one_hot": lambda y: y + F.one_hot(y.argmax(-1), 8), "diff": lambda y: y.diff(dim=1),
    "cosine": lambda y: y * F.cosine_similarity(y, y.flip(1), dim=-1).unsqueeze(-1),
    "std_mean": lambda y: y - torch.std_mean(y, -1, keepdim=True)[1], "unfold": lambda y: y.unfold(1, 3, 1).mean(-1),
    "take": lambda y: torch.take_along_dim(y, y.argsort(1), 1), "list": lambda y: y[:, [4, 3, 2, 1, 0]],
    "scatter": lambda y: torch.zeros_like(y).scatter(2, y.topk(3, -1).indices, 1.0) * y,
    "instance_norm": lambda y: F.instance_norm(y.mT).mT, "hardshrink": F.hardshrink,
    "einsum": lambda y: torch.einsum("...d,ed->...e", y, torch.ones(8, 8, dtype=F64)),
    "pad": lambda y: F.pad(y, (0, 0, 0, 3, 0, 0)).reshape(len(y), -1, 4, 8).sum(2),
    "fft": lambda y: torch.fft.fft2(y, dim=(1, 2)).real,
    "strides": lambda y: y.as_strided((len(y), 3, 3, 8), (40, 8, 8, 1)),
    "complex": lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2))) * 1j).flatten(2),
    "broadcast": lambda y: torch.broadcast_to(y.mean(1, keepdim=True), y.shape),
    "apart": lambda y: torch.cat([part * 2 for part in y.split(1, 0)], 0), "mask": lambda y: y.masked_fill(y > 1, 0.0),
    "number": lambda y: y * (2 if y.max().item() > -100 else 1),
    "attend": lambda y: (y @ y.mT).softmax(-1) @ y,
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_operations_between_layers(name: str) -> None:
    check(Between(BETWEEN[name]), X)


class Masked(nn.Module):
    """A mask that the model asks for its values, given by position or in a dict."""

    def __init__(self, *, in_dict: bool) -> None:
        super().__init__()
        self.in_dict, self.l = in_dict, nn.Linear(8, 8)

    def forward(self, x: Any, attention_mask: Tensor | None = None) -> Any:
        if self.in_dict:
            x, attention_mask = x["x"], x["attention_mask"]
        assert type(attention_mask) is Tensor
        return self.l(x) if attention_mask.all() else self.l(x) * attention_mask.unsqueeze(-1)


@pytest.mark.parametrize("in_dict", [False, True])
def test_masks_by_position_and_in_dicts(in_dict: bool) -> None:
    model = Masked(in_dict=in_dict).to(F64)
    params, alone, mask = fl.base_params(model), members(model, ["l"]), torch.ones(4, 5, dtype=F64)
    mask[1, 3:] = 0

    def run(adapters: Any, rows: slice) -> Tensor:
        x, m = X[rows], mask[rows]
        given = ({"x": x, "attention_mask": m},) if in_dict else (x, m)
        out: Tensor = fl.apply(model, params, adapters, *given)
        return out

    want = [run(alone[j] if j >= 0 else {}, slice(i, i + 1)) for i, j in enumerate(IDS)]
    close(run(fl.route(fl.stack(alone), IDS), slice(None)), torch.cat(want), 1e-10)


class Pictures(nn.Module):
    """Text with pictures: some rows have two, some have none, so pictures are not rows."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.look, self.l = nn.Embedding(20, 8), nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, pixel_values: Tensor) -> Any:
        x = self.e(ids)
        seen = self.look(pixel_values)
        return self.l(x.masked_scatter((ids == 0).unsqueeze(-1).expand_as(x), seen))


def test_pictures_are_of_the_rows_that_the_caller_names() -> None:
    ids = TOKENS.clamp(min=1)
    ids[0, 1], ids[0, 4], ids[2, 0], ids[3, 5] = 0, 0, 0, 0
    pixels, rows = torch.randn(4, 6, generator=gen(5), dtype=F64), [0, 0, 2, 3]
    model = Pictures().to(F64)
    params, alone = fl.base_params(model), members(model, ["look", "l"])
    routed = fl.route(fl.stack(alone), IDS, rows_of={"pixel_values": rows})
    got = fl.apply(model, params, routed, ids, pixels)
    for i, j in enumerate(IDS):
        own = pixels[[k for k, row in enumerate(rows) if row == i]]
        close(got[i : i + 1], fl.apply(model, params, alone[j] if j >= 0 else {}, ids[i : i + 1], own), 1e-10)
    with pytest.raises(UnsupportedError, match="masked_scatter"):  # four pictures are not the four rows
        fl.apply(model, params, fl.route(fl.stack(alone), IDS), ids, pixels)
    blind = [{"l.weight": member["l.weight"]} for member in alone]  # no adapted layer looks at them
    got = fl.apply(model, params, fl.route(fl.stack(blind), IDS, rows_of={"pixel_values": None}), ids, pixels)
    close(got[2:3], fl.apply(model, params, blind[1], ids[2:3], pixels[2:3]), 1e-10)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.l = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.l(self.queries) + x[:, :3]


def test_a_refusal_names_the_layer_the_line_and_a_remedy() -> None:
    for kind, cause in (
        (Learned(), "does not come from the batch.*position_ids"),
        (Between(lambda y: y - y.mean(0)), r"mean, called at .*test_layers\.py:\d+, mixed"),
    ):
        model = kind.to(F64)
        alone = members(model, "all-linear")
        with pytest.raises(UnsupportedError, match=rf"'(l|two)\.weight' is read, .*{cause}.*funclora\.vmap"):
            fl.apply(model, fl.base_params(model), fl.route(fl.stack(alone), IDS), X)


class InGroups(nn.Module):
    """A linear layer whose output units are in groups, each with its own inputs, as in DeepSeek-V4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.groups, self.last = nn.Linear(4, 6), nn.Linear(3, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.groups.weight.view(2, -1, 3).transpose(1, 2)
        y = torch.bmm(self.first(x).reshape(-1, 2, 3).transpose(0, 1), weight).transpose(0, 1)
        out: Tensor = self.last(y.reshape(*x.shape[:-1], 8))
        return out


@pytest.mark.parametrize("ids", [[1, 0], [1, 1], [1, 0, -1], [0, 1, 1, 0]], ids=str)
def test_groups_of_output_units_have_the_weights_of_their_row(ids: list[int]) -> None:
    model = InGroups().to(F64)
    params, alone, x = fl.base_params(model), members(model, "all-linear"), torch.randn(len(ids), 5, 4, dtype=F64)
    with strict():
        together = fl.apply(model, params, fl.route(fl.stack(alone), ids), x)
        for i, member in enumerate(ids):
            own = alone[member] if member >= 0 else {}
            close(together[i], fl.apply(model, params, own, x[i : i + 1])[0], 1e-10)
            close(together[i], torch.func.functional_call(model, fl.merge(params, own), (x[i : i + 1],))[0], 1e-10)


def test_patches_of_memory_belong_to_the_owners_of_their_elements() -> None:
    class Overlapping(nn.Module):
        """Chunks of tokens that overlap, as in Longformer, of a tensor that is not contiguous."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, cut: Any = (), start: int = 0) -> Tensor:
            y = self.first(x).transpose(0, 1)[cut]  # [tokens, rows, 3]
            stride = y.stride()
            chunks = y.as_strided((3, 4, len(x), 3), (2 * stride[0], *stride), y.storage_offset() + start)
            out: Tensor = self.last(chunks).sum(0).transpose(0, 1)
            return out

    check(Overlapping(), torch.randn(4, 8, 4, dtype=F64))
    model = Overlapping().to(F64)
    routed = fl.route(fl.stack(members(model, "all-linear")), IDS)
    for outside in ((slice(2, None), -6), ((..., slice(2)), 0)):
        with pytest.raises(UnsupportedError, match="as_strided"):
            fl.apply(model, fl.base_params(model), routed, torch.randn(4, 8, 4, dtype=F64), *outside)
