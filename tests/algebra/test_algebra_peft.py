"""`algebra.combine` against PEFT's `add_weighted_adapter`, number by number; and where PEFT is wrong, what we do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funclora as fl
from funclora import algebra
from funclora.errors import ConfigError, ParamsError, UnsupportedError
from funclora.rules.base import Rule
from funclora.rules.layouts import Conv, Conv1D, Embedding, Linear

PRUNING: dict[str, Any] = {"density": 0.6}
# type -> options
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "svd": [{}, {"svd_rank": 3}, {"svd_rank": 3, "svd_clamp": 0.9}],
    "linear": [{}],
    "cat": [{}],
    "ties": [PRUNING, PRUNING | {"majority_sign_method": "frequency"}, {"density": 0.35}],
    "ties_svd": [PRUNING, PRUNING | {"majority_sign_method": "frequency", "svd_rank": 2}],
    "dare_ties": [PRUNING, PRUNING | {"majority_sign_method": "frequency"}],
    "dare_linear": [PRUNING],
    "dare_ties_svd": [PRUNING, PRUNING | {"majority_sign_method": "frequency", "svd_rank": 2, "svd_clamp": 0.8}],
    "dare_linear_svd": [PRUNING, PRUNING | {"svd_rank": 2}],
    "magnitude_prune": [PRUNING],
    "magnitude_prune_svd": [PRUNING | {"svd_rank": 5}],
}
WEIGHTS = [0.7, -1.6, 0.4]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D as HFConv1D

        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.turned = HFConv1D(8, 12)  # 12 -> 8
        self.conv = nn.Conv2d(8, 6, (2, 3))
        self.point = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(self.up(self.embed(x)))


TARGETS = ["embed", "up", "turned", "conv", "point"]
LAYOUTS = {"embed": Embedding(), "up": Linear(), "turned": Conv1D(), "conv": Conv(), "point": Conv()}


def peft_model(model: nn.Module, *configs: Mapping[str, Any], seed: int = 0) -> Any:
    """PEFT around the model, with adapters "0", "1", ... whose factors are all random."""
    from peft import LoraConfig, get_peft_model

    made = [LoraConfig(**({"r": 4, "target_modules": TARGETS, "fan_in_fan_out": True} | dict(c))) for c in configs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out differs from layer to layer
        wrapped = get_peft_model(model, made[0], adapter_name="0")
        for i, config in enumerate(made[1:], start=1):
            wrapped.add_adapter(str(i), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return wrapped


def rules_of(model: Any, adapter: str, layouts: Mapping[str, Any] = LAYOUTS) -> dict[str, Rule]:
    """PEFT's adapter as ours, in the order of PEFT's layers."""
    found: dict[str, Rule] = {}
    for path, module in model.base_model.model.named_modules():
        if adapter in getattr(module, "lora_A", ()):
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        elif adapter in getattr(module, "lora_embedding_A", ()):
            a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            continue
        found[f"{path}.weight"] = fl.LoRA(
            a.detach().clone(), b.detach().clone(), scaling=module.scaling[adapter], layout=layouts[path]
        )
    return found


def deltas(model: Any, adapter: str) -> dict[str, Tensor]:
    """What PEFT adds to its weights."""
    modules = dict(model.base_model.model.named_modules())
    return {
        f"{path}.weight": module.get_delta_weight(adapter).detach()
        for path, module in modules.items()
        if adapter in getattr(module, "lora_A", ()) or adapter in getattr(module, "lora_embedding_A", ())
    }


def seed_after_init(model: Any, seed: int) -> None:
    """Seed the default generator between PEFT's initialisation of a new adapter and its combination."""
    inject = model.base_model.inject_adapter

    def seeded(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    model.base_model.inject_adapter = seeded


def dense(rule: Any, weight: Tensor) -> Tensor:
    result: Tensor = rule.dense(torch.zeros_like(weight))
    return result


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind, several in OPTIONS.items() for options in several],
    ids=lambda it: it if isinstance(it, str) else "-".join(f"{k}={v}" for k, v in it.items()) or "plain",
)
def test_every_type_gives_peft_numbers(kind: str, options: dict[str, Any]) -> None:
    scalings = [{"lora_alpha": 8}, {"lora_alpha": 3, "use_rslora": False}, {"lora_alpha": -2}]
    model = peft_model(Net(), *scalings)
    ours = [rules_of(model, str(i)) for i in range(3)]
    seed_after_init(model, 7)
    model.base_model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "new", combination_type=kind, **options)
    torch.manual_seed(7)  # DARE draws from the default generator, in PEFT and here
    combined = algebra.combine(ours, WEIGHTS, kind, **options)
    theirs, want = rules_of(model, "new"), deltas(model, "new")
    assert list(combined) == list(theirs) == [f"{target}.weight" for target in TARGETS]
    for name, rule in combined.items():
        delta = want[name]
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(dense(rule, delta), delta, rtol=1e-4, atol=2e-5 * delta.abs().max().item())
        assert isinstance(rule, fl.LoRA)
        assert (rule.scaling, rule.layout) == (1.0, LAYOUTS[name.removesuffix(".weight")])
        if not kind.endswith("svd"):  # signs of singular vectors are free
            for leaf in ("a", "b"):
                torch.testing.assert_close(getattr(rule, leaf), getattr(theirs[name], leaf), rtol=1e-5, atol=1e-5)


