"""LoRA files of image models: read as diffusers' pipelines read them, or as the trainer meant; written for them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin, lora_pipeline
from diffusers.training_utils import _collate_lora_metadata
from image_pipelines import components, inputs, kohya, layers, outputs, pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import funclora as fl
from funclora.errors import ConfigError, FormatError, FormatWarning, FuncloraError, NonFiniteError, UnsupportedError
from funclora.io import load_diffusers, save_diffusers

ATTENTION = ("to_q", "to_v", "to_out.0")
DENOISER = {
    "sd": (*ATTENTION, "conv1", "conv_shortcut", "proj_in", "time_emb_proj", "ff.net.0.proj", "conv_in"),
    "xl": (*ATTENTION, "conv2", "proj_out", "downsamplers.0.conv", "add_embedding.linear_1"),
    "sd3": (*ATTENTION, "add_q_proj", "ff_context.net.2", "proj", "context_embedder", "norm1.linear"),
    "flux": (*ATTENTION, "add_k_proj", "proj_mlp", "x_embedder", "norm.linear"),
}
TEXT = ("q_proj", "v_proj", "out_proj", "fc1")


@pytest.fixture(autouse=True)
def _old_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for the next version of PEFT before it hands a text encoder's adapter to PEFT."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


def close(have: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def peft_config(name: str, kind: str, **fields: Any) -> peft.LoraConfig:
    targets = TEXT if name.startswith("text") else DENOISER[kind]
    patterns = {key: {n: v for n, v in value.items() if n in targets} for key, value in fields.items()
                if key.endswith("_pattern")}  # fmt: skip
    given: dict[str, Any] = {"r": 2, "lora_alpha": 3, "init_lora_weights": False} | fields | patterns
    return peft.LoraConfig(target_modules=list(targets), **given)


def made_by_diffusers(kind: str, folder: Path, names: list[str], **fields: Any) -> None:
    """A file as diffusers' own training scripts write it."""
    adapted: dict[str, Any] = {name: copy.deepcopy(components(kind)[name]) for name in names}
    torch.manual_seed(1)
    for name, model in adapted.items():
        model.add_adapter(peft_config(name, kind, **fields))
    pipe = pipeline(kind, components(kind))
    layers_of = {f"{n}_lora_layers": peft.get_peft_model_state_dict(m) for n, m in adapted.items()}
    pipe.save_lora_weights(folder, **layers_of, **_collate_lora_metadata(adapted))


def by_pipeline(kind: str, path: Path) -> dict[str, Tensor]:
    """The outputs of all components after `pipe.load_lora_weights`."""
    models = {name: copy.deepcopy(model) for name, model in components(kind).items()}
    pipe = pipeline(kind, models)
    pipe.load_lora_weights(str(path))
    with torch.no_grad():
        return {name: outputs(model, inputs(kind, name)) for name, model in models.items()}


def by_funclora(kind: str, found: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            name: outputs(fl.bind(model, fl.base_params(model), found.get(name, ({}, None))[0]), inputs(kind, name))
            for name, model in components(kind).items()
        }


def check_equal(kind: str, path: Path, found: dict[str, Any]) -> None:
    have, want, base = by_funclora(kind, found), by_pipeline(kind, path), by_funclora(kind, {})
    for name, y in want.items():
        close(have[name], y)
        assert (name in found) == bool((y - base[name]).abs().max() > 1e-3)


