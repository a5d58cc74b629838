"""mlx-lm's folders. Its fused weights are computed here anew, from its documentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import EXPERTS, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import funclora as fl
from funclora.errors import ConfigError, FormatError, FuncloraError, NonFiniteError, UnsupportedError
from funclora.io import load_mlx, save_mlx


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | fields))).eval()


KEYS = ["self_attn.q_proj", "mlp.down_proj"]


def folder_of(path: Path, model: nn.Module, modules: list[str], *, kind: str = "lora", **fields: Any) -> None:
    """A folder as mlx-lm's training leaves it, with all settings of the run in the configuration."""
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for name in modules:
        rows, columns = model.get_parameter(f"{name}.weight").shape
        inner, outer = (rows, columns) if "embed" in name else (columns, rows)
        tensors[f"{name}.lora_a"] = torch.randn(inner, 4, generator=draw) / 4
        tensors[f"{name}.lora_b"] = torch.randn(4, outer, generator=draw) / 4
        if kind == "dora":
            tensors[f"{name}.m"] = torch.rand(outer, generator=draw) + 0.5
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapters.safetensors", metadata={"format": "mlx"})
    config = {
        "model": "mlx-community/Llama", "train": True, "fine_tune_type": kind, "num_layers": 2, "batch_size": 4,
        "optimizer_config": {"adam": {}}, "lr_schedule": None, "adapter_path": "adapters",
        "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.05, "keys": KEYS},
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config | fields))