def test_targets_of_some_adapters_only() -> None:
    model = peft_model(Net(), {}, {"target_modules": ["up", "conv"]}, {"target_modules": ["conv", "embed"]})
    ours = [rules_of(model, str(i)) for i in range(3)]
    for kind in ("cat", "svd", "ties_svd"):
        options: dict[str, Any] = PRUNING if kind == "ties_svd" else {}
        model.base_model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, kind, combination_type=kind, **options)
        combined = algebra.combine(ours, WEIGHTS, kind, **options)
        want = deltas(model, kind)
        assert set(combined) == set(want)
        for name, rule in combined.items():
            torch.testing.assert_close(dense(rule, want[name]), want[name], rtol=1e-4, atol=1e-4)


def test_ranks_that_differ() -> None:
    model = peft_model(Net(), {"r": 2}, {"r": 5, "rank_pattern": {"up": 3}})
    ours = [rules_of(model, str(i)) for i in range(2)]
    for kind in ("cat", "svd", "magnitude_prune_svd"):
        options: dict[str, Any] = PRUNING if kind.startswith("magnitude") else {}
        model.base_model.add_weighted_adapter(["0", "1"], [1.5, -1], kind, combination_type=kind, **options)
        combined, want = algebra.combine(ours, [1.5, -1], kind, **options), deltas(model, kind)
        for name, rule in combined.items():
            torch.testing.assert_close(dense(rule, want[name]), want[name], rtol=1e-4, atol=1e-4)
    # PEFT pads with zeros up to the largest rank of the configuration; here a rank is what it is.
    assert algebra.combine(ours, [1.5, -1], "cat")["up.weight"].r == 5
    assert rules_of(model, "cat")["up.weight"].r == 7


# --- where PEFT is wrong ---------------------------------------------------------------------------------------


def test_rslora_keeps_its_size() -> None:
    model = peft_model(Net(), {"use_rslora": True}, {"use_rslora": True})
    ours = [rules_of(model, str(i)) for i in range(2)]
    both = [deltas(model, str(i)) for i in range(2)]
    model.base_model.add_weighted_adapter(["0", "1"], [1.0, 0.5], "new", combination_type="cat")
    wrong = deltas(model, "new")
    for name, rule in algebra.combine(ours, [1.0, 0.5], "cat").items():
        want = both[0][name] + 0.5 * both[1][name]
        torch.testing.assert_close(dense(rule, want), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wrong[name], 8**0.5 * want, rtol=1e-4, atol=1e-4)  # PEFT: the root of the rank


