"""`as_module`: the adapter's leaves as the parameters of a module, over a model that never changes."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LLAMA, Case, gen, llama, make_rule
from oracle import close, snapshot, tensors
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funclora as fl
from funclora.errors import ArgumentError, ConfigError, FuncloraWarning, ParamsError, UnsupportedError

KINDS = ("lora", "dora", "full")
IDS = torch.arange(12).reshape(2, 6) * 5 % 17


def rules(params: Mapping[str, Tensor], targets: Mapping[str, Any], kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    generator = gen(3)
    return {
        name: make_rule(kinds[i % len(kinds)], layout, params[name], generator)
        for i, (name, layout) in enumerate(targets.items())
    }


class Layers(nn.Sequential):
    def flags(self) -> list[bool]:
        return [layer.training for layer in self]


def mlp() -> Layers:
    return Layers(nn.Linear(5, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 3))


def of_mlp(model: nn.Module, **options: Any) -> dict[str, Any]:
    config = fl.LoraConfig(r=2, target_modules=["0"], modules_to_save=["3"], init_lora_weights=False, **options)
    return fl.init(model, config)


def equal(one: Any, other: Any) -> None:
    assert len(tensors(one)) == len(tensors(other)) > 0
    for x, y in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(x, y)


# --- what it computes ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning", "ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_is_apply_and_backward_its_gradient(case: Case, kind: str) -> None:
    model = case.model()
    params = fl.base_params(model)
    adapters = rules(params, case.targets, (kind,))
    inputs, options = case.inputs(), case.kwargs()
    check = snapshot(model, params, adapters)
    module = fl.as_module(model, params, adapters)

    def loss(outputs: Any) -> Tensor:
        floats = [x for x in tensors(outputs) if x.is_floating_point()]
        return sum((x.sin().sum() for x in floats), torch.zeros(()))

    assert len(list(module.parameters())) == len(tensors(adapters))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        want, expected = fl.value_and_grad(lambda bound: loss(bound(*inputs, **options)))(model, params, adapters)
    for _ in range(2):  # nothing of one step is left for the next
        torch.manual_seed(0)
        got = loss(module(*inputs, **options))
        got.backward()
        torch.testing.assert_close(got.detach(), want, rtol=0, atol=0)
        equal({name: [leaf.grad for leaf in tensors(rule)] for name, rule in module.adapters.items()}, expected)
        module.zero_grad()
    check()


def test_an_optimizer_on_its_parameters_takes_the_steps_of_train_step() -> None:
    model = mlp().eval()
    params, adapters = fl.base_params(model), of_mlp(model, use_dora=True)
    x, y = torch.randn(4, 5), torch.randn(4, 3)
    module = fl.as_module(model, params, adapters)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    ours = fl.optim.adamw(1e-2, weight_decay=0.1)
    step = fl.train_step(model, lambda bound, batch: F.mse_loss(bound(batch[0]), batch[1]), ours)
    expected, state = adapters, ours.init(adapters)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()
        expected, state, _ = step(params, expected, state, (x, y))
    close(module.adapters, expected, 1e-5)
    first: Any = module.adapters["0.weight"]
    assert first.a is dict(module.named_parameters())["adapter.0.weight.lora_A"]
    torch.testing.assert_close(module(x), fl.apply(model, params, module.adapters, x), rtol=0, atol=0)


def test_parameters_have_stable_readable_names() -> None:
    model = mlp()
    params, adapters = fl.base_params(model), of_mlp(model, use_dora=True)
    module = fl.as_module(model, params, adapters)
    names = [
        "adapter.0.weight.lora_A", "adapter.0.weight.lora_B", "adapter.0.weight.lora_magnitude_vector",
        "adapter.3.bias", "adapter.3.weight",
    ]  # fmt: skip
    assert [name for name, _ in module.named_parameters()] == list(module.state_dict()) == names
    assert not list(module.buffers())
    turned = fl.as_module(model, params, dict(reversed(adapters.items())))
    assert list(turned.state_dict()) == names, "the order is that of the names, which optimizers rely on"
    for name in names:
        assert module.get_parameter(name) is dict(module.named_parameters())[name]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_in_backward_runs_under_the_adapter(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
            self.saves = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return checkpoint(self.last, x, use_reentrant=use_reentrant) if self.saves else self.last(x)

    model = Checkpointed()
    adapters = fl.init(model, fl.LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights=False))
    module = fl.as_module(model, fl.base_params(model), adapters)
    x = torch.randn(4, 5)
    grads = []
    for module.saves in (True, False):  # an attribute of the bound copy
        module.zero_grad()
        module(x).square().sum().backward()
        grads.append([parameter.grad for parameter in module.parameters()])
    equal(*grads)
    assert model.saves


# --- the module's own state ------------------------------------------------------------------------------------


def test_training_mode_is_its_own_and_switches_dropout_of_model_and_adapter() -> None:
    model = mlp().eval()
    model[1].train()
    params, adapters = fl.base_params(model), of_mlp(model, lora_dropout=0.5)
    module = fl.as_module(model, params, adapters)
    x = torch.randn(64, 5)
    assert not module.training
    assert not torch.equal(module(x), module(x)), "the model's own flags hold until train() or eval()"

    check = snapshot(model, params, adapters)
    assert module.eval().flags() == [False] * 4
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
    module.train()
    assert module.flags() == [True] * 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got = module(x)
    model.train()  # a model that trains, for comparison
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.testing.assert_close(got, fl.apply(model, params, adapters, x), rtol=0, atol=0)
    model.eval()[1].train()
    check()
    for module.training in (True, False):  # what some trainers do instead of calling train()
        assert module.flags() == [module.training] * 4
    outer = nn.Sequential(module).train()
    assert module.flags() == [True] * 4
    outer.eval()
    assert module.flags() == [False] * 4


def test_buffers_are_those_of_params_in_every_call() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).train()
    params = fl.base_params(model)
    adapters = fl.init(model, fl.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    check = snapshot(model, params, adapters)
    module = fl.as_module(model, params, adapters)
    x = torch.randn(6, 5)
    for _ in range(2):
        module(x).sum().backward()
    check()
    expected = fl.apply(copy.deepcopy(model).eval(), params, adapters, x)
    torch.testing.assert_close(module.eval()(x), expected, rtol=0, atol=0)
    with torch.inference_mode():
        module.load_state_dict(module.state_dict(), assign=True)  # so that it is bound in here
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    module.train()(x).sum().backward()


def test_a_call_sees_every_way_to_change_the_parameters() -> None:
    model = mlp().eval()
    params, adapters = fl.base_params(model), of_mlp(model, use_dora=True)
    module = fl.as_module(model, params, adapters)
    x = torch.randn(4, 5)

    def check() -> None:
        torch.testing.assert_close(module(x), fl.apply(model, params, module.adapters, x), rtol=0, atol=0)

    other = {name: value + 0.1 for name, value in module.state_dict().items()}
    expected = torch.func.functional_call(module, other, (x,))
    check()
    assert not torch.equal(module(x), expected)
    module.requires_grad_(False)  # DoRA's norm is worked out once where nothing is trained
    before = module(x)
    module.load_state_dict(other)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    check()
    module.requires_grad_(True)
    for parameter in module.parameters():
        parameter.data = parameter.data * 1.5
    assert not torch.equal(module(x), expected)
    check()
    module.load_state_dict({name: value - 0.1 for name, value in other.items()}, assign=True)
    close(module(x), before, 1e-5)
    check()
    with torch.inference_mode():
        check()
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_full_value_in_another_dtype_is_cast_anew_in_every_call() -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    params = fl.base_params(model)
    module = fl.as_module(model, params, {"weight": fl.Full(torch.randn(2, 3))})
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    for _ in range(2):
        torch.testing.assert_close(module(x), fl.apply(model, params, module.adapters, x), rtol=0, atol=0)
        module(x).sum().backward()
        with torch.no_grad():
            module.get_parameter("adapter.weight").mul_(2)


def test_functional_transforms_reach_its_parameters() -> None:
    model = mlp().eval()
    module = fl.as_module(model, fl.base_params(model), of_mlp(model, use_dora=True))
    x = torch.randn(4, 5)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    module(x).square().sum().backward()
    close(list(torch.func.grad(loss)(parameters).values()), [p.grad for p in module.parameters()], 1e-5)


def test_moving_it_moves_copies_of_the_frozen_weights() -> None:
    model = llama().eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    params = fl.base_params(model)
    targets = {name: layout for name, layout in LLAMA.items() if "proj" in name}
    adapters = rules(params, targets, ("lora", "dora"))
    check = snapshot(model, params, adapters)
    module = fl.as_module(model, params, adapters)
    same = module.to("cpu").params
    assert all(same[name].data_ptr() == params[name].data_ptr() for name in params), "there was nothing to move"
    module.to(torch.float64)
    moved = module.params
    assert list(moved) == list(params)
    assert {tensor.dtype for tensor in (*moved.values(), *module.parameters())} == {torch.float64}
    assert moved["lm_head.weight"] is moved["model.embed_tokens.weight"], "tied weights stay tied"
    wide = fl.apply(copy.deepcopy(model).double(), moved, module.adapters, IDS, use_cache=False).logits
    torch.testing.assert_close(module(IDS, use_cache=False).logits, wide, rtol=0, atol=0)
    assert module.dtype == torch.float64
    check()
    module.to("meta")
    assert {tensor.device.type for tensor in (*module.params.values(), *module.parameters())} == {"meta"}
    assert module.device.type == module.get_input_embeddings()(IDS.to("meta")).device.type == "meta"
    check()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_apart_from_the_original(how: str, tmp_path: Path) -> None:
    model = llama().eval()
    params = fl.base_params(model)
    module = fl.as_module(model, params, rules(params, LLAMA, ("dora", "lora")), None)
    check = snapshot(model, params)
    expected = module(IDS).logits
    if how == "deepcopy":
        other = copy.deepcopy(module)
        assert all(other.params[name].data_ptr() == params[name].data_ptr() for name in params), "frozen, and shared"
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        torch.save(module, tmp_path / "module.pt")
        other = torch.load(tmp_path / "module.pt", weights_only=False)
    assert type(other) is type(module)
    torch.testing.assert_close(other(IDS).logits, expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.config.use_cache = False
    other.train()
    assert not torch.equal(other(IDS).logits, expected)
    torch.testing.assert_close(module(IDS).logits, expected, rtol=0, atol=0)
    assert (module.config.use_cache, module.training) == (True, False)
    check()


def test_modules_over_one_base_in_threads_of_their_own() -> None:
    model = llama().train()
    params = fl.base_params(model)

    def train(seed: int, results: dict[int, Any]) -> None:
        module = fl.as_module(model, params, rules(params, LLAMA, (("lora", "dora")[seed],)))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for i in range(6):
            module.train(i % 2 == 0)
            optimizer.zero_grad()
            module(IDS, labels=IDS).loss.backward()
            optimizer.step()
        results[seed] = module.state_dict()

    alone: dict[int, Any] = {}
    for seed in range(2):
        train(seed, alone)
    check = snapshot(model, params)
    together: dict[int, Any] = {}
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        equal(together[seed], alone[seed])
    check()


# --- files -----------------------------------------------------------------------------------------------------


def test_save_pretrained_writes_a_folder_that_peft_loads_and_load_peft_brings_back(tmp_path: Path) -> None:
    model = llama().eval()
    model.config._name_or_path = model.name_or_path = "some/model"
    params = fl.base_params(model)
    config = fl.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    module = fl.as_module(model, params, fl.init(model, config), config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    module.save_pretrained(tmp_path / "nowhere", is_main_process=False)
    assert not (tmp_path / "nowhere").exists()
    module.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    back = fl.as_module(model, params, *fl.load_peft(tmp_path, model))
    equal(back.state_dict(), module.state_dict())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    close(theirs(IDS).logits, module(IDS).logits, 1e-5)

    gathered = {name: value.detach() + 1 for name, value in module.named_parameters()}
    module.save_pretrained(tmp_path, state_dict=gathered)
    written = load_file(tmp_path / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    equal(written[f"base_model.model.{name}.lora_A.weight"], gathered[f"adapter.{name}.weight.lora_A"])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    del gathered[f"adapter.{name}.weight.lora_A"]
    with pytest.raises(ParamsError, match=r"state_dict lacks 'adapter.model.layers.0.self_attn.q_proj.weight.lora_A'"):
        module.save_pretrained(tmp_path, state_dict=gathered)
    with pytest.raises(UnsupportedError, match="safe_serialization=False would write"):
        module.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UnsupportedError, match="push_to_hub: uploading is not supported"):
        module.save_pretrained(tmp_path, push_to_hub=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_cannot_be_saved_is_refused_before_it_is_trained() -> None:
    model = mlp()
    params, adapters = fl.base_params(model), of_mlp(model)
    with pytest.raises(ConfigError, match="r"):
        fl.as_module(model, params, adapters, fl.LoraConfig(r=4, target_modules=["0"], modules_to_save=["3"]))
    with pytest.raises(ConfigError, match="as_module was not given"):
        fl.as_module(model, params, adapters).save_pretrained("anywhere")


def test_state_dicts_of_something_else_are_refused() -> None:
    model = mlp()
    module = fl.as_module(model, fl.base_params(model), of_mlp(model))
    for strict in (True, False):
        with pytest.raises(ParamsError, match=r"none of which belongs to this adapter"):
            module.load_state_dict(model.state_dict(), strict=strict)
    some = dict(list(module.state_dict().items())[:1])
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(some)
    assert len(module.load_state_dict(some, strict=False).missing_keys) == 3


# --- what it looks like ----------------------------------------------------------------------------------------


def test_it_passes_for_a_model_of_transformers() -> None:
    model = llama().eval()
    params = fl.base_params(model)
    adapters = rules(params, {name: layout for name, layout in LLAMA.items() if "embed" not in name})
    config = model.config.to_dict(), model.generation_config.to_dict()
    check = snapshot(model, params, adapters)
    module = fl.as_module(model, params, adapters)
    assert (module.device, module.dtype, module.main_input_name) == (model.device, model.dtype, "input_ids")
    assert module.can_generate()
    assert module._keys_to_ignore_on_save is None
    assert inspect.signature(module.forward) == inspect.signature(model.forward)
    assert inspect.signature(type(module).forward) == inspect.signature(type(model).forward)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = fl.bind(model, params, adapters).generate(IDS, **options)
    assert module.generate(IDS, **options).tolist() == expected.tolist()
    assert module.generate(IDS, **options).tolist() != model.generate(IDS, **options).tolist()
    close(module.base_model(IDS).last_hidden_state, fl.bind(model, params, adapters).model(IDS).last_hidden_state, 0)

    added = sum(parameter.numel() for parameter in module.parameters())
    replaced = sum(rule.value.numel() for rule in adapters.values() if isinstance(rule, fl.Full))
    assert replaced > 0
    assert module.num_parameters(only_trainable=True) == added
    assert module.num_parameters() == model.num_parameters() + added - replaced
    embeddings = model.num_parameters() - model.num_parameters(exclude_embeddings=True)
    assert module.num_parameters() - module.num_parameters(exclude_embeddings=True) == embeddings > 0

    # All of these change the module, none the model.
    module.config.use_cache = False
    module.generation_config.max_length = 3
    module.add_model_tags(["tagged"])
    module.activation_checkpointing_enable({"use_reentrant": False})
    assert module.is_activation_checkpointing
    assert module.base_model.config is module.config, "one configuration for all parts"
    module.train()
    assert module(IDS, labels=IDS).past_key_values is None
    module.tie_weights()
    torch.testing.assert_close(
        module.eval()(IDS).logits, fl.apply(model, params, module.adapters, IDS).logits, rtol=0, atol=0
    )
    module.activation_checkpointing_disable()
    assert not module.is_activation_checkpointing
    module.generation_config = copy.deepcopy(module.generation_config)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == config
    check()


def test_a_tied_weight_without_an_adapter_stays_as_it_is() -> None:
    model = llama().eval()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    params = fl.base_params(model)
    assert params["lm_head.weight"].data_ptr() == params["model.embed_tokens.weight"].data_ptr()
    module = fl.as_module(
        model, params, rules(params, {"model.embed_tokens.weight": LLAMA["model.embed_tokens.weight"]})
    )
    before = module(IDS).logits
    module.tie_weights()
    torch.testing.assert_close(module(IDS).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["resize_token_embeddings", "set_input_embeddings", "add_adapter", "load_adapter", "from_pretrained"]
)
def test_methods_that_would_change_the_weights_are_refused(name: str) -> None:
    model = llama()
    params = fl.base_params(model)
    module = fl.as_module(model, params, rules(params, LLAMA))
    with pytest.raises(UnsupportedError, match=f"{name} is not supported on the result of as_module"):
        getattr(module, name)("anything")
    with pytest.raises(UnsupportedError, match="push_to_hub: uploading is not supported"):
        module.push_to_hub("somewhere")


def test_the_head_that_it_hands_out_has_the_rewritten_weight() -> None:
    model = llama()
    params = fl.base_params(model)
    adapters = rules(params, LLAMA, ("dora",))
    module = fl.as_module(model, params, adapters)
    weight = module.get_output_embeddings().weight
    close(weight, fl.merge(params, adapters)["lm_head.weight"], 1e-6)
    weight.square().sum().backward()
    grad = module.get_parameter("adapter.lm_head.weight.lora_B").grad
    assert grad is not None
    assert grad.abs().max() > 0
    plain = fl.as_module(model, params, {name: rule for name, rule in adapters.items() if "lm_head" not in name})
    assert plain.get_output_embeddings().weight.data_ptr() == params["lm_head.weight"].data_ptr()


def test_a_plain_model_has_no_more_than_it_has() -> None:
    model = mlp()
    module = fl.as_module(model, fl.base_params(model), of_mlp(model))
    for name in ("config", "generate", "num_parameters", "tie_weights", "gradient_checkpointing_enable"):
        assert not hasattr(module, name)
    assert "as_module(Layers, 3 rules" in repr(module)


# --- what it refuses -------------------------------------------------------------------------------------------


def test_stacks_routed_adapters_and_nothing_are_refused() -> None:
    model = mlp()
    params, adapters = fl.base_params(model), of_mlp(model)
    stack: Any = fl.stack([adapters, adapters])
    with pytest.raises(ArgumentError, match=r"one adapter.* got a Stack.*stack\[i\]"):
        fl.as_module(model, params, stack)
    with pytest.raises(UnsupportedError, match="routed"):
        fl.as_module(model, params, fl.route(stack, [0, 1]))
    with pytest.raises(ConfigError, match="nothing to train"):
        fl.as_module(model, params, {})
    with pytest.raises(ParamsError, match="which params do not hold"):
        fl.as_module(model, params, {"nothing": adapters["3.bias"]})
    with pytest.raises(ArgumentError, match="expected a rule"):
        fl.as_module(model, params, {"3.bias": torch.zeros(3)})  # type: ignore[dict-item]
    module = fl.as_module(model, params, adapters)
    with pytest.raises(UnsupportedError, match="itself made by as_module"):
        fl.as_module(module, params, adapters)
    with pytest.raises(UnsupportedError, match="is a DataParallel"):
        fl.as_module(nn.DataParallel(model), {f"module.{name}": x for name, x in params.items()},
                     {f"module.{name}": rule for name, rule in adapters.items()})  # fmt: skip


def test_data_parallel_replicas_are_refused() -> None:
    model = mlp().eval()
    module = fl.as_module(model, fl.base_params(model), of_mlp(model))
    x = torch.randn(4, 5)
    torch.testing.assert_close(nn.DataParallel(module)(x), module(x), rtol=0, atol=0)  # no device, no replica
    with pytest.raises(UnsupportedError, match="Use DistributedDataParallel"):
        module._replicate_for_data_parallel()


def test_torch_compile_runs_it_as_it_is_and_says_so() -> None:
    model = mlp().eval()
    module = fl.as_module(model, fl.base_params(model), of_mlp(model, use_dora=True))
    x = torch.randn(4, 5)
    with pytest.warns(FuncloraWarning, match="torch.compile has no effect"):
        compiled = torch.compile(module, backend="eager")(x)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, module(x), rtol=0, atol=0)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_it_needs_no_transformers() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import torch, funclora as fl
model = torch.nn.Linear(3, 2)
module = fl.as_module(model, fl.base_params(model), {"weight": fl.LoRA(torch.ones(1, 3), torch.ones(2, 1))})
module(torch.ones(1, 3)).sum().backward()
print(len(list(module.parameters())))
"""
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "2"
    )