@pytest.mark.parametrize("kind", DENOISER)
@pytest.mark.parametrize(
    "fields",
    [{}, {"rank_pattern": {"to_q": 3, "q_proj": 1}, "alpha_pattern": {"to_v": 7, "fc1": 0.5}}, {"use_dora": True}],
    ids=["plain", "patterns", "dora"],
)
def test_files_of_diffusers(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    # transformers loses the magnitudes of text encoders when it loads them.
    names = [name for name in components(kind) if not (fields.get("use_dora") and name.startswith("text"))]
    made_by_diffusers(kind, tmp_path, names, **fields)
    found = load_diffusers(tmp_path, pipeline(kind, components(kind)))
    assert found.keys() == set(names)
    check_equal(kind, tmp_path, found)
    # The same from the dict of models, and each component as a PEFT folder.
    again = load_diffusers(tmp_path / "pytorch_lora_weights.safetensors", dict(components(kind)))
    for name, (adapters, config) in found.items():
        assert adapters.keys() == again[name][0].keys()
        fl.save_peft(tmp_path / name, adapters, config)
        loaded, _ = fl.load_peft(tmp_path / name, components(kind)[name])
        assert loaded.keys() == adapters.keys()


def test_the_pipeline_is_only_read(tmp_path: Path) -> None:
    made_by_diffusers("sd", tmp_path, ["unet", "text_encoder"])
    models = {name: copy.deepcopy(model) for name, model in components("sd").items()}
    pipe = pipeline("sd", models)
    before = {name: {k: t.clone() for k, t in model.state_dict().items()} for name, model in models.items()}
    load_diffusers(tmp_path, pipe)
    for name, model in models.items():
        assert getattr(pipe, name) is model
        assert not any("lora" in key for key, _ in model.named_modules())
        assert not hasattr(model, "peft_config")
        state = model.state_dict()
        assert state.keys() == before[name].keys()
        assert all(torch.equal(t, before[name][key]) for key, t in state.items())


# kohya's scripts.


def te_names(model: nn.Module, ends: tuple[str, ...] = TEXT) -> dict[str, nn.Module]:
    """The layers by the names of CLIP's releases, which transformers has shortened since."""
    return {f"text_model.{name.removeprefix('text_model.')}": m for name, m in layers(model, ends).items()}


def kohya_file(kind: str, file: Path, **how: Any) -> dict[str, Any]:
    models = components(kind)
    parts = {"lora_unet": layers(models["unet"], DENOISER["sd"])}
    encoders = [name for name in models if name.startswith("text")]
    prefixes = ["lora_te"] if len(encoders) == 1 else ["lora_te1", "lora_te2"]
    for prefix, name in zip(prefixes, encoders, strict=True):
        parts[prefix] = te_names(models[name])
    return kohya(file, parts, **how)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_files_of_kohya_with_one_alpha_give_the_pipelines_outputs(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    kohya_file(kind, file, ranks=[2, 3], alphas=[1.5])
    found = load_diffusers(file, pipeline(kind, components(kind)))
    assert found.keys() == components(kind).keys()
    check_equal(kind, file, found)


def test_each_layer_gets_its_own_alpha(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    made = kohya_file("sd", file, ranks=[2, 3, 4], alphas=[1.0, 4.0, 2.5, 1.0])
    with pytest.warns(FormatWarning, match="layers of (unet|text_encoder), such as .* have an α of their own"):
        found = load_diffusers(file, pipeline("sd", components("sd")))
    names = {"lora_unet": ("unet", ""), "lora_te": ("text_encoder", "text_model.")}
    assert sum(len(adapters) for adapters, _ in found.values()) == len(made)
    for key, (down, up, alpha) in made.items():
        prefix, _, name = key.partition(".")
        component, inner = names[prefix]
        full = f"{name.removeprefix(inner)}.weight"
        rule: Any = found[component][0][full]
        delta = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
        have = rule.dense(torch.zeros_like(components("sd")[component].get_parameter(full)))
        torch.testing.assert_close(have.flatten(1), delta, rtol=1e-5, atol=1e-6)


def test_kohyas_names_of_the_original_unet(tmp_path: Path) -> None:
    """The scripts train SDXL by the names of its first release: input_blocks, output_blocks."""
    kind, file = "xl", tmp_path / "style.safetensors"
    blocks = "down_blocks.1.attentions.0.transformer_blocks.0"
    original = {
        "input_blocks.3.1.proj_in": "down_blocks.1.attentions.0.proj_in",
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q": f"{blocks}.attn1.to_q",
        "input_blocks.3.0.in_layers.2": "down_blocks.1.resnets.0.conv1",
        "middle_block.1.transformer_blocks.0.ff.net.2": "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "output_blocks.0.1.transformer_blocks.0.attn2.to_k": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    }
    unet = components(kind)["unet"]
    kohya(file, {"lora_unet": {k: unet.get_submodule(n) for k, n in original.items()}}, ranks=[2], alphas=[1.0])
    found = load_diffusers(file, pipeline(kind, components(kind)))
    assert set(found["unet"][0]) == {f"{name}.weight" for name in original.values()}
    check_equal(kind, file, found)


def test_kohyas_names_of_flux(tmp_path: Path) -> None:
    """q, k and v are one layer there; the file's update of it is cut into three."""
    torch.manual_seed(2)
    key, r, width = "lora_unet_double_blocks_0_img_attn_qkv", 3, 16
    tensors = {
        f"{key}.lora_down.weight": torch.randn(r, width), f"{key}.lora_up.weight": torch.randn(3 * width, r),
        f"{key}.alpha": torch.tensor(2.0),
    }  # fmt: skip
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    found = load_diffusers(file, pipeline("flux", components("flux")))
    check_equal("flux", file, found)
    delta = 2 / r * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    adapters, config = found["transformer"]
    names = [f"transformer_blocks.0.attn.{each}.weight" for each in ("to_q", "to_k", "to_v")]
    assert list(adapters) == names
    have = torch.cat([adapters[name].dense(torch.zeros(width, width)) for name in names])
    torch.testing.assert_close(have, delta, rtol=1e-5, atol=1e-5)
    fl.save_peft(tmp_path / "peft", adapters, config)


def old_names(file: Path) -> None:
    """The names of diffusers before 0.22."""
    unet, tensors = components("sd")["unet"], {}
    for name in layers(unet, ATTENTION):
        path, _, last = name.replace(".to_out.0", ".to_out").rpartition(".")
        width, inner = unet.get_parameter(f"{name}.weight").shape
        tensors[f"unet.{path}.processor.{last}_lora.down.weight"] = torch.randn(2, inner)
        tensors[f"unet.{path}.processor.{last}_lora.up.weight"] = torch.randn(width, 2)
    save_file(tensors, file)


def test_old_names_of_diffusers(tmp_path: Path) -> None:
    old_names(tmp_path / "pytorch_lora_weights.safetensors")
    found = load_diffusers(tmp_path, pipeline("sd", components("sd")))
    assert len(found["unet"][0]) == len(layers(components("sd")["unet"], ATTENTION))
    check_equal("sd", tmp_path, found)


# Every loader that diffusers has, for a denoiser that stands for its own.


class Denoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, image_dim: int | None = None) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"to_q": nn.Linear(4, 4)})

    def fuse_qkv_projections(self) -> None:
        """Flux 2 asks for it."""


# aMUSEd's loader asks its pipeline for a UNet, which it does not have.
LOADERS = sorted(
    name for name in vars(lora_pipeline) if name.endswith("LoraLoaderMixin") and name[:4] not in ("Lora", "Amus")
)


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_of_diffusers(name: str, tmp_path: Path) -> None:
    loader = getattr(lora_pipeline, name)
    parts = [part for part in loader._lora_loadable_modules if not part.startswith("text_encoder")]
    models = {part: Denoiser() for part in parts}
    config = fl.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False)
    made = {parts[0]: (fl.init(models[parts[0]], config), config)}
    save_diffusers(tmp_path, made)
    pipe = type("Pipeline", (loader,), {"components": models})()
    ((part, (adapters, _)),) = load_diffusers(tmp_path, pipe).items()
    weight = torch.zeros(4, 4)
    want = made[part][0]["block.to_q.weight"].dense(weight)
    torch.testing.assert_close(adapters["block.to_q.weight"].dense(weight), want)


