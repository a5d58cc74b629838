"""PiSSA, OLoRA and LoftQ: the new base and the adapter together are the old base, and the numbers are PEFT's."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import CASES, Case, gen
from oracle import close, distance, snapshot
from peft.utils import loftq_utils
from torch import Tensor, nn

import funclora as fl
from funclora._init.decompose import nf4
from funclora._torch.linalg import randomized_svd
from funclora.errors import (
    ConfigError,
    FormatError,
    NonFiniteError,
    ParamsError,
    TiedWeightsWarning,
    UnsupportedError,
)
from funclora.rules.low_rank import LowRank

# Rules of both kinds, whose leaves the type checker knows nothing of.
decompose: Any = fl.decompose
load_peft: Any = fl.load_peft
relative_to_original: Any = fl.relative_to_original
EXACT = ["pissa", "pissa_niter_3", "olora"]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def gpt2_conv1d(n_out: int, n_in: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(n_out, n_in)
    nn.init.normal_(layer.bias)
    return layer


def two_layers(kind: str = "linear") -> nn.Module:
    make: Callable[[int, int], nn.Module] = nn.Linear if kind == "linear" else lambda i, o: gpt2_conv1d(o, i)
    return nn.Sequential(make(12, 10), nn.Tanh(), make(10, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def config(**fields: Any) -> fl.LoraConfig:
    usual: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": "pissa"}
    return fl.LoraConfig(**usual | fields)


def peft_model(model: nn.Module, wanted: fl.LoraConfig) -> Any:
    """PEFT's model for the configuration, on a copy."""
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern")
    fields = {name: copy.deepcopy(getattr(wanted, name)) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fan = any(type(m).__name__ == "Conv1D" for m in model.modules())
        return peft.get_peft_model(
            copy.deepcopy(model),
            peft.LoraConfig(**fields, target_modules=list(wanted.target_modules or ()), fan_in_fan_out=fan),
        ).eval()


def moved(adapters: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The adapters after some training: every leaf is another one."""
    generator = gen(seed)
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf + 0.3 * leaf.std() * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), adapters
    )


def load_into_peft(model: Any, adapters: dict[str, Any]) -> None:
    """Give the factors and magnitudes of linear layers to PEFT's model."""
    for name, rule in adapters.items():
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        layer.lora_A["default"].weight.data = rule.a.clone()
        layer.lora_B["default"].weight.data = rule.b.clone()
        if isinstance(rule, fl.DoRA):
            layer.lora_magnitude_vector["default"].weight.data = rule.magnitude.clone()


# --- the new base and the adapter are the old base --------------------------------------------------------------


@every_case
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")
@pytest.mark.filterwarnings("ignore::funclora.errors.TiedWeightsWarning")
def test_the_start_is_the_base_model_for_every_layer(case: Case, kind: str, use_dora: bool) -> None:
    s = case.setup(torch.float64)
    wanted = fl.LoraConfig(
        r=2, lora_alpha=3, target_parameters=[*case.targets], init_lora_weights=kind, use_dora=use_dora
    )
    unchanged = snapshot(s.model, s.params)
    params, adapters = decompose(s.model, wanted, params=s.params, generator=gen(1))
    unchanged()
    base = fl.apply(s.model, s.params, {}, *s.args, **s.kwargs)
    close(fl.apply(s.model, params, adapters, *s.args, **s.kwargs), base, 1e-9)
    assert distance(fl.apply(s.model, params, {}, *s.args, **s.kwargs), base) > 1e-3  # something did move
    assert params.keys() == s.params.keys()
    assert adapters.keys() == case.targets.keys()
    for name, value in params.items():
        assert (value is s.params[name]) != (name in adapters)
        assert value.dtype == s.params[name].dtype
        assert value.stride() == s.params[name].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", [None, torch.bfloat16])
def test_the_rest_takes_up_the_rounding_of_the_factors(dtype: torch.dtype, factors: torch.dtype | None) -> None:
    model = two_layers().to(dtype)
    params, adapters = decompose(model, config(), dtype=factors)
    for name, rule in adapters.items():
        assert isinstance(rule, fl.LoRA)
        assert rule.a.dtype == rule.b.dtype == (factors or torch.float32)
        assert params[name].dtype == dtype
        back = rule.dense(params[name]).float()
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(back, model.state_dict()[name].float(), rtol=tolerance, atol=tolerance)


def test_pissa_moves_the_leading_singular_part() -> None:
    model = two_layers().double()
    _, adapters = decompose(model, config(lora_alpha=-1.5))  # a negative scaling too
    for name, rule in adapters.items():
        assert isinstance(rule, fl.LoRA)
        assert rule.scaling == -0.5
        u, s, vh = torch.linalg.svd(model.state_dict()[name])
        close(rule.delta(), u[:, :3] * s[:3] @ vh[:3], 1e-12)
        close(rule.a @ rule.a.mT, torch.diag(s[:3] / 0.5), 1e-12)  # both factors hold the roots
        close(rule.b.mT @ rule.b, torch.diag(s[:3] / 0.5), 1e-12)


def test_olora_has_an_orthonormal_b() -> None:
    for kind in ("linear", "conv1d"):
        model = two_layers(kind)
        for name, rule in decompose(model, config(init_lora_weights="olora"))[1].items():
            assert isinstance(rule, fl.LoRA)
            close(rule.b.mT @ rule.b, torch.eye(3), 1e-6)
            whole = rule.layout.to_matrix(model.state_dict()[name])
            close(rule.b.mT @ whole, rule.a, 1e-6)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (2, 7, 9)])
