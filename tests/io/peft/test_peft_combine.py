"""`combine_peft`: PEFT computes from the folder it writes the combination of what it computes from the others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funclora as fl
from funclora import algebra
from funclora.errors import ConfigError, FormatError, FuncloraError, NonFiniteError, PeftFormatWarning, UnsupportedError
from funclora.rules.base import Rule

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = Body()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.turned = Conv1D(6, 8)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(self.embed(ids))
        return self.head(torch.tanh(self.turned(self.conv(x.mT).mT.contiguous())))


IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def trained(model: nn.Module, config: fl.LoraConfig, seed: int) -> dict[str, Rule]:
    """Adapters that change much."""
    adapters = fl.init(model, config)
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Rule] = pytree.tree_map(
        lambda leaf: leaf + 0.5 * torch.randn(leaf.shape, generator=generator), adapters
    )
    return drawn


def write(folder: Path, model: nn.Module, *configs: Mapping[str, Any]) -> tuple[list[Path], list[dict[str, Rule]]]:
    """Saved adapters, and what they are."""
    paths, found = [], []
    for i, fields in enumerate(configs):
        given: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "v_proj"]} | dict(fields)
        config = fl.LoraConfig(**given)
        found.append(trained(model, config, i))
        paths.append(folder / f"adapter-{i}")
        fl.save_peft(paths[-1], found[-1], config)
    return paths, found


def by_peft(model: nn.Module, folder: Path) -> Tensor:
    """The outputs of the model under that folder in PEFT."""
    import copy

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        # said of patterns for target_parameters, which PEFT does follow
        warnings.filterwarnings("ignore", message=".*did not match any targeted module")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    with torch.no_grad():
        result: Tensor = wrapped(IDS)
    return result


def outputs(model: nn.Module, adapters: Mapping[str, Rule]) -> Tensor:
    with torch.no_grad():
        result: Tensor = fl.apply(model, fl.base_params(model), adapters, IDS)
    return result


ALL = ["q_proj", "v_proj", "embed", "conv", "turned", "head"]
# name -> the configurations of the adapters
SOURCES: dict[str, list[dict[str, Any]]] = {
    "alike": [{}, {}],
    "every-layer": [{"target_modules": ALL}, {"target_modules": ALL, "lora_alpha": 5}],
    "scalings": [{"lora_alpha": 6}, {"use_rslora": True, "r": 4}],
    "ranks": [{"r": 2}, {"r": 5, "rank_pattern": {"layers.1.q_proj": 1}}, {"rank_pattern": {"v_proj": 6}}],
    "alphas": [{"alpha_pattern": {"q_proj": 3, "layers.2.v_proj": 40}}, {"rank_pattern": {"q_proj": 1}}],
    "targets": [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "head"], "r": 2}],
    "expressions": [{"target_modules": r".*\.0\.q_proj"}, {"target_modules": r".*proj", "r": 2}],
    "mixed": [{"target_modules": "all-linear"}, {"target_modules": ["embed"]}],
    "layers": [{"layers_to_transform": [0, 2]}, {"layers_to_transform": [1]}],
    "excluded": [{"exclude_modules": ["layers.1.q_proj"]}, {"target_modules": ["q_proj"]}],
}


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties_svd"])
@pytest.mark.parametrize("name", list(SOURCES))
def test_peft_computes_the_combination(name: str, kind: str, net: nn.Module, tmp_path: Path) -> None:
    paths, adapters = write(tmp_path, net, *SOURCES[name])
    weights = [0.6, -1.2, 0.8][: len(paths)]
    options: dict[str, Any] = {"density": 0.5} if "ties" in kind else {}
    ranks: dict[str, set[int | None]] = {}
    for rules in adapters:
        for key, rule in rules.items():
            ranks.setdefault(key, set()).add(rule.r)
    if kind == "linear" and any(len(of_one) > 1 for of_one in ranks.values()):
        with pytest.raises(FuncloraError, match="the ranks differ"):
            fl.combine_peft(paths, tmp_path / "out", weights, kind)
        assert not (tmp_path / "out").exists()
        return
    want = algebra.combine(adapters, weights, kind, **options)
    written = fl.combine_peft(paths, tmp_path / "out", weights, kind, **options)
    expected = outputs(net, want)
    assert (expected - outputs(net, {})).abs().max() > 0.1
    torch.testing.assert_close(by_peft(net, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    loaded, config = fl.load_peft(tmp_path / "out", net)
    assert config == written.config
    assert loaded.keys() == want.keys()
    torch.testing.assert_close(outputs(net, loaded), expected, rtol=1e-4, atol=1e-4)


def test_the_configuration_is_short_where_it_can_be(net: nn.Module, tmp_path: Path) -> None:
    def config(name: str, kind: str = "cat") -> dict[str, Any]:
        paths, _ = write(tmp_path / name, net, *SOURCES[name])
        fl.combine_peft(paths, tmp_path / name / "out", [1.0, 2.0, 3.0][: len(paths)], kind)
        found: dict[str, Any] = json.loads((tmp_path / name / "out" / CONFIG).read_text())
        return found

    alike = config("alike")
    assert (alike["r"], alike["lora_alpha"], alike["rank_pattern"], alike["alpha_pattern"]) == (6, 6, {}, {})
    assert alike["target_modules"] == ["q_proj", "v_proj"]
    assert config("targets")["target_modules"] == ["q_proj", "v_proj", "head"]
    assert config("layers")["target_modules"].startswith(r"body\.layers\.0\.q_proj|")
    assert config("layers", "svd")["layers_to_transform"] is None
    scalings = config("scalings")
    assert (scalings["use_rslora"], scalings["r"], scalings["lora_alpha"]) == (False, 7, 7)
    ranks = config("ranks")
    assert (ranks["r"], ranks["lora_alpha"]) == (13, 13)  # of v_proj: the most common
    assert ranks["rank_pattern"] == {
        r"^body\.layers\.0\.q_proj": 10,
        r"^body\.layers\.1\.q_proj": 6,
        r"^body\.layers\.2\.q_proj": 10,
    }
    assert ranks["alpha_pattern"] == ranks["rank_pattern"]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(1, -1, 8)
        return torch.bmm(torch.tanh(torch.bmm(x.expand(3, -1, -1), self.up.mT)), self.down.mT).sum(0)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.experts = Experts()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.experts(self.embed(ids)))).reshape(*ids.shape, 3)


# With the model: name -> configurations of adapters of `Mixture`.
WITH_MODEL: dict[str, list[dict[str, Any]]] = {
    "experts": [
        {"target_modules": None, "target_parameters": ["experts.up", "experts.down"]},
        {"target_modules": None, "target_parameters": ["experts.up", "experts.down"], "r": 2},
    ],
    "other-experts": [
        {"target_modules": None, "target_parameters": ["experts.up"]},
        {"target_modules": ["head"], "target_parameters": ["experts.down"], "r": 2},
    ],
    "biases": [
        {"target_modules": ["head"], "bias": "lora_only"},
        {"target_modules": ["head", "embed"], "bias": "lora_only"},
    ],
    "saved": [
        {"target_modules": ["embed"], "modules_to_save": ["head"]},
        {"target_modules": ["embed"], "modules_to_save": ["head", "norm"]},
    ],
}


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("name", list(WITH_MODEL))
def test_what_depends_on_the_model(name: str, kind: str, tmp_path: Path) -> None:
    model = Mixture().eval()
    paths, adapters = write(tmp_path, model, *WITH_MODEL[name])
    with pytest.raises(UnsupportedError, match=r"depends on the base model\. Give the base model"):
        fl.combine_peft(paths, tmp_path / "out", [0.6, -1.2], kind)
    fl.combine_peft(paths, tmp_path / "out", [0.6, -1.2], kind, model=model)
    want = algebra.combine(adapters, [0.6, -1.2], kind, params=fl.base_params(model))
    expected = outputs(model, want)
    torch.testing.assert_close(by_peft(model, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(model, fl.load_peft(tmp_path / "out", model)[0]), expected, rtol=1e-4, atol=1e-4)


def test_dora_becomes_low_rank(net: nn.Module, tmp_path: Path) -> None:
    paths, adapters = write(tmp_path, net, {"use_dora": True}, {})
    with pytest.raises(UnsupportedError, match="use_dora=True the adapter depends on the base model"):
        fl.combine_peft(paths, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="DoRA normalises the weight"):
        fl.combine_peft(paths, tmp_path / "out", None, "cat", model=net)
    assert not (tmp_path / "out").exists()
    fl.combine_peft(paths, tmp_path / "out", [0.5, 2.0], svd_rank=8, model=net)
    params = fl.base_params(net)
    merged = [fl.merge(params, each) for each in adapters]
    total = {k: w + 0.5 * (merged[0][k] - w) + 2 * (merged[1][k] - w) for k, w in params.items()}
    with torch.no_grad():
        expected = torch.func.functional_call(net, total, (IDS,))
    torch.testing.assert_close(by_peft(net, tmp_path / "out"), expected, rtol=1e-3, atol=1e-3)


def test_a_scaled_dora_folder_is_refused_and_a_plain_one_copied(net: nn.Module, tmp_path: Path) -> None:
    paths, adapters = write(tmp_path, net, {"use_dora": True})
    fl.combine_peft(paths, tmp_path / "out", None, "cat", model=net)
    torch.testing.assert_close(by_peft(net, tmp_path / "out"), outputs(net, adapters[0]), rtol=1e-4, atol=1e-4)


def test_dtypes(net: nn.Module, tmp_path: Path) -> None:
    paths, _ = write(tmp_path, net, {}, {})
    exact = load_file(Path(combined(paths, tmp_path / "wide")) / WEIGHTS)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = load_file(Path(combined(paths, tmp_path / "half", dtype=dtype)) / WEIGHTS)
        assert {key: value.to(dtype).tolist() for key, value in exact.items()} == {
            key: value.tolist() for key, value in rounded.items()
        }
        assert {value.dtype for value in rounded.values()} == {dtype}
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        fl.combine_peft(paths, tmp_path / "out", [1e6, 1.0], "cat", dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"dtype: expected one of .*, got torch.int8"):
        combined(paths, tmp_path / "out", dtype=torch.int8)


def combined(paths: list[Path], out: Path, **options: Any) -> Path:
    fl.combine_peft(paths, out, [0.7, 0.2], "svd", **options)
    return out


def test_dropout_that_differs_is_left_out(net: nn.Module, tmp_path: Path) -> None:
    paths, _ = write(tmp_path, net, {"lora_dropout": 0.1}, {"lora_dropout": 0.1}, {"target_modules": ["head"]})
    assert fl.combine_peft(paths[:2], tmp_path / "same", None, "cat").config.lora_dropout == 0.1
    found = fl.combine_peft(paths[1:], tmp_path / "other", None, "cat")
    assert found.config.lora_dropout == 0
    assert {rule.dropout_p for rule in found.adapters.values()} == {0}


def test_what_one_configuration_cannot_say(net: nn.Module, tmp_path: Path) -> None:
    paths, _ = write(
        tmp_path,
        net,
        {"bias": "lora_only", "task_type": "CAUSAL_LM"},
        {"task_type": "CAUSAL_LM", "base_model_name_or_path": "here"},
        {"task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": "there"},
        {},
    )
    with pytest.raises(ConfigError, match="bias: the adapters have 'lora_only' and 'none'"):
        fl.combine_peft(paths[:2], tmp_path / "out", None, "cat", model=net)
    with pytest.raises(ConfigError, match="task_type: the adapters have 'CAUSAL_LM' and 'FEATURE_EXTRACTION'"):
        fl.combine_peft(paths[1:3], tmp_path / "out", None, "cat")
    assert fl.combine_peft(paths[2:], tmp_path / "out", None, "cat").config.task_type == "FEATURE_EXTRACTION"
    edit(paths[1], task_type=None)
    with pytest.warns(PeftFormatWarning, match="the adapters name 'here' and 'there'"):
        fl.combine_peft(paths[1:3], tmp_path / "out", None, "cat")


def edit(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q = "base_model.model.body.layers.0.q_proj"


def test_folders_that_are_broken(net: nn.Module, tmp_path: Path) -> None:
    changes: list[tuple[Any, type[FuncloraError], str]] = [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), FormatError, r"there is no '.*layers.0.q_proj.lora_B.weight'"),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), UnsupportedError, "lora_B.weight' is no factor .*Give the base model"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(8)}), UnsupportedError, r"q_proj.bias' is no factor"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 8)}),
            FormatError,
            r"has shape \[2, 8\], expected \[3, 8\] for 'body.layers.0.q_proj' \(rank 3\)",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(8, 1)}),
            FormatError,
            r"has shape \[8, 1\], expected \[8, 3\]",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.full((3, 8), torch.nan)}), NonFiniteError, "NaN"),
        (
            lambda t: t.update({"base_model.model.other.lora_A.weight": torch.ones(3, 8)}),
            FormatError,
            "unexpected key .*does not target 'other'",
        ),
        (
            lambda t: t.update({"base_model.model.attn.base_layer.q_proj.lora_A.weight": torch.ones(3, 8)}),
            UnsupportedError,
            "lies inside another adapted module",
        ),
        (lambda t: t.clear(), FormatError, "there are no low-rank updates"),
    ]
    for change, error, message in changes:
        paths, _ = write(tmp_path, net, {}, {})
        rewrite(paths[1], change)
        with pytest.raises(error, match=message):
            fl.combine_peft(paths, tmp_path / "out", None, "cat")
        assert not (tmp_path / "out").exists()
    paths, _ = write(tmp_path, net, {}, {})
    edit(paths[1], bias="all")
    with pytest.raises(UnsupportedError, match="with bias='all' the adapter depends on the base model"):
        fl.combine_peft(paths, tmp_path / "out")
    with pytest.raises(ConfigError, match="is one of the adapters to combine"):
        fl.combine_peft(paths, paths[0] / ".." / paths[1].name)
    with pytest.raises(FormatError, match="there is no such folder"):
        fl.combine_peft([paths[0], tmp_path / "nowhere"], tmp_path / "out")


def test_folders_that_peft_wrote(net: nn.Module, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    kinds: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "conv", "embed"], "r": 2, "use_rslora": True},
        {"target_modules": ["q_proj", "turned"], "rank_pattern": {"q_proj": 3}, "fan_in_fan_out": True},
    ]
    found = []
    for i, fields in enumerate(kinds):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            model = get_peft_model(Net().eval(), LoraConfig(init_lora_weights=False, **fields))
        model.save_pretrained(tmp_path / f"peft-{i}")
        found.append(fl.load_peft(tmp_path / f"peft-{i}", net)[0])
    paths = [tmp_path / "peft-0", tmp_path / "peft-1"]
    fl.combine_peft(paths, tmp_path / "out", [1.5, 0.5], "cat")
    expected = outputs(net, algebra.task_arithmetic(found, [1.5, 0.5]))
    torch.testing.assert_close(by_peft(net, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