# Writing.


@pytest.mark.parametrize("kind", DENOISER)
@pytest.mark.parametrize("fields", [{"rank_pattern": {"to_q": 3}, "use_rslora": True}, {"use_dora": True}], ids=str)
def test_what_is_written_gives_our_outputs_in_the_pipeline(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    made = {}
    for i, (name, model) in enumerate(components(kind).items()):
        if fields.get("use_dora") and name.startswith("text"):
            continue
        given = fields if "rank_pattern" not in fields or not name.startswith("text") else {"use_rslora": True}
        targets = TEXT if name.startswith("text") else DENOISER[kind]
        config = fl.LoraConfig(target_modules=targets, r=2, lora_alpha=5, init_lora_weights=False, **given)
        made[name] = (fl.init(model, config, generator=torch.Generator().manual_seed(i)), config)
    save_diffusers(tmp_path, made)
    check_equal(kind, tmp_path, made)
    found = load_diffusers(tmp_path, pipeline(kind, components(kind)))
    have, want = by_funclora(kind, found), by_funclora(kind, made)
    for name, y in want.items():
        close(have[name], y)


def full() -> dict[str, Any]:
    config = fl.LoraConfig(target_modules=["to_q"], modules_to_save=["conv_out"])
    return {"unet": (fl.init(components("sd")["unet"], config), config)}


@pytest.mark.parametrize(
    ("made", "kind", "words"),
    [
        (dict, ConfigError, "with at least one entry"),
        (lambda: {"denoiser": full()["unet"]}, ConfigError, "expected a name such as 'unet'.*got 'denoiser'"),
        (lambda: {"unet": ({}, fl.LoraConfig(target_modules=["to_q"]))}, ConfigError, "no adapter for 'unet'"),
        (full, UnsupportedError, "unet: diffusers has no place for 'conv_out.weight'"),
    ],
)
def test_what_cannot_be_written(made: Callable[[], Any], kind: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        save_diffusers(tmp_path / "new", made())
    assert not (tmp_path / "new").exists()


# What is refused.


def changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A file of diffusers' after a change of its tensors."""

    def make(file: Path) -> None:
        made_by_diffusers("sd", file.parent, ["unet"])
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return make


def damaged_kohya(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        kohya_file("sd", file, ranks=[2], alphas=[1.0])
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return make


def first(tensors: dict[str, Tensor], end: str) -> str:
    return next(key for key in tensors if key.endswith(end))


def put(key: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


def halved(tensors: dict[str, Tensor]) -> None:
    del tensors[first(tensors, "lora_B.weight")]


def reshaped(tensors: dict[str, Tensor]) -> None:
    key = first(tensors, "to_q.lora_A.weight")
    tensors[key] = torch.ones(2, 5)


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors[first(tensors, "lora_A.weight")][0] = float("inf")


def without_prefix(tensors: dict[str, Tensor]) -> None:
    for key in [*tensors]:
        tensors[key.removeprefix("unet.")] = tensors.pop(key)


def no_safetensors(file: Path) -> None:
    file.write_bytes(b"x" * 100)


QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "half": (changed(halved), FormatError, "expected both factors of unet"),
    "shape": (changed(reshaped), FormatError, r"cannot load this file for text_encoder, unet: .*size mismatch"),
    "infinite": (changed(infinite), NonFiniteError, "A of '.*' contains NaN or infinity"),
    "prefix": (changed(without_prefix), FormatError, "belongs to none of the components 'text_encoder', 'unet'"),
    "other component": (
        changed(put("text_encoder_2.layers.0.q_proj.lora_A.weight", 2, 12)),
        FormatError,
        "'text_encoder_2.layers.0.q_proj.lora_A.weight' belongs to none of the components",
    ),
    "no factor": (changed(put("unet.conv_in.weight", 2)), UnsupportedError, "'unet.conv_in.weight' is no factor"),
    "unknown module": (
        changed(lambda t: t.update({f"unet.neck.lora_{x}.weight": torch.ones(2, 2) for x in "AB"})),
        FormatError,
        "UNet2DConditionModel has no module 'neck'",
    ),
    "dora of kohya": (damaged_kohya(put(f"{QUERY}.dora_scale", 8, 1)), UnsupportedError, "DoRA.*leaves out"),
    "locon": (damaged_kohya(put("lora_unet_conv_in.hada_w1_a", 2, 2)), UnsupportedError, "LoHa of LyCORIS"),
    "alpha alone": (
        damaged_kohya(put("lora_unet_neck.alpha")), FormatError, "lora_unet_neck.alpha",
    ),
    "not safetensors": (no_safetensors, FormatError, "not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    make, kind, words = REFUSED[case]
    make(tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(kind, match=words):
        load_diffusers(tmp_path, pipeline("sd", components("sd")))


def test_paths_and_components(tmp_path: Path) -> None:
    pipe = pipeline("sd", components("sd"))
    with pytest.raises(FormatError, match="expected one safetensors file, got none"):
        load_diffusers(tmp_path / "absent", pipe)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="only safetensors files are read"):
        load_diffusers(tmp_path, pipe)
    made_by_diffusers("sd", tmp_path, ["unet"])
    with pytest.raises(fl.errors.ArgumentError, match="components: expected a diffusers pipeline"):
        load_diffusers(tmp_path, components("sd")["unet"])
    with pytest.raises(UnsupportedError, match="no loader of LoRA files for Linear"):
        load_diffusers(tmp_path, {"transformer": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="expected 'unet' or 'transformer' among the models, got 'vae'"):
        load_diffusers(tmp_path, {"vae": nn.Linear(2, 2)})


FIELDS = [("init_lora_weights", "pissa", "init_lora_weights='pissa'"), ("use_dora", True, "has no magnitude")]


@pytest.mark.parametrize(("field", "value", "words"), FIELDS)
def test_metadata_that_does_not_fit(field: str, value: Any, words: str, tmp_path: Path) -> None:
    made_by_diffusers("sd", tmp_path, ["unet"])
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        fields = json.loads(opened.metadata()["lora_adapter_metadata"])
    fields[f"unet.{field}"] = value
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
    with pytest.raises(FuncloraError, match=words):
        load_diffusers(file, pipeline("sd", components("sd")))