def test_the_fast_decomposition_is_that_of_torch_with_a_generator_of_its_own(shape: tuple[int, ...]) -> None:
    outer, _, inner = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = outer * 0.5 ** torch.arange(outer.shape[-1]) @ inner  # singular values apart from each other
    state = torch.get_rng_state()
    u, s, vh = randomized_svd("w", matrix, 3, 2, gen(5))
    assert torch.equal(torch.get_rng_state(), state)
    if len(shape) == 2:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            expected = torch.svd_lowrank(matrix, q=3, niter=2)
        close([u, s, vh.mT], list(expected), 1e-12)
    u, s, vh = randomized_svd("w", matrix, 3, 60, gen(5))
    close(s, torch.linalg.svdvals(matrix)[..., :3], 1e-9)
    close(u @ torch.diag_embed(s) @ vh, u @ u.mT @ matrix, 1e-9)


def test_a_seed_decides_the_fast_decomposition() -> None:
    model, wanted = two_layers(), config(init_lora_weights="pissa_niter_0")
    one, again, other = (decompose(model, wanted, generator=gen(seed)) for seed in (1, 1, 2))
    for name in one[1]:
        assert torch.equal(one[0][name], again[0][name])
        assert not torch.allclose(one[0][name], other[0][name])
    alone = decompose(model, wanted.replace(target_modules=["2"]), generator=gen(1))
    assert torch.equal(alone[0]["2.weight"], one[0]["2.weight"])


# --- PEFT -------------------------------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {},
    {"lora_alpha": 3},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"2": 5}, "alpha_pattern": {"0": 1}},
]


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_and_rest_are_those_of_peft(layer: str, kind: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    if (layer, kind) == ("conv1d", "olora"):
        with pytest.raises(
            RuntimeError, match=r"shape|size of tensor"
        ):  # PEFT forgets that the weight is stored transposed
            peft_model(two_layers(layer), config(init_lora_weights=kind, **fields))(torch.randn(5, 12))
        return
    model, wanted = two_layers(layer).to(dtype), config(init_lora_weights=kind, **fields)
    params, adapters = decompose(model, wanted)
    theirs = peft_model(model, wanted)
    for name, rule in adapters.items():
        assert isinstance(rule, LowRank)
        other = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        signs = (rule.a * a).sum(1).sign()  # a pair of singular vectors has no sign
        # PEFT has rounded its factors to the dtype of the weight after it had subtracted them.
        rounding = max(1e-5, torch.finfo(dtype).eps)
        close([rule.a, rule.b], [signs[:, None] * a.data, signs * b.data], rounding)
        close(params[name].float(), other.base_layer.weight.data.float(), rounding)
        if isinstance(rule, fl.DoRA):
            close(rule.magnitude, other.lora_magnitude_vector["default"].weight.data, rounding)
    x = torch.randn(5, 12, dtype=dtype)
    trained = moved(adapters)
    load_into_peft(theirs, trained)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    close(fl.apply(model, params, trained, x), theirs(x), tolerance)


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loftq_is_that_of_peft(iterations: int, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    # PEFT's function, on the CPU.
    space = dict(vars(loftq_utils)) | {"clear_device_cache": lambda: None}
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), space)
    model: Any = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    wanted = fl.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="loftq")
    params, adapters = decompose(model, wanted, iterations=iterations)
    weight, a, b = space["loftq_init"](model[0].weight.data.float(), num_bits=4, reduced_rank=4, num_iter=iterations)
    rule = adapters["0.weight"]
    assert isinstance(rule, fl.LoRA)
    if dtype == torch.float32:
        close(params["0.weight"].dequantize(), weight, 1e-6)
        close(rule.delta(), b @ a, 1e-4)
    # PEFT quantises in float32 whatever the dtype, and a code may fall to the other side of a boundary.
    original = model[0].weight.data.float()
    ours, theirs = rule.dense(params["0.weight"]) - original, weight + b @ a - original
    assert params["0.weight"].dtype == dtype
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.03)


