"""EVA: the ranks and subspaces that PEFT finds, and the principal components of what the layers read."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import gen
from oracle import close, snapshot
from torch import Tensor, nn

import funclora as fl
from funclora._init.eva import label_mask
from funclora._torch.linalg import IncrementalPca
from funclora.errors import ConfigError, NonFiniteError, ParamsError, UnsupportedError

# Its rules are LoRA or DoRA, which the type checker does not know.
init_eva: Any = fl.init_eva
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return uneven(LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes)).eval())


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return uneven(GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes)).eval())


def uneven(model: Any) -> Any:
    """The model with hidden units of different importance, so that components are told apart by a few batches."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8 * 0.75 ** torch.arange(parameter.shape[1])
    return model


def token_batches(n: int = 6) -> list[dict[str, Tensor]]:
    """Batches with padding, and with labels that leave tokens out."""
    batches = []
    for i in range(n):
        ids = torch.randint(40, (8, 20), generator=gen(i))
        attended = torch.ones_like(ids)
        attended[: i + 1, 15:] = 0
        labels = ids.masked_fill(torch.rand(ids.shape, generator=gen(100 + i)) < 0.3, -100)
        batches.append({"input_ids": ids, "attention_mask": attended, "labels": labels})
    return batches


def config(**fields: Any) -> fl.LoraConfig:
    usual: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "eva"}
    return fl.LoraConfig(**usual | fields)


def in_peft(model: nn.Module, wanted: fl.LoraConfig, batches: list[Any], **options: Any) -> Any:
    """PEFT's model after its EVA initialisation, on a copy."""
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
    fields = {name: copy.deepcopy(getattr(wanted, name)) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(model),
            peft.LoraConfig(
                **fields, target_modules=list(wanted.target_modules or ()), eva_config=peft.EvaConfig(**options),
                fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            ),
        )  # fmt: skip
        peft.initialize_lora_eva_weights(theirs, [dict(batch) for batch in batches], show_progress_bar=False)
    return theirs


# --- PEFT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({}, {"rho": 1.0}),
        ({}, {"rho": 3.0, "tau": 0.9}),
        # Of layers that read the same, PEFT whitens the one matrix that they share again and again.
        ({"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}, {"whiten": True}),
        ({}, {"adjust_scaling_factors": False}),
        ({"use_rslora": True}, {}),
        ({"rank_pattern": {"q_proj": 2, "down_proj": 5}, "alpha_pattern": {"k_proj": 3}}, {}),
        ({"r": 1}, {}),
    ],
    ids=str,
)
def test_ranks_subspaces_and_scalings_are_those_of_peft(fields: dict[str, Any], options: dict[str, Any]) -> None:
    model, wanted, batches = llama(), config(**fields), token_batches()
    theirs = in_peft(model, wanted, batches, **options)
    ours = dict(options)
    if "adjust_scaling_factors" in ours:
        ours["adjust_scaling"] = ours.pop("adjust_scaling_factors")
    adapters, _ = init_eva(model, wanted, batches, **ours)
    found = {
        f"{name}.weight": module
        for name, module in theirs.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapters.keys() == found.keys()
    assert len({rule.r for rule in adapters.values()}) > 1 or "rho" in options
    for name, rule in adapters.items():
        assert isinstance(rule, fl.LoRA)
        a = found[name].lora_A["default"].weight.data
        assert rule.a.shape == a.shape
        assert not rule.b.any()
        signs = (rule.a * a).sum(1).sign()
        # PEFT looks for 2·n components by random projection; where the layer has no more, that is exact.
        close(rule.a, signs[:, None] * a, 1e-3 if wanted.r > 1 else 0.02)
        assert rule.scaling == pytest.approx(found[name].scaling["default"])


def test_transformers_conv1d_too() -> None:
    model, wanted, batches = gpt2(), config(target_modules=["c_attn", "c_fc"], r=3), token_batches()
    theirs = in_peft(model, wanted, batches)
    adapters, _ = init_eva(model, wanted, batches)
    for name, rule in adapters.items():
        a = theirs.base_model.model.get_submodule(name.removesuffix(".weight")).lora_A["default"].weight.data
        close(rule.a.mT @ rule.a, a.mT @ a, 1e-3)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}],
                         ids=str)  # fmt: skip
def test_the_configuration_says_the_ranks_to_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    model, batches = llama(), token_batches()
    adapters, found = init_eva(model, config(r=1, **fields), batches, generator=gen(0))
    assert found.init_lora_weights is True
    trained = torch.utils._pytree.tree_map(lambda leaf: leaf + 0.1 * torch.randn_like(leaf), adapters)
    fl.save_peft(tmp_path, trained, found)
    again, loaded = fl.load_peft(tmp_path, model)
    assert {n: rule.r for n, rule in again.items() if rule.r} == {n: rule.r for n, rule in adapters.items() if rule.r}
    assert loaded.rank_pattern == found.rank_pattern
    ids = batches[0]["input_ids"]
    expected = fl.apply(model, fl.base_params(model), trained, ids).logits
    close(peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()(ids).logits, expected, 1e-5)


