"""PEFT's bugs and sharp edges: for each, what PEFT does, and what happens here instead.

What PEFT does is asserted too, so that a test fails when a new version has mended it and the difference can go.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import gen, gpt2_conv1d, llama
from oracle import distance
from peft_oracle import IDS, Net, Row, build, close, logits, peft_loads, random_adapters, random_peft, save_quietly
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funclora as fl
from funclora import DoRA, Full, LoRA, LoraConfig, Tied
from funclora.errors import ConfigError, FormatError, NonFiniteError, PeftFormatWarning, TargetError, UnsupportedError

TWO = ["q_proj", "v_proj"]


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrap(model: nn.Module, name: str = "default", **config: Any) -> Any:
    with quietly():
        return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{"r": 2} | config), adapter_name=name)


def tied_llama() -> Any:
    model = llama().double().eval()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def shaken(tree: Any) -> Any:
    noise = gen(9)
    return pytree.tree_map(
        lambda x: x + torch.randn(x.shape, generator=noise, dtype=torch.float64).to(x.dtype) / 3, tree
    )


class One(nn.Module):
    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kept"), [("layers", 0), ("q_proj", 4), ("a", 8), ("style", 8)])
def test_a_name_that_is_part_of_a_path_loses_nothing(name: str, kept: int, tmp_path: Path) -> None:
    """PEFT finds tensors by the adapter's name, and with "layers" beside it saves an empty file."""
    model = Net()
    wrapped = wrap(model, target_modules=TWO)
    with quietly():
        wrapped.add_adapter(name, peft.LoraConfig(r=2, target_modules=TWO))
        wrapped.save_pretrained(tmp_path / "peft", selected_adapters=["default"])
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(theirs) == kept

    config = LoraConfig(r=2, target_modules=TWO)
    fl.save_peft(tmp_path / name, fl.init(model, config), config)  # a folder's name is no part of its keys
    assert len(load_file(tmp_path / name / "adapter_model.safetensors")) == 8


def test_many_full_names_become_suffixes_and_mean_the_same(tmp_path: Path) -> None:
    """PEFT rewrites 20 and more targets of "all-linear" to the shortest list of suffixes."""
    row = Row("wide", {"target_modules": "all-linear"},
              lambda: nn.ModuleDict({"layers": nn.ModuleList([Net().layers[0] for _ in range(6)])}))  # fmt: skip
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(saved) < 24
    assert len(fl.load_peft(tmp_path, model)[0]) == 24


def test_names_of_an_older_mixtral_are_read_as_peft_rewrites_them(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    def make() -> nn.Module:
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=17, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, num_local_experts=3, bos_token_id=0, eos_token_id=16, initializer_range=0.3,
                attn_implementation="eager", experts_implementation="eager",
            )
        )  # fmt: skip

    row = Row("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}, make)
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)
    adapters, config = fl.load_peft(tmp_path, model)
    assert config.rank_pattern == {r".*\.gate_up_proj": 4}
    close(logits(fl.apply(model, fl.base_params(model), adapters, IDS)), logits(wrapped(IDS)))


def test_the_order_of_patterns_is_kept(tmp_path: Path) -> None:
    """PEFT sorts them on disk, and with other ranks cannot load what it saved."""
    full = "layers.0.q_proj"
    row = Row("order", {"target_modules": TWO, "rank_pattern": {"q_proj": 3, full: 5}})
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path / "theirs")
    with quietly(), pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs")
    with pytest.raises(FormatError, match="PEFT sorts rank_pattern when it saves"):
        fl.load_peft(tmp_path / "theirs", model)

    adapters, config = random_adapters(row, model)
    fl.save_peft(tmp_path / "ours", adapters, config)
    assert fl.load_peft(tmp_path / "ours", model)[1] == config