def error(model: nn.Module, params: dict[str, Tensor], adapters: dict[str, Any]) -> float:
    merged = fl.merge(fl.dequantize(params), adapters)
    return sum(float((merged[n] - w).square().sum()) for n, w in model.state_dict().items()) ** 0.5


@pytest.mark.parametrize("alpha", [4, 1, -8])
def test_loftq_makes_up_for_the_quantisation_whatever_the_scaling(alpha: float) -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    wanted = fl.LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_lora_weights="loftq")
    once, adapters = decompose(model, wanted)
    for name in adapters:
        assert torch.equal(
            once[name].dequantize(), nf4(model.state_dict()[name]).dequantize()
        )  # the new base is the quantised original
    plain = error(model, once, {})
    with_adapter = error(model, once, adapters)
    often = error(model, *decompose(model, wanted, iterations=5))
    assert often < with_adapter < 0.97 * plain
    lost = {name: model.state_dict()[name] - once[name].dequantize() for name in adapters}
    best = sum(float(torch.linalg.svdvals(each)[4:].square().sum()) for each in lost.values()) ** 0.5
    assert with_adapter == pytest.approx(best, rel=1e-4)


def packed(weight: Tensor) -> Tensor:
    return fl.quantize({"weight": weight}, ["weight"], "fp4", blocksize=32)["weight"]


@every_case
@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")
def test_loftq_takes_any_quantiser_for_any_layer(case: Case) -> None:
    s = case.setup()
    wanted = fl.LoraConfig(r=2, lora_alpha=3, target_parameters=[*case.targets], init_lora_weights="loftq")
    coarse = lambda weight: (weight * 2).round() / 2 + 0.25  # noqa: E731
    unchanged = snapshot(s.model, s.params)
    params, adapters = decompose(s.model, wanted, params=s.params, quantize=coarse, iterations=2)
    unchanged()
    for name, rule in adapters.items():
        assert isinstance(rule, fl.LoRA)
        assert torch.equal(params[name], params[name].mul(4).round() / 4)
        assert (rule.dense(params[name]) - s.params[name]).norm() < (params[name] - s.params[name]).norm()


def test_a_packed_weight_is_the_new_base_as_it_is() -> None:
    model = two_layers()
    wanted = config(init_lora_weights="loftq")
    params, adapters = decompose(model, wanted, quantize=packed)
    for name, rule in adapters.items():
        assert isinstance(params[name], fl.Quantized)
        assert isinstance(rule, fl.LoRA)
        u, s, vh = torch.linalg.svd(model.state_dict()[name] - params[name].dequantize())
        close(rule.delta(), u[:, :3] * s[:3] @ vh[:3], 1e-4)
    with pytest.raises(ParamsError, match=r"'0.weight' is quantised\. Decompose the original weights"):
        decompose(model, config(), params=params)


