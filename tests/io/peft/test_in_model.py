"""`save_peft` with a model: what PEFT then makes of the folder, or why it cannot be written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from oracle import close
from torch import Tensor, nn

from funclora import LoraConfig, apply, base_params, init, load_peft, merge, save_peft
from funclora._config.targets import select
from funclora._init.fresh import init as fresh
from funclora.errors import ConfigError, PeftFormatWarning, TargetError, UnsupportedError
from funclora.rules.tokens import Tied

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following rank_pattern keys")
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DENSE = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]


def config_of(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "init_lora_weights": False} | fields)


def experts(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "experts.down_proj"))]


def as_peft(model: Any, folder: Path, inputs: dict[str, Any]) -> Tensor:
    import copy

    import peft

    adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    with torch.no_grad():
        logits: Tensor = adapted.base_model.model(**inputs).logits
    return logits


def ours(model: Any, adapters: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = apply(model, base_params(model), adapters, **inputs).logits
    return logits


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "Qwen3NextForCausalLM"])
def test_the_seven_names_mean_the_experts_with_twice_the_rank(name: str) -> None:
    model, _ = build(name)
    adapters: Any = init(model, config_of(target_modules=SEVEN)) if experts(model) else {}
    for parameter in experts(model):
        assert adapters[parameter].r == (4 if parameter.endswith("gate_up_proj") else 2)
        assert adapters[parameter].scaling == 3
    assert not [n for n in adapters if "shared" in n or re.search(r"mlp\.\w+_proj\.weight", n)]


def test_dense_layers_with_the_names_of_experts_are_written_as_parameters(tmp_path: Path) -> None:
    model, inputs = build("Glm4MoeForCausalLM")
    inputs["use_cache"] = False
    config = config_of(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], rank_pattern={"up_proj": 3})
    names = [n for n in select(model, config) if "experts" not in n or "shared" in n]
    assert len(names) > 5
    adapters = {n: rule for n, rule in _literal(model, config).items() if n in names}

    save_peft(tmp_path, adapters, config, model=model)

    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(n.endswith("q_proj") for n in written["target_modules"])
    assert all(n.endswith("_proj.weight") for n in written["target_parameters"])
    close(as_peft(model, tmp_path, inputs), ours(model, adapters, inputs), 1e-5)
    back, _ = load_peft(tmp_path, model)
    close(ours(model, back, inputs), ours(model, adapters, inputs), 0)

    for field, value, why in (("use_dora", True, "DoRA"), ("lora_dropout", 0.1, "dropout")):
        other = config.replace(**{field: value})
        with pytest.raises(UnsupportedError, match=f"takes this name in target_modules for experts.*no {why}"):
            save_peft(tmp_path / "no", _literal(model, other), other, model=model)
    assert not (tmp_path / "no").exists()


def _literal(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """Adapters for the layers whose names the configuration has, as a regular expression means it."""
    expression = r".*\.(" + "|".join(config.target_modules or ()) + ")"
    return fresh(model, config.replace(target_modules=expression))


def test_a_regular_expression_means_what_it_says_and_is_written_as_names(tmp_path: Path) -> None:
    model, inputs = build("Qwen3MoeForCausalLM")
    inputs["use_cache"] = False
    config = config_of(target_modules=r".*layers\.1\.self_attn\.[qk]_proj")
    adapters = init(model, config)
    assert [*adapters] == ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"]
    save_peft(tmp_path, adapters, config, model=model)
    close(as_peft(model, tmp_path, inputs), ours(model, adapters, inputs), 1e-5)


def test_what_peft_cannot_have_is_an_error_that_says_so(tmp_path: Path) -> None:
    model, _ = build("Qwen3MoeForCausalLM")
    with pytest.raises(TargetError, match=r"'gate_up_proj' holds 'gate_proj' and 'up_proj' together. Name 'up_proj'"):
        init(model, config_of(target_modules=["q_proj", "gate_proj"]))
    config = config_of(target_modules="all-linear")
    adapters = init(model, config)
    with pytest.raises(UnsupportedError, match=re.escape("save_peft needs the model: save_peft(..., model=model)")):
        save_peft(tmp_path, adapters, config)
    less = {name: rule for name, rule in adapters.items() if "layers.1" not in name}
    with pytest.raises(ConfigError, match=r"also means 'model.layers.1.*which has no adapter. PEFT would make a new"):
        save_peft(tmp_path, less, config, model=model)
    dense, _ = build("LlamaForCausalLM")
    rules = init(dense, config_of(target_modules=["q_proj", "k_proj"]))
    with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn.k_proj.weight' has an adapter.*does not mean it"):
        save_peft(tmp_path, rules, config_of(target_modules=["q_proj"]), model=dense)
    assert not [*tmp_path.iterdir()]


class Reads(nn.Module):
    """Reads the weight of one layer, only the type of another one's, and calls or reads a third one."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.called, self.either = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.either(x) if self.training else x @ self.either.weight
        return self.called(F.linear(x.to(self.called.weight.dtype), self.raw.weight))


def test_a_layer_whose_weight_is_read_is_no_target_for_peft(tmp_path: Path) -> None:
    model = nn.Sequential(Reads())
    config = config_of(target_modules=["raw"])
    with pytest.raises(UnsupportedError, match=r"'0\.raw\.weight'.*Reads reads the weight in place of calling"):
        save_peft(tmp_path, init(model, config), config, model=model)
    config = config_of(target_modules=["either"])
    with pytest.warns(PeftFormatWarning, match=r"'0\.either\.weight': Reads calls the layer in some cases only"):
        save_peft(tmp_path, init(model, config), config, model=model)
    config = config_of(target_modules=["called"])
    save_peft(tmp_path, init(model, config), config, model=model)


class Shared(nn.Module):
    """One layer under two names, in the same module or in two."""

    def __init__(self, *, container: bool) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.b = self.a if container else nn.Sequential(self.a[0], nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


@pytest.mark.parametrize("container", [True, False])
def test_a_module_under_two_names_has_one_adapter(container: bool, tmp_path: Path) -> None:
    import copy

    import peft

    model, x = Shared(container=container), torch.randn(3, 4)
    config = config_of(target_modules=["0"])
    adapters, params = init(model, config), base_params(model)
    assert isinstance(adapters["b.0.weight"], Tied)
    assert [n for n, rule in adapters.items() if not isinstance(rule, Tied)] == ["a.0.weight"]

    merged = copy.deepcopy(model)
    merged.load_state_dict(merge(params, adapters))
    close(apply(model, params, adapters, x), merged(x), 1e-5)

    if not container:
        with pytest.raises(UnsupportedError, match=r"as 'b\.0' too. PEFT would adapt only the calls of 'a\.0'"):
            save_peft(tmp_path, adapters, config, model=model)
        return
    save_peft(tmp_path, adapters, config, model=model)
    back, _ = load_peft(tmp_path, model)
    close(apply(model, params, back, x), merged(x), 1e-5)
    adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    close(adapted(x), merged(x), 1e-5)
    with pytest.raises(TargetError, match=r"'b\.0' is a further name of 'a\.0': give that one"):
        init(model, config_of(target_modules=["b.0"]))
    with pytest.raises(ConfigError, match="If the model holds one module under both names"):
        save_peft(tmp_path, adapters, config)