def test_fan_in_fan_out_follows_from_each_layer(tmp_path: Path) -> None:
    """PEFT's field has room for one kind, and it flips it at each layer of the other."""
    row = Row("mixed", {"target_modules": ["0", "1", "2"]},
              lambda: nn.Sequential(nn.Linear(4, 5), gpt2_conv1d(), nn.Linear(3, 2)),
              torch.randn((2, 4), generator=gen(1)).double())  # fmt: skip
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)
    adapters, config = fl.load_peft(tmp_path, model)
    close(fl.apply(model, fl.base_params(model), adapters, row.x), wrapped(row.x))
    for flag in (True, False):
        raw = json.loads((tmp_path / "adapter_config.json").read_text()) | {"fan_in_fan_out": flag}
        (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
        close(fl.apply(model, fl.base_params(model), fl.load_peft(tmp_path, model)[0], row.x), wrapped(row.x))
    fl.save_peft(tmp_path / "ours", adapters, config)
    with quietly():
        ours = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    close(ours(row.x), wrapped(row.x))


def test_an_adapter_file_does_not_overwrite_the_base(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    row = Row("plain", {"target_modules": TWO})
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.head.bias": torch.full((3,), 9.0).double()}, file)
    assert peft_loads(model, tmp_path).base_model.model.head.bias.tolist() == [9, 9, 9]
    with pytest.raises(FormatError, match=r"holds other values than 'head\.bias' has"):
        fl.load_peft(tmp_path, model)


def test_a_missing_half_is_no_adapter_without_effect(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    row = Row("plain", {"target_modules": TWO})
    model = build(row)
    save_quietly(random_peft(row, model), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lora_A" in key}, file)
    with quietly():
        close(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()(IDS), model(IDS))
    with pytest.raises(FormatError, match=r"there is no '.*lora_B.weight'"):
        fl.load_peft(tmp_path, model)


def test_an_unused_target_is_an_error() -> None:
    wrap(Net(), target_modules=["q_proj", "k_proj"])  # silently
    with pytest.raises(TargetError, match="'k_proj' matches no module"):
        fl.init(Net(), LoraConfig(target_modules=["q_proj", "k_proj"]))


def test_layers_that_are_replicated_are_not_read(tmp_path: Path) -> None:
    model = llama()
    save_quietly(wrap(model, target_modules=TWO, layer_replication=[[0, 2], [1, 2]]), tmp_path)
    with pytest.raises(UnsupportedError, match=r"layer_replication=\[\[0, 2\], \[1, 2\]\] is not supported"):
        fl.load_peft(tmp_path, model)


# --- numbers ---------------------------------------------------------------------------------------------------


def test_dropout_leaves_lookups_alone(tmp_path: Path) -> None:
    row = Row("embedding", {"target_modules": ["embed"], "lora_dropout": 0.9})
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)
    adapters, _ = fl.load_peft(tmp_path, model)
    close(fl.apply(model.train(), fl.base_params(model), adapters, IDS), wrapped.train()(IDS))


def test_a_padding_token_trains_nothing() -> None:
    """PEFT lets it reach B; the dense formula, `F.embedding(ids, W + s·BA, padding_idx)`, has no such gradient."""
    model = One(nn.Embedding(5, 3, padding_idx=1)).double()
    ids = torch.tensor([[1, 1]])
    theirs = wrap(model, target_modules=["layer"], init_lora_weights=False)
    theirs(ids).square().sum().backward()
    layer = theirs.base_model.model.layer
    assert layer.lora_embedding_A["default"].grad.abs().sum() == 0
    assert layer.lora_embedding_B["default"].grad.abs().sum() > 0
    adapters = fl.init(model, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    grads = torch.func.grad(lambda a: fl.apply(model, fl.base_params(model), a, ids).square().sum())(adapters)
    assert all(leaf.abs().sum() == 0 for leaf in pytree.tree_leaves(grads))


def test_a_scaled_table_scales_the_update_too(tmp_path: Path) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    row = Row("scaled", {"target_modules": ["layer"]},
              lambda: One(Gemma3TextScaledWordEmbedding(11, 4, 0, embed_scale=3.0)))  # fmt: skip
    model = build(row)
    wrapped = random_peft(row, model)
    save_quietly(wrapped, tmp_path)
    adapters, config = fl.load_peft(tmp_path, model)
    close(fl.apply(model, fl.base_params(model), adapters, IDS), wrapped(IDS))
    fl.save_peft(tmp_path, adapters, config)
    close(peft_loads(model, tmp_path)(IDS), wrapped(IDS))


def test_a_row_of_zeros_stays_zero_under_dora() -> None:
    model = One(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model.layer.weight[0] = 0
    x = torch.ones(1, 3)
    assert wrap(model, target_modules=["layer"], use_dora=True)(x)[0, 0].isnan()
    adapters = fl.init(model, LoraConfig(target_modules=["layer"], use_dora=True))
    y = fl.apply(model, fl.base_params(model), adapters, x)
    assert y[0, 0] == 0
    assert y.isfinite().all()


def test_dropout_of_dora_leaves_the_base_alone() -> None:
    """With B = 0 and m off its norm PEFT drops inputs of the base weight, funclora those of the low-rank path only."""
    model = One(nn.Linear(6, 4)).double()
    x = torch.randn(3, 6).double()
    theirs = wrap(model, target_modules=["layer"], use_dora=True, lora_dropout=0.5)
    with torch.no_grad():
        theirs.base_model.model.layer.lora_magnitude_vector["default"].weight.mul_(2)
    assert distance(theirs.train()(x), theirs.eval()(x)) > 1e-2
    rule: Any = fl.init(model, LoraConfig(target_modules=["layer"], use_dora=True, lora_dropout=0.5))["layer.weight"]
    adapters = {"layer.weight": DoRA(rule.a, rule.b, 2 * rule.magnitude, scaling=rule.scaling, dropout=0.5)}
    params = fl.base_params(model)
    close(fl.apply(model.train(), params, adapters, x), theirs(x))


def test_magnitudes_are_not_rounded_to_the_base() -> None:
    model = One(nn.Linear(300, 20)).bfloat16()
    exact = model.layer.weight.double().norm(dim=1)
    theirs = wrap(model, target_modules=["layer"], use_dora=True).base_model.model.layer
    ours: Any = fl.init(model, LoraConfig(target_modules=["layer"], use_dora=True))["layer.weight"]
    rounded = (theirs.lora_magnitude_vector["default"].weight.double() - exact).abs().max()
    assert (ours.magnitude.double() - exact).abs().max() < 1e-6 < 1e-4 < rounded


def test_two_dora_adapters_have_no_order() -> None:
    model = One(nn.Linear(4, 3)).double()
    x, params = torch.randn(2, 4).double(), fl.base_params(model)
    config = LoraConfig(r=2, target_modules=["layer"], use_dora=True)
    one, two = (shaken(fl.init(model, config, generator=gen(i))) for i in range(2))
    weights = torch.tensor([[0.3, 0.7], [1.0, 1.0]]).double()
    forth = fl.apply(model, params, fl.route(fl.stack([one, two]), weights=weights), x)
    back = fl.apply(model, params, fl.route(fl.stack([two, one]), weights=weights.flip(1)), x)
    close(forth, back)


def test_an_overflowing_merge_raises() -> None:
    model = One(nn.Linear(2, 2, bias=False)).half()
    theirs = wrap(model, target_modules=["layer"])
    with torch.no_grad():
        theirs.base_model.model.layer.lora_A["default"].weight.fill_(1)
        theirs.base_model.model.layer.lora_B["default"].weight.fill_(1e5)
    assert not theirs.merge_and_unload().layer.weight.isfinite().all()
    rule = LoRA(torch.ones(1, 2), torch.full((2, 1), 1e5))
    with pytest.raises(NonFiniteError, match=r"merging 'layer\.weight' gives NaN or infinity before rounding|infinity"):
        fl.merge(fl.base_params(model), {"layer.weight": rule})


def test_to_merge_and_to_go_back_leaves_no_trace() -> None:
    model = One(nn.Linear(64, 64)).bfloat16()
    base = model.layer.weight.clone()
    theirs = wrap(model, target_modules=["layer"], init_lora_weights=False)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    assert not torch.equal(theirs.base_model.model.layer.base_layer.weight, base)
    params = fl.base_params(model)
    fl.merge(params, fl.init(model, LoraConfig(target_modules=["layer"], init_lora_weights=False)))
    assert torch.equal(params["layer.weight"], base)


@pytest.mark.parametrize(("layer", "shape"), [
    (lambda: nn.Conv1d(4, 4, 3, groups=2), (2, 4, 8)),
    (lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="circular"), (2, 4, 8)),
    (lambda: nn.Conv1d(4, 3, 3, dilation=2), (2, 4, 8)),
], ids=["groups", "padding_mode", "dilation"])  # fmt: skip
def test_convolutions_equal_their_merge(layer: Any, shape: tuple[int, ...]) -> None:
    """PEFT raises in the merge (groups) or in forward (dilation), or gives another output after it (padding mode)."""
    model = One(layer()).double()
    x, params = torch.randn(shape).double(), fl.base_params(model)
    theirs = wrap(model, target_modules=["layer"], init_lora_weights=False).eval()
    agrees = False
    try:
        before = theirs(x)
        agrees = torch.allclose(theirs.merge_and_unload()(x), before)
    except (RuntimeError, NotImplementedError):
        pass
    assert not agrees
    adapters = fl.init(model, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    merged = torch.func.functional_call(model, fl.merge(params, adapters), (x,))
    close(fl.apply(model, params, adapters, x), merged)
    with pytest.raises(UnsupportedError, match="cannot be saved for PEFT"):
        fl.save_peft("unused", adapters, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))


# --- biases ----------------------------------------------------------------------------------------------------


def test_lora_bias_without_a_bias_is_refused(tmp_path: Path) -> None:
    """PEFT trains such an adapter, and then cannot merge it."""
    model = Net().double()
    theirs = wrap(model, target_modules=["v_proj"], lora_bias=True)
    save_quietly(theirs, tmp_path)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        theirs.merge_and_unload()
    with pytest.raises(TargetError, match=r"'layers\.0\.v_proj' has no bias to which the bias of B could be merged"):
        fl.load_peft(tmp_path, model)


def test_lora_bias_beside_trained_biases_is_refused(tmp_path: Path) -> None:
    """PEFT trains both, though only their sum has an effect."""
    model = Net()
    save_quietly(wrap(model, target_modules=["q_proj"], lora_bias=True, bias="lora_only"), tmp_path)
    with pytest.raises(FormatError, match="would train the biases of the targets twice"):
        fl.load_peft(tmp_path, model)


def test_two_adapters_may_train_biases() -> None:
    """PEFT allows one, because it trains the model's own."""
    model = Net().double()
    config = LoraConfig(r=2, target_modules=TWO, bias="all")
    theirs = wrap(model, target_modules=TWO, bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=TWO, bias="all"))
    members = [shaken(fl.init(model, config, generator=gen(i))) for i in range(2)]
    params = fl.base_params(model)
    actual = fl.apply(model, params, fl.route(fl.stack(members), [1, 0]), IDS)
    for row, i in enumerate([1, 0]):
        close(actual[row : row + 1], fl.apply(model, params, members[i], IDS[row : row + 1]))
    close(fl.apply(model, params, {}, IDS), model(IDS))  # without an adapter: the base, biases included


# --- tied embeddings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_one_of_two_tied_weights_changes_that_one(target: str) -> None:
    """PEFT adds the update to the tensor that both share, and the merged model is another one."""
    model = tied_llama()
    theirs = wrap(model, target_modules=[target], init_lora_weights=False).eval()
    before = theirs(IDS).logits
    with quietly():
        assert distance(theirs.merge_and_unload()(IDS).logits, before) > 1e-2
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    params, adapters = fl.base_params(model), fl.init(model, config)
    with quietly():
        merged = fl.merge(params, adapters)
    close(torch.func.functional_call(model, merged, (IDS,), tie_weights=False).logits,
          fl.apply(model, params, adapters, IDS).logits)  # fmt: skip


def ensured(**fields: Any) -> tuple[Any, dict[str, Any], LoraConfig]:
    model = tied_llama()
    config = LoraConfig(**{"r": 2, "ensure_weight_tying": True} | fields)
    return model, shaken(fl.init(model, config, generator=gen(1))), config


@pytest.mark.parametrize("fields", [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head", "q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    {"target_modules": r".*(embed_tokens|q_proj)", "alpha_pattern": {"q_proj": 3}},
], ids=["table", "output", "expression"])  # fmt: skip
@pytest.mark.parametrize("fold", [False, True])
def test_a_tied_update_goes_to_peft_and_comes_back(fields: dict[str, Any], fold: bool, tmp_path: Path) -> None:
    model, adapters, config = ensured(**fields)
    params = fl.base_params(model)
    assert adapters["lm_head.weight"].to == "model.embed_tokens.weight"
    fl.save_peft(tmp_path, adapters, config, fold_scaling=fold)
    expected = fl.apply(model, params, adapters, IDS).logits
    with quietly():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    close(theirs(IDS).logits, expected)
    loaded, changed = fl.load_peft(tmp_path, model)
    assert isinstance(loaded["lm_head.weight"], Tied)
    close(fl.apply(model, params, loaded, IDS).logits, expected)
    fl.save_peft(tmp_path, loaded, changed)
    assert fl.load_peft(tmp_path, model)[1] == changed


def test_a_tied_update_is_merged_once(tmp_path: Path) -> None:
    """PEFT adds it twice, once for each of the two layers."""
    model, adapters, config = ensured(target_modules=["embed_tokens"])
    fl.save_peft(tmp_path, adapters, config)
    with quietly():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        twice = theirs.merge_and_unload().state_dict()["lm_head.weight"]
    base, params = model.lm_head.weight, fl.base_params(model)
    merged = fl.merge(params, adapters)  # a warning of the tie would be an error
    close(twice - base, 2 * (merged["lm_head.weight"] - base))
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    close(torch.func.functional_call(model, merged, (IDS,)).logits, fl.apply(model, params, adapters, IDS).logits)


def test_a_tied_update_has_one_gradient(tmp_path: Path) -> None:
    """PEFT has two parameters over one memory: each gets part of the gradient and an optimizer step of its own."""
    model, adapters, config = ensured(target_modules=["embed_tokens"])
    fl.save_peft(tmp_path, adapters, config)
    with quietly():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, is_trainable=True).eval()
    theirs(IDS).logits.square().sum().backward()
    grads = {n.split(".lora_")[1]: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    ours: Any = fl.value_and_grad(lambda bound: bound(IDS).logits.square().sum())(
        model, fl.base_params(model), adapters
    )[1]["model.embed_tokens.weight"]
    close(ours.a, grads["embedding_A.default"] + grads["B.default.weight"].T)
    close(ours.b, grads["embedding_B.default"] + grads["A.default.weight"].T)


def test_a_tie_that_peft_lost_is_an_error(tmp_path: Path) -> None:
    """In half precision PEFT keeps two copies, which training moves apart."""
    model = tied_llama().bfloat16()
    theirs = wrap(model, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    save_quietly(theirs, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a = tensors["base_model.model.lm_head.lora_A.weight"]
    assert a.dtype == torch.float32
    moved = a + 1
    from safetensors.torch import save_file

    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": moved}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="tied by ensure_weight_tying, but have other values"):
        fl.load_peft(tmp_path, model)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    raw |= {"ensure_weight_tying": False, "target_modules": ["embed_tokens", "lm_head"]}  # as the message says
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    adapters, _ = fl.load_peft(tmp_path, model)
    assert all(isinstance(adapters[name], LoRA) for name in ("lm_head.weight", "model.embed_tokens.weight"))


def test_a_request_to_tie_what_is_not_tied(tmp_path: Path) -> None:
    """PEFT only warns; so does reading, because the outputs are PEFT's. A new adapter is refused."""
    model = llama()
    save_quietly(wrap(model, target_modules=["q_proj"], ensure_weight_tying=True), tmp_path)
    with pytest.warns(PeftFormatWarning, match="ensure_weight_tying has no effect"):
        _, config = fl.load_peft(tmp_path, model)
    assert not config.ensure_weight_tying
    with pytest.raises(TargetError, match="ties no weight"):
        fl.init(model, LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))


def test_tables_that_peft_does_not_know_are_not_tied_in_files(tmp_path: Path) -> None:
    """PEFT looks for embed_tokens and lm_head by name, so GPT-2's wte it would read without the tie."""
    from cases import gpt2

    model = gpt2().eval()
    config = LoraConfig(r=2, target_modules=["wte"], ensure_weight_tying=True)
    adapters = shaken(fl.init(model, config))
    merged = fl.merge(fl.base_params(model), adapters)
    close(torch.func.functional_call(model, merged, (IDS,)).logits,
          fl.apply(model, fl.base_params(model), adapters, IDS).logits, 1e-5)  # fmt: skip
    with pytest.raises(UnsupportedError, match="PEFT ties embed_tokens and lm_head only"):
        fl.save_peft(tmp_path, adapters, config)


TIES: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no field": ({}, {"ensure_weight_tying": False}, ConfigError, "'lm_head' is tied to .*ensure_weight_tying=False"),
    "nothing tied": ({"lm_head.weight": None}, {}, ConfigError, "but the adapters tie nothing"),
    "tied to a tie": ({"lm_head.weight": Tied("lm_head.weight")}, {}, Exception, "no rule of its own"),
    "another output": ({"lm_head.weight": None, "head.weight": Tied("model.embed_tokens.weight")}, {},
                       UnsupportedError, "PEFT ties an output layer"),
    "ranks": ({}, {"rank_pattern": {"lm_head": 3}}, ConfigError, "'lm_head.weight' has rank 2, but the configuration"),
}  # fmt: skip


@pytest.mark.parametrize("name", TIES)
def test_ties_that_a_folder_cannot_hold_are_not_saved(name: str, tmp_path: Path) -> None:
    change, fields, error, message = TIES[name]
    _, adapters, config = ensured(target_modules=["embed_tokens"])
    changed = {n: rule for n, rule in (adapters | change).items() if rule is not None}
    with pytest.raises(error, match=message):
        fl.save_peft(tmp_path / "new", changed, config.replace(**fields))
    assert not (tmp_path / "new").exists()


# --- tokens ----------------------------------------------------------------------------------------------------


def test_tokens_of_an_adapted_table_are_refused_with_a_reason() -> None:
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied to modules of type"):
        wrap(Net(), target_modules=["embed"], trainable_token_indices={"embed": [1]})
    with pytest.raises(TargetError, match="is also adapted by target_modules"):
        fl.init(Net(), LoraConfig(target_modules=["embed"], trainable_token_indices={"embed": [1]}))


def test_merging_tokens_of_the_head_alone_leaves_the_table() -> None:
    """PEFT puts them into the tensor that the table shares."""
    model = tied_llama()
    theirs = wrap(model, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]}).eval()
    with torch.no_grad():
        theirs.base_model.model.lm_head.token_adapter.trainable_tokens_delta["default"].add_(1)
    before = theirs(IDS).logits
    with quietly():
        assert distance(theirs.merge_and_unload()(IDS).logits, before) > 1e-2
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]})
    params, adapters = fl.base_params(model), shaken(fl.init(model, config))
    with quietly():
        merged = fl.merge(params, adapters)
    close(torch.func.functional_call(model, merged, (IDS,), tie_weights=False).logits,
          fl.apply(model, params, adapters, IDS).logits)  # fmt: skip