def test_dora_starts_with_the_norms_of_the_original_weights() -> None:
    model = two_layers()
    for kind, options in [*((kind, {}) for kind in EXACT), ("loftq", {"quantize": packed})]:
        _, adapters = decompose(model, config(init_lora_weights=kind, use_dora=True), **options)
        for name, rule in adapters.items():
            assert isinstance(rule, fl.DoRA)
            close(rule.magnitude, model.state_dict()[name].norm(dim=1), 1e-6)


# --- back to the original base ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_a_trained_adapter_is_exported_for_the_original_base(
    layer: str, kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model, x = two_layers(layer), torch.randn(5, 12)
    wanted = config(init_lora_weights=kind, modules_to_save=["4"], **fields)
    params, initial = decompose(model, wanted, generator=gen(0))
    trained = moved(initial)
    plain, plain_config = relative_to_original(trained, initial, wanted)
    expected = fl.apply(model, params, trained, x)
    assert distance(expected, model(x)) > 0.05
    close(fl.apply(model, fl.base_params(model), plain, x), expected, 1e-5)
    assert plain["0.weight"].r == 2 * wanted.r
    assert plain["0.weight"].scaling == trained["0.weight"].scaling
    assert torch.equal(plain["4.weight"].value, trained["4.weight"].value)
    fl.save_peft(tmp_path, plain, plain_config)
    loaded, loaded_config = load_peft(tmp_path, model)
    assert loaded_config.init_lora_weights is True
    assert loaded_config.r == 6
    close(fl.apply(model, fl.base_params(model), loaded, x), expected, 1e-5)
    close(peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()(x), expected, 1e-5)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, VARIANTS[-1]], ids=str)
def test_the_export_is_the_one_of_peft(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model, wanted = two_layers(), config(init_lora_weights=kind, **fields)
    theirs = peft_model(model, wanted)
    _, initial = decompose(model, wanted, generator=gen(0))
    trained = moved(initial)
    load_into_peft(theirs, initial)
    theirs.peft_config["default"].init_lora_weights = kind
    theirs.save_pretrained(str(tmp_path / "initial"))
    load_into_peft(theirs, trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(
            str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    loaded, loaded_config = load_peft(tmp_path / "plain", model)
    plain, plain_config = relative_to_original(trained, initial, wanted)
    for name, rule in plain.items():
        assert torch.equal(rule.a, loaded[name].a)
        assert torch.equal(rule.b, loaded[name].b)
        assert rule.scaling == pytest.approx(loaded[name].scaling, rel=1e-12)
    for field in ("r", "rank_pattern", "init_lora_weights", "use_rslora"):
        assert getattr(plain_config, field) == getattr(loaded_config, field)
    assert plain_config.lora_alpha == pytest.approx(loaded_config.lora_alpha)
    assert plain_config.alpha_pattern == pytest.approx(dict(loaded_config.alpha_pattern))


def test_experts_convolutions_and_tables_come_back_too() -> None:
    for case in CASES:
        if case.name not in ("experts-bmm", "conv2d-groups", "conv-t2d-groups", "embedding", "mha"):
            continue
        s = case.setup(torch.float64)
        wanted = fl.LoraConfig(r=2, target_parameters=[*case.targets], init_lora_weights="pissa", use_dora=True)
        params, initial = decompose(s.model, wanted, params=s.params)
        trained = moved(initial)
        plain, _ = relative_to_original(trained, initial, wanted)
        for name in case.targets:
            close(fl.merge(s.params, plain)[name], fl.merge(params, trained)[name], 1e-9)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_folder_of_peft_with_decomposed_weights_loads_with_its_outputs(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model, wanted, x = two_layers(), config(init_lora_weights=kind, **fields), torch.randn(5, 12)
    theirs = peft_model(model, wanted)
    load_into_peft(theirs, moved(decompose(model, wanted)[1]))
    theirs.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == kind
    adapters, loaded = fl.load_peft(tmp_path, model)
    assert loaded.r == 6
    assert loaded.init_lora_weights is True
    expected = theirs(x)
    close(fl.apply(model, fl.base_params(model), adapters, x), expected, 1e-5)
    close(peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()(x), expected, 1e-5)
    fl.save_peft(tmp_path / "plain", adapters, loaded)
    close(peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "plain")).eval()(x), expected, 1e-5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("pissa_niter_4", "'pissa_niter_4': PEFT draws another random decomposition whenever it loads"),
        ("loftq", "init_lora_weights='loftq': the adapter belongs to the quantised weights of its training"),
        ("corda", "init_lora_weights='corda' is not supported"),
    ],
)
def test_folders_that_do_not_say_what_their_base_is_are_refused(value: str, message: str, tmp_path: Path) -> None:
    model, wanted = two_layers(), config(init_lora_weights=True)
    fl.save_peft(tmp_path, fl.init(model, wanted), wanted)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": value}))
    with pytest.raises(UnsupportedError, match=message):
        fl.load_peft(tmp_path, model)


@pytest.mark.parametrize("kind", [*EXACT, "eva"])
def test_configurations_go_to_peft_and_back(kind: str) -> None:
    wanted = config(init_lora_weights=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there = wanted.to_peft()
    assert there.init_lora_weights == kind
    assert fl.LoraConfig.from_peft(there).replace(target_modules=wanted.target_modules) == wanted
    with pytest.raises(ConfigError, match=r"eva_config=.*Its options are arguments of decompose and init_eva"):
        fl.LoraConfig.from_peft(there.to_dict() | {"eva_config": {"rho": 3.0}})


def test_a_checkpoint_is_not_merged_with_the_part_that_was_taken_out_of_it(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    model.save_pretrained(str(tmp_path / "base"))
    theirs = peft_model(model, config(target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UnsupportedError, match="the adapter belongs to decomposed weights"):
        fl.merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


def test_a_folder_whose_layers_peft_would_not_decompose_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU())
    wanted = config(target_modules=["0", "1"], init_lora_weights=True)
    fl.save_peft(tmp_path, fl.init(model, wanted), wanted)
    file = tmp_path / "adapter_config.json"
    raw = json.loads(file.read_text()) | {"init_lora_weights": "pissa"}
    file.write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError, match=r"PEFT does not decompose '0.weight', a weight of Embedding"):
        fl.load_peft(tmp_path, model)
    with pytest.raises(UnsupportedError, match="init_lora_weights='pissa' the adapter depends on the base model"):
        fl.combine_peft([tmp_path, tmp_path], tmp_path / "both", combination_type="cat")
    tall = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 2), nn.ReLU())
    wanted = config(target_modules=["1"], init_lora_weights=True)
    fl.save_peft(tmp_path, fl.init(tall, wanted), wanted)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "olora"}))
    with pytest.raises(FormatError, match="matrix of 2 x 8, which has fewer than 3 directions"):
        fl.load_peft(tmp_path, tall)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*EXACT, "loftq"])