def in_mlx(folder: Path, model: nn.Module, name: str) -> Tensor:
    """The weight of a module after `mlx_lm.fuse`."""
    tensors = load_file(folder / "adapters.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    weight = model.get_parameter(f"{name}.weight").detach()
    if f"{name}.lora_a" not in tensors:
        return weight
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    scale = config["lora_parameters"]["scale"]
    if isinstance(model.get_submodule(name), nn.Embedding):
        return weight + scale * a @ b
    weight = weight + (scale * b.T) @ a.T
    if config["fine_tune_type"] == "dora":
        weight = (tensors[f"{name}.m"] / weight.norm(dim=1))[:, None] * weight
    return weight


def check_equal(folder: Path, model: nn.Module, adapters: dict[str, Any]) -> None:
    """Every weight, element by element, and that each adapter changes its weight."""
    merged = fl.merge(fl.base_params(model), adapters)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            want = in_mlx(folder, model, name)
            torch.testing.assert_close(merged[f"{name}.weight"], want, rtol=1e-5, atol=1e-6)
            changed = not torch.equal(want, model.get_parameter(f"{name}.weight"))
            assert changed == (f"{name}.weight" in adapters)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_folders_of_mlx_lm(kind: str, tmp_path: Path) -> None:
    model = llama()
    modules = [f"model.layers.{i}.{key}" for i in (1, 2) for key in KEYS]
    modules += ["lm_head"] + (["model.embed_tokens"] if kind == "lora" else [])
    folder_of(tmp_path, model, modules, kind=kind)
    adapters, config = load_mlx(tmp_path, model)
    assert adapters.keys() == {f"{name}.weight" for name in modules}
    assert all(type(rule) is (fl.DoRA if kind == "dora" else fl.LoRA) for rule in adapters.values())
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (4, 10, 0.05, kind == "dora")
    check_equal(tmp_path, model, adapters)
    fl.save_peft(tmp_path / "peft", adapters, config)
    again, _ = fl.load_peft(tmp_path / "peft", model)
    assert again.keys() == adapters.keys()
    save_mlx(tmp_path / "again", adapters, model)
    one, other = (load_file(folder / "adapters.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_folders_before_fine_tune_type(tmp_path: Path) -> None:
    model = llama()
    folder_of(tmp_path, model, ["model.layers.2.self_attn.q_proj"], kind="dora")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["fine_tune_type"]
    file.write_text(json.dumps(config | {"use_dora": True}))
    adapters, _ = load_mlx(tmp_path, model)
    assert type(adapters["model.layers.2.self_attn.q_proj.weight"]) is fl.DoRA


ALPHA = {"rank": 4, "scale": 2.5, "dropout": 0.0, "alpha": 16}


def test_an_alpha_that_mlx_lm_ignores(tmp_path: Path) -> None:
    """Its releases from 0.19 on wrote an alpha for a while that they did not use."""
    model = llama()
    folder_of(tmp_path, model, ["lm_head"], lora_parameters=ALPHA)
    adapters, _ = load_mlx(tmp_path, model)
    check_equal(tmp_path, model, adapters)


WRITTEN: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    {"r": 3, "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
    {"r": 3, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 1}},
    {"r": 3, "target_modules": ["q_proj", "lm_head"], "use_dora": True, "rank_pattern": {"q_proj": 5}},
    {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": [1], "lora_dropout": 0.1},
]


@pytest.mark.parametrize("fields", WRITTEN, ids=str)
def test_what_is_written_gives_our_weights_in_mlx_lm(fields: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    adapters = fl.init(model, fl.LoraConfig(init_lora_weights=False, **fields))
    save_mlx(tmp_path, adapters, model)
    check_equal(tmp_path, model, adapters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapters.safetensors")
    assert {t.shape[1] for key, t in tensors.items() if key.endswith("lora_a")} == {config["lora_parameters"]["rank"]}
    # mlx-lm adapts the modules with these names in the last layers, and those with these full names.
    layers = range(3 - config["num_layers"], 3)
    keys = config["lora_parameters"]["keys"]
    adaptable = {f"model.layers.{i}.{key}" for i in layers for key in keys} | {*keys}
    assert {key.rpartition(".")[0] for key in tensors} <= adaptable
    loaded, _ = load_mlx(tmp_path, model)
    check_equal(tmp_path, model, loaded)


# What is refused.

Q = "model.layers.2.self_attn.q_proj"


def changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, nn.Module], None]:
    def make(path: Path, model: nn.Module) -> None:
        folder_of(path, model, [Q])
        tensors = load_file(path / "adapters.safetensors")
        change(tensors)
        save_file(tensors, path / "adapters.safetensors")

    return make


def fields(**values: Any) -> Callable[[Path, nn.Module], None]:
    return lambda path, model: folder_of(path, model, [Q], **values)


def without(name: str) -> Callable[[Path, nn.Module], None]:
    def make(path: Path, model: nn.Module) -> None:
        folder_of(path, model, [Q])
        (path / name).unlink()

    return make


def put(**tensors: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.update({f"{Q}.{leaf}": tensor for leaf, tensor in tensors.items()})


REFUSED: dict[str, tuple[Callable[[Path, nn.Module], None], type[FuncloraError], str]] = {
    "no weights": (without("adapters.safetensors"), FormatError, "there is no adapters.safetensors"),
    "no configuration": (without("adapter_config.json"), FormatError, "there is no adapter_config.json"),
    "full": (fields(fine_tune_type="full"), UnsupportedError, "holds whole weights.*mlx_lm.fuse"),
    "other kind": (fields(fine_tune_type="ia3"), FormatError, "expected fine_tune_type 'lora' or 'dora'.*'ia3'"),
    "scale": (fields(lora_parameters={"rank": 4}), FormatError, "scale: expected a number, got None"),
    "scale 0": (
        fields(lora_parameters={"rank": 4, "scale": 0}),
        FormatError,
        "0 would make the adapter have no effect",
    ),
    "alpha": (fields(lora_layers=2, lora_parameters=ALPHA), UnsupportedError, "Before 0.15 .* scale · alpha / rank"),
    "half": (changed(lambda t: t.pop(f"{Q}.lora_b")), FormatError, "has lora_a, expected lora_a, lora_b"),
    "magnitude": (changed(put(m=torch.ones(16))), FormatError, "expected lora_a, lora_b with fine_tune_type='lora'"),
    "shape": (
        changed(put(lora_b=torch.ones(4, 9))),
        FormatError,
        r"q_proj.weight'.* shape \[9, 4\], expected \[16, 4\]",
    ),
    "ranks": (changed(put(lora_b=torch.ones(3, 16))), FormatError, r"expected \[in, r\] and \[r, out\]"),
    "experts": (changed(put(lora_a=torch.ones(2, 4, 16))), FormatError, r"expected \[in, r\] and \[r, out\]"),
    "infinite": (
        changed(put(lora_b=torch.full((4, 16), torch.inf))),
        NonFiniteError,
        "B of .* contains NaN or infinity",
    ),
    "dtype": (changed(put(lora_b=torch.ones(4, 16, dtype=torch.int32))), FormatError, "has dtype I32"),
    "key": (changed(lambda t: t.update(bias=torch.ones(2))), FormatError, "unexpected key 'bias'"),
    "module": (
        changed(lambda t: t.update({f"model.layers.7.x.{leaf}": torch.ones(4, 4) for leaf in ("lora_a", "lora_b")})),
        FormatError,
        r"LlamaForCausalLM has no module 'model\.layers\.7\.x'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    make, kind, words = REFUSED[case]
    model = llama()
    make(tmp_path, model)
    with pytest.raises(kind, match=words):
        load_mlx(tmp_path, model)


def test_embeddings_that_mean_something_else_in_mlx_lm(tmp_path: Path) -> None:
    folder_of(tmp_path / "dora", llama(), ["model.embed_tokens"], kind="dora")
    with pytest.raises(UnsupportedError, match="a magnitude for each token"):
        load_mlx(tmp_path / "dora", llama())
    tied = llama(tie_word_embeddings=True)
    folder_of(tmp_path / "tied", tied, ["model.embed_tokens"])
    with pytest.raises(UnsupportedError, match="update of a tied embedding in the output layer too"):
        load_mlx(tmp_path / "tied", tied)
    for target, words in (("embed_tokens", "update of a tied embedding"), ("lm_head", "no weight of its own")):
        adapters = fl.init(tied, fl.LoraConfig(target_modules=[target]))
        with pytest.raises(UnsupportedError, match=words):
            save_mlx(tmp_path / "new", adapters, tied)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model = llama()
    full = fl.init(model, fl.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedError, match=r"'lm_head.weight'.*no place for the rule Full.*Merge the adapter"):
        save_mlx(tmp_path / "new", full, model)
    mixed = fl.init(model, fl.LoraConfig(target_modules=["q_proj"])) | fl.init(
        model, fl.LoraConfig(target_modules=["v_proj"], use_dora=True)
    )
    with pytest.raises(ConfigError, match=r"one kind and one dropout.*dora, lora"):
        save_mlx(tmp_path / "new", mixed, model)
    with pytest.raises(ConfigError, match="no adapter to write"):
        save_mlx(tmp_path / "new", {}, model)
    assert not (tmp_path / "new").exists()


def test_load_peft_names_mlx_lm(tmp_path: Path) -> None:
    model = llama()
    folder_of(tmp_path, model, [Q])
    with pytest.raises(UnsupportedError, match=r"adapter_config.json: this is mlx-lm's.* funclora\.io\.load_mlx"):
        fl.load_peft(tmp_path, model)


@pytest.mark.mlx
@pytest.mark.parametrize("fields", WRITTEN, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_of_mlx_lm(fields: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    if tied and {"embed_tokens", "lm_head"} & {*fields["target_modules"]}:
        pytest.skip("mlx-lm adapts both")
    model = llama(tie_word_embeddings=tied)
    adapters = fl.init(model, fl.LoraConfig(init_lora_weights=False, **fields))
    model.save_pretrained(tmp_path / "base")
    save_mlx(tmp_path / "adapter", adapters, model)
    theirs, _ = utils.load_model(tmp_path / "base")
    ids = torch.arange(12).reshape(2, 6)
    ours = fl.bind(model, fl.base_params(model), adapters)
    base = torch.tensor(theirs(mx.array(ids.tolist())).tolist())
    have = torch.tensor(load_adapters(theirs, str(tmp_path / "adapter")).eval()(mx.array(ids.tolist())).tolist())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(ids).logits, have, rtol=1e-5, atol=1e-5)
    assert (have - base).abs().max() > 1e-3


# Experts: three matrices there, two parameters in transformers.


def expert_folder(path: Path, model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """A folder with adapters of these modules of mlx-lm, and the change of each."""
    draw, tensors, changes = torch.Generator().manual_seed(1), dict[str, Tensor](), {}
    width = 12 if type(model).__name__.startswith("Mixtral") else 8
    shapes = {"gate_proj": (width, 16), "up_proj": (width, 16), "down_proj": (16, width), "gate": (4, 16)}
    shapes["q_proj"] = (24, 16)
    for name in names:
        out, inner = shapes[name.rpartition(".")[2]]
        if "switch_mlp" in name:
            a, b = torch.randn(4, 3, inner, generator=draw) / 4, torch.randn(4, out, 3, generator=draw) / 4
            changes[name] = 2.5 * b @ a
        else:
            a, b = torch.randn(inner, 3, generator=draw) / 4, torch.randn(3, out, generator=draw) / 4
            changes[name] = 2.5 * (a @ b).T
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    path.mkdir()
    save_file(tensors, path / "adapters.safetensors", metadata={"format": "mlx"})
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return changes


BLOCK = "model.layers.1.mlp"
MODULES = {
    "all": ["switch_mlp.gate_proj", "switch_mlp.up_proj", "switch_mlp.down_proj", "gate"],
    "up": ["switch_mlp.up_proj"],
}


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("which", MODULES)
def test_experts(kind: str, which: str, tmp_path: Path) -> None:
    model = build(kind)
    block = f"{BLOCK[:-3]}block_sparse_moe" if kind == "Mixtral" else BLOCK
    made = expert_folder(tmp_path / "mlx", model, [f"{block}.{name}" for name in MODULES[which]])
    changes = {name.removeprefix(f"{block}."): change for name, change in made.items()}
    adapters, config = load_mlx(tmp_path / "mlx", model)
    zeros = torch.zeros(4, 8 if kind == "Qwen3Moe" else 12, 16)
    parts = [changes.get(f"switch_mlp.{part}", zeros) for part in ("gate_proj", "up_proj")]
    want = {f"{BLOCK}.experts.gate_up_proj": torch.cat(parts, dim=1)}
    if which == "all":
        want |= {f"{BLOCK}.experts.down_proj": changes["switch_mlp.down_proj"], f"{BLOCK}.gate.weight": changes["gate"]}
    assert adapters.keys() == want.keys()
    for name, change in want.items():
        dense = adapters[name].dense(torch.zeros_like(model.get_parameter(name)))
        torch.testing.assert_close(dense, change, rtol=1e-5, atol=1e-6)
    fl.save_peft(tmp_path / "peft", adapters, config)
    again, _ = fl.load_peft(tmp_path / "peft", model)
    assert again.keys() == adapters.keys()


@pytest.mark.mlx
def test_logits_of_mlx_lm_with_experts(tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    model = build("Qwen3Moe").eval()
    expert_folder(
        tmp_path / "mlx", model, [f"{BLOCK}.{n}" for n in (*MODULES["all"],)] + ["model.layers.0.self_attn.q_proj"]
    )
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"  # with fields that transformers calls otherwise today
    known = {"num_experts": 4, "rope_theta": model.config.rope_parameters["rope_theta"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | known))
    theirs, _ = utils.load_model(tmp_path / "base")
    ids = torch.arange(12).reshape(2, 6)
    base = torch.tensor(theirs(mx.array(ids.tolist())).tolist())
    have = torch.tensor(load_adapters(theirs, str(tmp_path / "mlx")).eval()(mx.array(ids.tolist())).tolist())
    adapters, _ = load_mlx(tmp_path / "mlx", model)
    with torch.no_grad():
        torch.testing.assert_close(fl.apply(model, fl.base_params(model), {}, ids).logits, base, rtol=1e-5, atol=1e-5)
        found = fl.apply(model, fl.base_params(model), adapters, ids).logits
    torch.testing.assert_close(found, have, rtol=1e-5, atol=1e-5)
    assert (have - base).abs().max() > 1e-3