TOKENS: dict[str, tuple[dict[str, Any], str]] = {
    "other ids": ({"trainable_token_indices": [1, 3]}, r"tokens \[3, 1\], but the configuration says \[1, 3\]"),
    "none": ({"trainable_token_indices": None}, "but the configuration says none"),
    "another table": ({"trainable_token_indices": {"embed_tokens": [3, 1], "wte": [1]}}, "'wte' names none"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_that_the_configuration_does_not_name_are_not_saved(name: str, tmp_path: Path) -> None:
    fields, message = TOKENS[name]
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 1])
    adapters = fl.init(llama(), config)
    with pytest.raises(ConfigError, match=message):
        fl.save_peft(tmp_path / "new", adapters, config.replace(**fields))


def test_deltas_that_the_configuration_does_not_name_are_not_saved(tmp_path: Path) -> None:
    model, config = Net(), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    adapters = fl.init(model, config)
    name = "layers.0.q_proj.bias"
    with pytest.raises(ConfigError, match=r"has the rule Delta, but lora_bias=False"):
        fl.save_peft(tmp_path, adapters, config.replace(lora_bias=False))
    with pytest.raises(ConfigError, match=rf"no Delta for '{name}'"):
        fl.save_peft(tmp_path, {n: rule for n, rule in adapters.items() if n != name}, config)
    with pytest.raises(ConfigError, match=rf"'{name}' has scaling 5, but"):
        fl.save_peft(tmp_path, adapters | {name: fl.Delta(torch.ones(6), scaling=5.0)}, config)
    with pytest.raises(UnsupportedError, match=r"'head\.bias' is no bias of an adapted module"):
        fl.save_peft(tmp_path, adapters | {"head.bias": fl.Delta(torch.ones(3), scaling=4.0)}, config)