def test_init_and_save_say_where_to_go(kind: str, tmp_path: Path) -> None:
    model, wanted = two_layers(), config(init_lora_weights=kind)
    with pytest.raises(ConfigError, match=r"Use params, adapters = decompose\(model, config\)"):
        fl.init(model, wanted)
    params, adapters = decompose(model, wanted, **({"quantize": packed} if kind == "loftq" else {}))
    with pytest.raises(UnsupportedError, match="quantised weights" if kind == "loftq" else "relative_to_original"):
        fl.save_peft(tmp_path / "new", adapters, wanted)
    assert not (tmp_path / "new").exists()
    fl.save_peft(tmp_path, adapters, wanted.replace(init_lora_weights=True))  # with params as the base
    assert fl.load_peft(tmp_path, model)[1].r == 3
    del params


def test_the_export_refuses_what_is_not_exact_or_not_of_one_training() -> None:
    model = two_layers()
    _, initial = decompose(model, config())
    with pytest.raises(UnsupportedError, match="error of full rank"):
        relative_to_original(initial, initial, config(init_lora_weights="loftq"))
    with pytest.raises(ConfigError, match="already relative to them"):
        relative_to_original(initial, initial, config(init_lora_weights=True))
    with pytest.raises(ParamsError, match=r"'2.weight' has a rule in one of adapters and initial"):
        relative_to_original(initial, {"0.weight": initial["0.weight"]}, config())
    _, other = decompose(model, config(r=4, lora_alpha=8))
    with pytest.raises(ParamsError, match="another rule, rank or scaling"):
        relative_to_original(initial, other, config())
    _, other = decompose(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8)), config())
    with pytest.raises(ParamsError, match="not of one model"):
        relative_to_original(initial, other, config())