def test_weights_that_are_too_few() -> None:
    model = peft_model(Net(), {}, {}, {})
    model.base_model.add_weighted_adapter(["0", "1"], [1.0], "new", combination_type="svd")
    want = deltas(model, "0")
    torch.testing.assert_close(deltas(model, "new")["up.weight"], want["up.weight"], rtol=1e-4, atol=1e-4)
    ours = [rules_of(model, str(i)) for i in range(2)]
    with pytest.raises(ConfigError, match="weights: expected 2, one for each adapter, got 1"):
        algebra.combine(ours, [1.0])


def test_a_failure_leaves_nothing() -> None:
    model = peft_model(Net(), {}, {})
    with pytest.raises(TypeError, match="NoneType"):
        model.base_model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "unfinished", combination_type="ties")
    assert "unfinished" in model.peft_config
    ours = [rules_of(model, str(i)) for i in range(2)]
    before = [dict(adapters) for adapters in ours]
    with pytest.raises(ConfigError, match="density: combination_type='ties' needs it"):
        algebra.combine(ours, [1.0, 1.0], "ties")
    assert ours == before


def test_one_adapter_is_not_another_type() -> None:
    model = peft_model(Net(), {})
    ours = rules_of(model, "0")
    model.base_model.add_weighted_adapter(["0"], [1.0], "new", combination_type="svd", svd_rank=2)
    assert rules_of(model, "new")["up.weight"].r == 4
    assert algebra.combine([ours], None, "svd", svd_rank=2)["up.weight"].r == 2


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)


def test_svd_of_one_dimensional_convolutions() -> None:
    model = peft_model(Wave(), *2 * [{"target_modules": ["conv"], "fan_in_fan_out": False}])
    ours = [rules_of(model, str(i), {"conv": Conv()}) for i in range(2)]
    want = deltas(model, "0")["conv.weight"] - 2 * deltas(model, "1")["conv.weight"]
    with pytest.raises(RuntimeError, match="size"):
        model.base_model.add_weighted_adapter(["0", "1"], [1.0, -2.0], "new", combination_type="svd")
    rule = algebra.combine(ours, [1.0, -2.0], "svd", svd_rank=6)["conv.weight"]
    torch.testing.assert_close(dense(rule, want), want, rtol=1e-4, atol=1e-4)