# --- many adapters, and what is a mode there -------------------------------------------------------------------


def test_mixed_batches_take_dora_and_training_and_any_member() -> None:
    """PEFT refuses DoRA, training mode and a merged adapter in a batch of several."""
    model = Net().double()
    theirs = wrap(model, target_modules=TWO, use_dora=True).eval()
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        theirs(IDS, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="in training mode"):
        theirs.train()(IDS, adapter_names=["default", "__base__"])
    configs = [LoraConfig(r=2, target_modules=TWO, use_dora=True), LoraConfig(r=3, target_modules=["embed"])]
    members = [shaken(fl.init(model, config)) for config in configs]
    params = fl.base_params(model)
    actual = fl.apply(model.train(), params, fl.route(fl.stack(members), [1, 0]), IDS)
    for row, i in enumerate([1, 0]):
        close(actual[row : row + 1], fl.apply(model, params, members[i], IDS[row : row + 1]))
    with pytest.raises(ConfigError, match=r"ids\[1\] is 2; the stack has 2 members"):
        fl.route(fl.stack(members), [0, 2])


def test_the_model_is_never_wrapped_and_never_merged() -> None:
    """No second wrapper, no forgotten merge, no adapter that is left on: the model is not changed at all."""
    model = Net()
    before = {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    config = LoraConfig(r=2, target_modules=TWO, modules_to_save=["head"], bias="all", use_dora=True)
    params = fl.base_params(model)
    adapters = shaken(fl.init(model, config))
    for _ in range(2):  # twice: there is nothing that could be done twice
        fl.merge(params, adapters)
        fl.apply(model, params, adapters, IDS)
    assert before == {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}


def test_a_trained_module_counts_once() -> None:
    """`modules_to_save` and bias="all" name the same bias; PEFT writes it twice."""
    adapters = fl.init(Net(), LoraConfig(r=2, target_modules=TWO, modules_to_save=["head"], bias="all"))
    assert isinstance(adapters["head.bias"], Full)
    assert math.prod(adapters["head.bias"].value.shape) == 3