@pytest.mark.parametrize(
    ("fields", "options", "kind", "message"),
    [
        ({"init_lora_weights": True}, {}, ConfigError, "does not change the base weights. decompose supports 'pissa'"),
        ({"init_lora_weights": "eva"}, {}, ConfigError, "use init or init_eva"),
        ({}, {"iterations": 2}, ConfigError, "for 'loftq' only; 'pissa' has no options"),
        ({}, {"quantize": packed}, ConfigError, "for 'loftq' only; 'pissa' has no options"),
        ({"init_lora_weights": "loftq"}, {"iterations": 0}, ConfigError, "expected a positive integer, got 0"),
        ({"init_lora_weights": "loftq"}, {"quantize": lambda w: w.double()}, ParamsError, "turned '0.weight'"),
        ({"r": 9}, {}, ConfigError, "'2.weight' is a matrix of 8 x 10, which has fewer than 9 directions"),
        ({"init_lora_weights": "olora", "r": 9}, {}, ConfigError, "Give it a rank of at most 8"),
    ],
)  # fmt: skip
def test_bad_options(fields: dict[str, Any], options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        decompose(two_layers(), config(**fields), **options)


def test_weights_that_cannot_be_split() -> None:
    model = two_layers()
    params = fl.base_params(model)
    with pytest.raises(ParamsError, match=r"'0.weight' is on the meta device"):
        decompose(model, config(), params=params | {"0.weight": params["0.weight"].to("meta")})
    with pytest.raises(NonFiniteError, match=r"'2.weight' holds NaN or infinity"):
        decompose(model, config(), params=params | {"2.weight": params["2.weight"] * float("nan")})
    low = torch.ones(10, 1) @ torch.arange(12.0)[None]
    for kind in ("pissa", "pissa_niter_2"):
        with pytest.raises(ParamsError, match=r"has a rank below r=3\. Some directions would be zero"):
            decompose(model, config(init_lora_weights=kind), params=params | {"0.weight": low})
    new, adapters = decompose(model, config(init_lora_weights="olora"), params=params | {"0.weight": low})
    close(fl.merge(new, adapters)["0.weight"], low, 1e-5)


def test_a_tied_weight_is_no_longer_tied() -> None:
    model: Any = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False))
    model[1].weight = model[0].weight
    wanted = config(target_modules=["1"])
    with pytest.warns(TiedWeightsWarning, match=r"'0.weight', '1.weight' are one tied parameter"):
        params, adapters = decompose(model, wanted)
    x = torch.tensor([1, 5])
    close(fl.apply(model, params, adapters, x), model(x), 1e-5)


def test_training_goes_on_from_the_new_base() -> None:
    model, wanted = two_layers(), config()
    params, adapters = decompose(model, wanted)
    x, y = torch.randn(16, 12), torch.randn(16, 4)
    optimizer = fl.optim.adamw(1e-2)
    step = fl.train_step(model, lambda bound, batch: (bound(batch[0]) - batch[1]).square().mean(), optimizer)
    state, losses = optimizer.init(adapters), []
    trained: Any = adapters
    for _ in range(20):
        trained, state, metrics = step(params, trained, state, (x, y))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    plain, _ = relative_to_original(trained, adapters, wanted)
    close(fl.apply(model, fl.base_params(model), plain, x), fl.apply(model, params, trained, x), 1e-5)


@pytest.mark.parametrize("kind", ["pissa", "loftq"])
def test_weights_that_the_adapter_ties_stay_tied(kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **sizes)).eval()
    wanted = config(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, init_lora_weights=kind)
    params, adapters = decompose(model, wanted)
    ids = torch.arange(6)[None]
    out = fl.apply(model, params, adapters, ids).logits
    assert params["lm_head.weight"] is params["model.embed_tokens.weight"]
    if kind == "pissa":
        close(out, model(ids).logits, 1e-5)
        plain, _ = relative_to_original(moved(adapters), adapters, wanted)
        expected = fl.apply(model, params, moved(adapters), ids).logits
        close(fl.apply(model, fl.base_params(model), plain, ids).logits, expected, 1e-5)