def test_magnitudes_are_not_lost() -> None:
    model = peft_model(Net(), *2 * [{"use_dora": True, "target_modules": ["up"]}])
    with torch.no_grad():
        for i in range(2):
            model.base_model.model.up.lora_magnitude_vector[str(i)].weight.mul_(3.0)
    layer = model.base_model.model.up
    weight = layer.base_layer.weight.detach()
    ours: list[dict[str, Rule]] = []
    for i in range(2):
        (rule,) = rules_of(model, str(i), {"up": Linear()}).values()
        assert isinstance(rule, fl.LoRA)
        magnitude = layer.lora_magnitude_vector[str(i)].weight.detach()
        ours.append({"up.weight": fl.DoRA(rule.a, rule.b, magnitude, scaling=rule.scaling)})
    model.base_model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "new", combination_type="cat")
    torch.testing.assert_close(  # PEFT: the base's own norms
        layer.lora_magnitude_vector["new"].weight.detach(), weight.norm(dim=1), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(UnsupportedError, match=r"'up.weight': DoRA normalises the weight.*combination_type='svd'"):
        algebra.combine(ours, [0.5, 0.5], "cat")
    params = {"up.weight": weight}
    want = sum(0.5 * (adapter["up.weight"].dense(weight) - weight) for adapter in ours)
    assert isinstance(want, Tensor)
    for order in (ours, ours[::-1]):
        combined = algebra.combine(order, [0.5, 0.5], svd_rank=8, params=params)["up.weight"]
        torch.testing.assert_close(dense(combined, weight), want, rtol=1e-4, atol=1e-4)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.w = nn.Parameter(torch.randn(3, 6, 5))


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_target_parameters(kind: str) -> None:
    model = Bank()
    config = fl.LoraConfig(r=2, target_parameters=["experts.w"], init_lora_weights=False)
    ours = [fl.init(model, config, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    options: dict[str, Any] = PRUNING if "ties" in kind or "dare" in kind or "prune" in kind else {}
    torch.manual_seed(3)
    combined = algebra.combine(ours, [2.0, -1.0], kind, **options)["experts.w"]
    assert isinstance(combined, fl.LoRA)
    weight = model.experts.get_parameter("w")
    combined.check("experts.w", weight)
    if kind in ("cat", "svd"):
        want = 2 * dense(ours[0]["experts.w"], weight) - dense(ours[1]["experts.w"], weight)
        if kind == "svd":  # each expert is a matrix of its own
            u, s, vh = torch.linalg.svd(want)
            want = u[..., :2] * s[:, None, :2] @ vh[:, :2]
        torch.testing.assert_close(dense(combined, weight), want, rtol=1e-4, atol=1e-4)
    else:
        assert dense(combined, weight).abs().max() > 0.01


def test_equal_ranks_under_configurations_that_differ() -> None:
    one, other = {"r": 4, "target_modules": ["up"]}, {"r": 9, "rank_pattern": {"up": 4}, "target_modules": ["up"]}
    model = peft_model(Net(), one, other)
    ours = [rules_of(model, str(i)) for i in range(2)]
    with pytest.raises(ValueError, match="must have the same r"):
        model.base_model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", combination_type="linear")
    combined = algebra.combine(ours, [1.0, 4.0], "linear")["up.weight"]
    s: Any = [rule.scaling for adapters in ours for rule in adapters.values()]
    a = [s[0] ** 0.5, (4 * s[1]) ** 0.5]
    assert isinstance(combined, fl.LoRA)
    first, second = ours[0]["up.weight"], ours[1]["up.weight"]
    assert isinstance(first, fl.LoRA)
    assert isinstance(second, fl.LoRA)
    torch.testing.assert_close(combined.a, a[0] * first.a + a[1] * second.a)
    with pytest.raises(ParamsError, match=r"'up.weight': combination_type='linear' .* ranks differ: 4, 8.*'cat'"):
        algebra.combine([ours[0], algebra.add(ours)], None, "linear")


def test_dare_keeps_the_expectation() -> None:
    model = peft_model(Net(), {"target_modules": ["up"]})
    ours = rules_of(model, "0")
    want = deltas(model, "0")["up.weight"]
    generator = torch.Generator().manual_seed(0)
    draws = [algebra.dare([ours], density=0.8, rank=12, generator=generator)["up.weight"] for _ in range(600)]
    found = torch.stack([dense(rule, want) for rule in draws])
    kept = (found.abs() > 1e-4 * want.abs().max()).float()
    torch.testing.assert_close(found[0][kept[0] > 0], (want / 0.8)[kept[0] > 0], rtol=1e-3, atol=1e-3)
    assert (kept.mean(0) - 0.8).abs().max() < 0.1  # six deviations of 600 draws
    torch.testing.assert_close(found.mean(0), want, rtol=0.15, atol=0.02)
    again = algebra.dare([ours], density=0.8, rank=12, generator=torch.Generator().manual_seed(0))["up.weight"]
    assert torch.equal(dense(again, want), found[0])


METHODS: dict[str, Any] = {
    "ties_svd": algebra.ties,
    "dare_linear_svd": algebra.dare,
    "magnitude_prune_svd": algebra.magnitude_prune,
}


@pytest.mark.parametrize("kind", list(METHODS))
def test_methods_by_name(kind: str) -> None:
    model = peft_model(Net(), {}, {})
    ours = [rules_of(model, str(i)) for i in range(2)]
    torch.manual_seed(1)
    want: dict[str, Any] = algebra.combine(ours, [1.0, -2.0], kind, density=0.5, svd_rank=3)
    torch.manual_seed(1)
    found = METHODS[kind](ours, [1.0, -2.0], density=0.5, rank=3)
    for name, rule in want.items():
        assert torch.equal(rule.a, found[name].a)
        assert torch.equal(rule.b, found[name].b)