def test_a_folder_that_peft_has_initialised_by_eva_loads(tmp_path: Path) -> None:
    model, batches = llama(), token_batches()
    theirs = in_peft(model, config(), batches).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter)
    theirs.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["eva_config"]["rho"] == 2
    adapters, loaded = fl.load_peft(tmp_path, model)
    ids = batches[0]["input_ids"]
    expected = theirs(ids).logits
    close(fl.apply(model, fl.base_params(model), adapters, ids).logits, expected, 1e-5)
    fl.save_peft(tmp_path / "again", adapters, loaded)
    close(peft.PeftModel.from_pretrained(llama(), str(tmp_path / "again")).eval()(ids).logits, expected, 1e-5)


# --- principal components ---------------------------------------------------------------------------------------


def components(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The principal components of rows, and their shares in the variance, by one decomposition of all."""
    _, s, vh = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    return vh[:n], (s.square() / s.square().sum())[:n]


def test_batches_have_the_components_of_all_rows_where_nothing_is_cut_off() -> None:
    rows = (torch.randn(90, 6) + 3) * torch.arange(1, 7)
    pca = IncrementalPca("w", 6, gen(0))
    for batch in rows.split([20, 40, 30]):
        pca.update(batch)
    vh, shares = components(rows, 6)
    assert pca.components is not None
    close(pca.components.abs(), vh.abs().float(), 1e-4)
    close(pca.explained, shares, 1e-5)
    assert (pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_large_inputs_are_decomposed_at_random_and_nearly_as_well() -> None:
    rows = torch.randn(300, 64) * 0.7 ** torch.arange(64)
    pca, again = IncrementalPca("w", 3, gen(0)), IncrementalPca("w", 3, gen(0))
    for batch in rows.split(100):
        pca.update(batch)
        again.update(batch)
    vh, shares = components(rows, 3)
    assert pca.components is not None
    assert again.components is not None
    assert torch.equal(pca.components, again.components)
    close((pca.components.double() @ vh.mT).abs(), torch.eye(3, dtype=torch.float64), 1e-2)
    close(pca.explained, shares, 1e-3)


def mlp(n: int = 12) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(n, n), nn.Dropout(0.9), nn.BatchNorm1d(n), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 4)
    )


def mlp_batches(n: int = 12) -> list[Tensor]:
    return [torch.randn(200, n, generator=gen(i)) * 0.8 ** torch.arange(n) for i in range(3)]


def test_a_holds_the_leading_components_of_what_the_layer_reads() -> None:
    model, batches = mlp().train(), mlp_batches()
    params = fl.base_params(model)
    unchanged = snapshot(model, params)
    wanted = config(r=2, target_modules=["0", "3"])
    adapters, _ = init_eva(model, wanted, batches, tau=0.9999, params=params)
    unchanged()
    assert model.training
    quiet: Any = copy.deepcopy(model).eval()
    for name, upto in (("0.weight", 0), ("3.weight", 3)):
        rule = adapters[name]
        assert isinstance(rule, fl.LoRA)
        vh, _ = components(torch.cat([quiet[:upto](batch) for batch in batches]).detach(), rule.r)
        close((rule.a.double() @ vh.mT).abs(), torch.eye(rule.r, dtype=torch.float64), 0.05)
        close(rule.a @ rule.a.mT, torch.eye(rule.r), 1e-5)
    x = batches[0]
    assert torch.equal(fl.apply(quiet, fl.base_params(quiet), adapters, x), quiet(x))


def test_the_budget_goes_where_the_variance_is_concentrated() -> None:
    model: Any = nn.ModuleDict({"flat": nn.Linear(8, 8), "steep": nn.Linear(8, 8)})
    steep = 0.55 ** torch.arange(8)

    def forward(bound: Any, x: Tensor) -> None:
        bound["flat"](x)
        bound["steep"](x * steep)

    batches = [torch.randn(4000, 8, generator=gen(0))] * 3
    wanted = config(r=1, target_modules=["flat", "steep"], bias="lora_only")
    adapters, found = init_eva(model, wanted, batches, forward=forward)
    assert adapters.keys() == {"steep.weight", "steep.bias"}  # its shares are 0.7, 0.2 ... against 1/8 each
    assert adapters["steep.weight"].r == 2
    assert adapters["steep.weight"].scaling == 6
    assert found.r == 2
    assert fl.init(model, found).keys() == adapters.keys()
    kept, _ = init_eva(model, wanted, batches, forward=forward, rho=1.0)
    assert {name: rule.r for name, rule in kept.items() if rule.r} == {"flat.weight": 1, "steep.weight": 1}


def test_the_mask_leaves_positions_out() -> None:
    model, batches = llama(), token_batches()
    everything, _ = init_eva(model, config(), batches, mask=lambda batch: None)
    default, _ = init_eva(model, config(), batches)
    by_hand, _ = init_eva(
        model, config(), batches, mask=lambda batch: batch["attention_mask"].bool() & (batch["labels"] != -100)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(default[name].a, by_hand[name].a)
    assert not torch.allclose(default[name].a[:1], everything[name].a[:1])
    assert label_mask(torch.ones(2)) is None
    assert label_mask({"input_ids": torch.ones(2, 3)}) is None


def test_dtypes_tuples_and_loaders() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x + y)

    data = torch.utils.data.TensorDataset(torch.randn(64, 6).bfloat16(), torch.randn(64, 6).bfloat16())
    wanted = config(r=2, target_modules=["layer"])
    adapters, _ = init_eva(Two().bfloat16(), wanted, torch.utils.data.DataLoader(data, 32), tau=0.8)
    rule = adapters["layer.weight"]
    assert isinstance(rule, fl.LoRA)
    assert rule.a.dtype == rule.b.dtype == torch.float32
    half, _ = init_eva(Two(), wanted, [(torch.randn(32, 6), torch.randn(32, 6))] * 2, tau=0.5, dtype=torch.bfloat16)
    assert half["layer.weight"].a.dtype == torch.bfloat16


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"init_lora_weights": True}, {}, "init_eva expected 'eva', got True"),
        ({}, {"rho": 0.5}, "rho: expected a number from 1 up, got 0.5"),
        ({}, {"tau": 2}, "tau: expected a cosine between 0 and 1, got 2"),
        ({}, {"max_batches": 1}, "max_batches: expected an integer from 2 up, got 1"),
    ],
)
def test_bad_options(fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    wanted = config(target_modules=["0"], **fields)
    with pytest.raises(ConfigError, match=message):
        init_eva(mlp(), wanted, mlp_batches(), **options)


def test_init_says_where_to_go() -> None:
    with pytest.raises(ConfigError, match=r"Use adapters, config = init_eva\(model, config, batches\)"):
        fl.init(mlp(), config(target_modules=["0"]))


def test_data_that_says_too_little() -> None:
    model, wanted = mlp(), config(target_modules=["0", "3"])
    with pytest.raises(ParamsError, match="batches: there are none"):
        init_eva(model, wanted, [])
    with pytest.raises(ParamsError, match="batches: they ended before the components converged"):
        init_eva(model, wanted, iter(mlp_batches()[:2]), tau=1.0)
    with pytest.raises(ParamsError, match=r"'0.weight' has 5 inputs in the first batch, too few for 8 components"):
        init_eva(model, wanted, [torch.randn(5, 12)])
    with pytest.raises(ParamsError, match=r"'0.weight' always has the same input"):
        init_eva(model, wanted, [torch.ones(50, 12)])
    with pytest.raises(NonFiniteError, match=r"'0.weight' has inputs that are NaN or infinity"):
        init_eva(model, wanted, [torch.full((50, 12), float("nan"))])
    with pytest.raises(ParamsError, match=r"'3.weight' is not used on the first batch"):
        init_eva(model, wanted, mlp_batches(), forward=lambda bound, x: bound[0](x))
    with pytest.raises(ParamsError, match=r"mask: '0.weight' has inputs of shape \[200, 12\]"):
        init_eva(model, wanted, mlp_batches(), mask=lambda batch: torch.ones(3, dtype=torch.bool))
    noise = (torch.randn(30, 12) for _ in range(100))
    with pytest.raises(ConfigError, match=r"max_batches: after 5 batches the components of the inputs of '0.weight'"):
        init_eva(model, wanted, noise, tau=1.0, max_batches=5)


def test_small_batches_after_the_first_are_left_out() -> None:
    batches = mlp_batches()
    wanted = config(r=2, target_modules=["0"])
    one, _ = init_eva(mlp(), wanted, batches)
    other, _ = init_eva(mlp(), wanted, [batches[0], batches[0][:2] * 100, *batches[1:]])
    assert torch.equal(one["0.weight"].a, other["0.weight"].a)


@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")
def test_layers_that_are_no_linear_ones_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match=r"'0.weight' is a weight of Embedding; EVA supports linear layers only"):
        init_eva(model, config(target_modules=["0", "1"], r=1), [torch.arange(5)])

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.layer.weight.sum() if x.shape[0] == 3 else x @ self.layer.weight

    for n in (3, 9):  # read as a whole, and the wrong way round
        with pytest.raises(UnsupportedError, match=r"'layer.weight' is not only used as a linear layer"):
            init_eva(Odd(), config(target_modules=["layer"], r=1), [torch.randn(n, 4)])
