"""Merging into folders: what PEFT's merge gives, in a folder that transformers loads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from checkpoints import contents, load, merged_by_peft, save_adapter, save_base, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import funclora as fl
from funclora._files import safetensors as _safetensors
from funclora.errors import (
    ConfigError,
    FormatError,
    NonFiniteError,
    PeftFormatWarning,
    TargetError,
    UnsupportedError,
)
from funclora.io.merge import write as _merge_write
from funclora.rules.layouts import Embedding

transformers.utils.logging.disable_progress_bar()

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
HALVES = (torch.bfloat16, torch.float16)


def same(got: dict[str, Tensor], want: dict[str, Tensor], base: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Equal keys, and values within one rounding of the files' dtype and of the float32 that they were summed in."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        actual, expected, weight = got[name].double(), value.double(), base[name].double()
        if not value.is_floating_point() or not value.numel():
            assert torch.equal(actual, expected)
            continue
        tolerance = torch.finfo(dtype).eps * (expected.abs() + weight.abs())
        tolerance += 8 * torch.finfo(torch.float32).eps * expected.abs().max()
        worst = ((actual - expected).abs() - tolerance).max()
        assert worst <= 0, f"{name}: {worst}"


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": "all-linear"}),
    "rslora and patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"layers.1.mlp.down_proj": 7},
        },
    ),
    "dora, embeddings, new head": (
        "llama",
        {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "biases": ("bert", {"target_modules": ["query", "dense"], "bias": "all"}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "wo"], "use_dora": True}),
    "patches": (
        "vit",
        {
            "target_modules": ["q_proj", "projection"],
            "use_dora": True,
            "bias": "lora_only",
            "modules_to_save": ["classifier"],
        },
    ),
    "convolutions": ("resnet", {"target_modules": ["convolution"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts and biases": ("qwen2-moe", {"target_modules": ["v_proj"], "target_parameters": EXPERTS, "bias": "all"}),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("shard", [None, "5KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_peft(case: str, shard: str | None, tmp_path: Path) -> None:
    kind, options = CASES[case]
    # Every dtype meets every kind of rule, without a run for each pair.
    dtype = (torch.float32, torch.bfloat16, torch.float16)[[*CASES].index(case) % 3 - (shard is None)]
    cls = type(save_base(tmp_path / "base", kind, dtype, shard))
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", **options)
    before = contents(tmp_path / "base")
    report = fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert contents(tmp_path / "base") == before
    want = merged_by_peft(tmp_path / "base", cls, tmp_path / "adapter")
    base = load(tmp_path / "base", cls).state_dict()
    same(load(tmp_path / "out", cls).state_dict(), want, base, dtype)
    changed = {name for name in want if not torch.equal(want[name], base[name])}
    tied = {"cls.predictions.decoder.bias"}  # written under its other name
    assert {weight.name for weight in report.weights} | tied == changed | tied
    # The files are those of the base, with the same tensors in them.
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in (tmp_path / "base").iterdir()}
    for file in (tmp_path / "base").glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "out" / file.name).keys()
    checked = report.verification
    assert checked is not None
    assert max(checked.deviations.values()) <= (0.51 if dtype in HALVES else 8)
    assert checked.logits is not None, checked.skipped


def test_rounding_happens_once(tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "llama", torch.bfloat16))
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", target_modules=["q_proj"])
    fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    model = load(tmp_path / "base", cls)
    adapters, _ = fl.load_peft(tmp_path / "adapter", model)
    got = tensors(tmp_path / "out")
    for name, rule in adapters.items():
        assert isinstance(rule, fl.LoRA)
        exact = model.get_parameter(name).double() + rule.scaling * rule.b.double() @ rule.a.double()
        half = (torch.nextafter(got[name], got[name] * 2) - got[name]).double().abs() / 2
        assert ((got[name].double() - exact).abs() <= half * (1 + 1e-3)).all()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("what", ["embed_tokens", "lm_head", "saved"])
def test_a_tied_model_comes_apart(what: str, tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "llama", shard="5KB", tie_word_embeddings=True))
    assert "lm_head.weight" not in tensors(tmp_path / "base")
    options = {"modules_to_save": ["lm_head"]} if what == "saved" else {}
    targets = ["q_proj"] if what == "saved" else ["q_proj", what]
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", target_modules=targets, **options)
    report = fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert report.untied == ("lm_head.weight",)
    merged = load(tmp_path / "out", cls)
    assert merged.config.tie_word_embeddings is False
    touched, other = merged.lm_head.weight, merged.model.embed_tokens.weight
    if what == "embed_tokens":
        touched, other = other, touched
    table = tensors(tmp_path / "base")["model.embed_tokens.weight"]
    assert torch.equal(other, table)
    assert (touched - table).abs().max() > 1e-3
    # PEFT's own merge would change the shared table: its forward is what counts.
    model = peft.PeftModel.from_pretrained(load(tmp_path / "base", cls), tmp_path / "adapter").eval()
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_what_cannot_come_apart_is_refused(tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "t5"))
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", target_modules=["q"], modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedError, match=r"'lm_head.weight'.* T5ForConditionalGeneration changes more than"):
        fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A Llama with tokenizer files and the like, and two LoRA adapters of it that overlap."""
    base = tmp_path / "base"
    cls = type(save_base(base, "llama", torch.bfloat16, "5KB"))
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"0")
    (base / "sub").mkdir()
    (base / "sub" / "chat.jinja").write_text("hello")
    (base / "sub" / "model.gguf").write_bytes(b"0")
    save_adapter(base, cls, tmp_path / "one", target_modules=["q_proj", "v_proj"])
    save_adapter(base, cls, tmp_path / "two", target_modules=["v_proj", "o_proj"], r=3)
    return tmp_path


def test_weighted_adapters_add_up(folders: Path) -> None:
    ways = ["one", "two"], ["two", "one"]
    weights = {"one": 0.75, "two": -2.0}
    for i, names in enumerate(ways):
        fl.merge_checkpoint(
            folders / "base",
            [folders / n for n in names],
            folders / f"out{i}",
            weights=[weights[n] for n in names],
            dtype=torch.float64,
            verify=True,
        )
    model = load(folders / "base", transformers.LlamaForCausalLM, dtype=torch.float64)
    want = fl.base_params(model)
    for name, weight in weights.items():
        adapters, _ = fl.load_peft(folders / name, model)
        for target, rule in adapters.items():
            assert isinstance(rule, fl.LoRA)
            want[target] = want[target] + weight * rule.scaling * rule.b.double() @ rule.a.double()
    for i in range(2):
        got = tensors(folders / f"out{i}")
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


def test_the_small_files_and_the_dtype(folders: Path) -> None:
    report = fl.merge_checkpoint(folders / "base", folders / "one", folders / "out", dtype=torch.float16)
    got, base = contents(folders / "out"), contents(folders / "base")
    assert {"tokenizer.json", "generation_config.json", "sub/chat.jinja"} <= got.keys()
    assert all(got[name] == base[name] for name in got if not name.startswith(("config.json", "model")))
    assert not {"pytorch_model.bin", "sub/model.gguf"} & got.keys()
    assert report.skipped == ("pytorch_model.bin", "sub/model.gguf")
    assert json.loads(got["config.json"])["dtype"] == "float16"
    assert {t.dtype for t in tensors(folders / "out").values()} == {torch.float16}
    before = tensors(folders / "base")
    for name, value in tensors(folders / "out").items():
        if not name.endswith(("q_proj.weight", "v_proj.weight")):
            assert torch.equal(value, before[name].to(torch.float16)), name
    assert load(folders / "out", transformers.LlamaForCausalLM).dtype == torch.float16
    # Any user may read the result, as one of transformers.
    modes = {f.stat().st_mode & 0o777 for f in (folders / "out").glob("*.safetensors")}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize(("size", "files"), [("1GB", 1), (3000, 6), ("6.5KB", 3)])
def test_the_size_of_files(folders: Path, size: str | int, files: int) -> None:
    report = fl.merge_checkpoint(folders / "base", folders / "one", folders / "out", max_shard_size=size)
    assert len(report.files) == len([*(folders / "out").glob("*.safetensors")]) == files
    assert (folders / "out" / "model.safetensors.index.json").exists() == (files > 1)
    fl.merge_checkpoint(folders / "base", folders / "one", folders / "plain")
    got, want = tensors(folders / "out"), tensors(folders / "plain")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    load(folders / "out", transformers.LlamaForCausalLM)


def test_a_dry_run_says_it_all_and_writes_nothing(folders: Path) -> None:
    dry = fl.merge_checkpoint(folders / "base", folders / "one", folders / "out", dry_run=True)
    assert sorted(f.name for f in folders.iterdir()) == ["base", "one", "two"]
    assert dry == fl.merge_checkpoint(folders / "base", folders / "one", folders / "out")
    weight = dry.weights[0]
    assert (weight.name, weight.change) == ("model.layers.0.self_attn.q_proj.weight", "LoRA r=2")
    assert (weight.shape, weight.before, weight.nbytes) == ((16, 16), torch.bfloat16, 512)
    assert dry.unchanged == 21 - 4


@pytest.mark.parametrize("place", [".", "base", "base/out", "one", "full", "file"])
def test_an_out_dir_in_use_is_refused(folders: Path, place: str) -> None:
    (folders / "full").mkdir()
    (folders / "full" / "x").touch()
    (folders / "file").touch()
    before = contents(folders)
    with pytest.raises(ConfigError, match="out_dir: "):
        fl.merge_checkpoint(folders / "base", folders / "one", folders / place)
    assert contents(folders) == before


def test_an_empty_out_dir_is_taken(folders: Path) -> None:
    (folders / "out").mkdir()
    fl.merge_checkpoint(folders / "base", folders / "one", folders / "out")
    assert (folders / "out" / "config.json").exists()


def edit(file: Path, change: Any) -> None:
    values = load_file(file)
    change(values)
    save_file(values, file, metadata={"format": "pt"})


def spoil(folders: Path, how: str) -> None:
    """Make something about the folders wrong."""
    adapter = folders / "one" / "adapter_model.safetensors"
    config = folders / "base" / "config.json"
    raw = json.loads(config.read_text())
    key = "base_model.model.model.layers.0.self_attn.{}.lora_B.weight"
    shard = next(iter(sorted((folders / "base").glob("*.safetensors"))))
    if how == "unknown key":
        edit(adapter, lambda v: v.update({key.format("k_proj"): v[key.format("q_proj")].clone()}))
    elif how == "zero":
        edit(adapter, lambda v: [t.zero_() for k, t in v.items() if "lora_B" in k])
    elif how == "nan":
        edit(adapter, lambda v: v[key.format("q_proj")].fill_(torch.nan))
    elif how == "overflow":
        edit(adapter, lambda v: [t.fill_(1e20) for k, t in v.items() if "0.self_attn.q_proj" in k])
    elif how == "missing weight":
        name = "model.layers.0.self_attn.q_proj.weight"
        for file in (folders / "base").glob("*.safetensors"):
            edit(file, lambda v: v.pop(name, None))
        index = folders / "base" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {
            k: v for k, v in json.loads(index.read_text())["weight_map"].items() if k != name
        }}))  # fmt: skip
    elif how == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "lost shard":
        shard.unlink()
    elif how == "pickles":
        for file in (folders / "base").glob("model*"):
            file.unlink()
    elif how == "quantised":
        config.write_text(json.dumps(raw | {"quantization_config": {"quant_method": "fp8"}}))
    elif how == "no class":
        config.write_text(json.dumps(raw | {"architectures": ["NoSuchModel"]}))
    elif how == "other sizes":
        config.write_text(json.dumps(raw | {"intermediate_size": 24}))
    elif how == "adapter in base":
        shutil.copy(folders / "one" / "adapter_config.json", folders / "base")
    elif how == "other model":
        shutil.rmtree(folders / "base")
        save_base(folders / "base", "gpt2")


WRONG = {
    "unknown key": (FormatError, r"unexpected key .*k_proj"),
    "zero": (FormatError, r"one: all its updates are zero"),
    "nan": (NonFiniteError, r"q_proj.* holds NaN"),
    "overflow": (NonFiniteError, r"merging 'model.layers.0.self_attn.q_proj.weight' gives NaN or infinity"),
    "missing weight": (FormatError, r"does not contain 'model.layers.0.self_attn.q_proj.weight'"),
    "cut shard": (FormatError, r"not a safetensors file, or it is cut off"),
    "lost shard": (FormatError, r"model-00001.* does not exist"),
    "pickles": (UnsupportedError, r"pytorch_model.bin is a pickle"),
    "quantised": (UnsupportedError, r"quantised \(quantization_config\)"),
    "no class": (UnsupportedError, r"has no model class 'NoSuchModel'"),
    "other sizes": (FormatError, r"has shape \[\d+, \d+\] in the checkpoint, but"),
    "adapter in base": (UnsupportedError, r"also contains an adapter"),
    "other model": (TargetError, r"matches no module"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_left(folders: Path, how: str) -> None:
    spoil(folders, how)
    before = contents(folders)
    error, message = WRONG[how]
    with pytest.raises(error, match=message):
        fl.merge_checkpoint(folders / "base", folders / "one", folders / "out")
    assert contents(folders) == before


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "one for each of 2"), ([1.0, 0.0], "other than 0"), ([1.0, float("inf")], "finite")],
)
def test_weights_are_checked(folders: Path, weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=f"weights: .*{message}"):
        fl.merge_checkpoint(folders / "base", [folders / "one", folders / "two"], folders / "out", weights=weights)


def test_only_lora_updates_add_up(folders: Path) -> None:
    cls = transformers.LlamaForCausalLM
    save_adapter(folders / "base", cls, folders / "dora", target_modules=["q_proj"], use_dora=True)
    saved = {"target_modules": ["k_proj"], "modules_to_save": ["norm"]}
    save_adapter(folders / "base", cls, folders / "full", **saved)

    def merge(*names: str, **options: Any) -> Any:
        shutil.rmtree(folders / "out", ignore_errors=True)
        return fl.merge_checkpoint(folders / "base", [folders / n for n in names], folders / "out", **options)

    for names in (("dora", "one"), ("one", "dora")):
        with pytest.raises(UnsupportedError, match=r"'model.layers.0.self_attn.q_proj.weight' .* is a DoRA adapter"):
            merge(*names)
    with pytest.raises(UnsupportedError, match=r"weights: .*dora has the weight 0.5, but is a DoRA adapter"):
        merge("dora", weights=[0.5])
    with pytest.raises(UnsupportedError, match=r"weights: .*full has the weight 2, but fully fine-tunes it"):
        merge("full", weights=[2.0])
    with pytest.raises(UnsupportedError, match=r"several adapters, and .*full fully fine-tunes it"):
        merge("full", "full")
    merge("dora", "full", "two")  # they meet nowhere


def test_values_too_large_for_the_dtype(folders: Path) -> None:
    norm = "model.norm.weight"
    for file in (folders / "base").glob("*.safetensors"):
        edit(file, lambda v: v[norm].fill_(1e5) if norm in v else None)
    fl.merge_checkpoint(folders / "base", folders / "one", folders / "wide")
    with pytest.raises(NonFiniteError, match=f"{norm!r} contains values that are too large for torch.float16"):
        fl.merge_checkpoint(folders / "base", folders / "one", folders / "out", dtype=torch.float16)
    assert not (folders / "out").exists()


def test_verify_sees_a_wrong_number(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = _safetensors.spill

    def bent(descriptor: int, tensor: Tensor, at: int) -> None:
        true(descriptor, tensor + 2 * torch.finfo(tensor.dtype).eps * tensor, at)

    monkeypatch.setattr(_merge_write, "spill", bent)
    with pytest.raises(FormatError, match=r"'model.layers.0.self_attn.q_proj.weight' deviates by"):
        fl.merge_checkpoint(folders / "base", folders / "one", folders / "out", verify=True)
    assert sorted(f.name for f in folders.iterdir()) == ["base", "one", "two"]

    monkeypatch.setattr(_merge_write, "spill", true)
    monkeypatch.setattr(_merge_write, "copy_range", lambda *_: None)  # zeros stay where the base's bytes should be
    with pytest.raises(FormatError, match="differs from the base, although no adapter changes it"):
        fl.merge_checkpoint(folders / "base", folders / "one", folders / "out", verify=True)


def test_a_full_disk_is_seen_before_it_is_full(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folders)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="bytes are needed and 1,000 are free") as caught:
        fl.merge_checkpoint(folders / "base", folders / "one", folders / "out")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(f.name for f in folders.iterdir()) == ["base", "one", "two"]


def test_a_frozen_table_that_peft_writes_must_be_the_base(folders: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = transformers.LlamaForCausalLM
        save_adapter(folders / "base", cls, folders / "table", target_modules=["embed_tokens"])
    file = folders / "table" / "adapter_model.safetensors"
    key = next(key for key in load_file(file) if key.endswith("embed_tokens.base_layer.weight"))
    fl.merge_checkpoint(folders / "base", folders / "table", folders / "out")
    edit(file, lambda v: v[key].add_(1))
    with pytest.raises(FormatError, match=r"other values than 'model.embed_tokens.weight' has"):
        fl.merge_checkpoint(folders / "base", folders / "table", folders / "out2")


def test_differences_of_the_folder_are_told(folders: Path) -> None:
    file = folders / "one" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"new_field": 1}))
    with pytest.warns(PeftFormatWarning, match="unknown fields are ignored.*new_field"):
        fl.merge_checkpoint(folders / "base", folders / "one", folders / "out")


@pytest.mark.parametrize("dora", [False, True])
def test_memory_does_not_grow_with_a_weight(dora: bool, tmp_path: Path) -> None:
    """Anonymous memory while a table of 256 MiB is rewritten, and a matrix of 64 MiB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=1,
        vocab_size=32768, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "base")
    state = {name: torch.full(t.shape, 0.5) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    target = "gate_proj" if dora else "embed_tokens"
    lora = fl.LoraConfig(r=2, target_modules=[target], use_dora=dora)
    name = f"model.layers.0.mlp.{target}.weight" if dora else f"model.{target}.weight"
    n_out, n_in = state[name].shape if dora else state[name].T.shape
    a, b = torch.full((2, n_in), 0.1), torch.full((n_out, 2), 0.1)
    rule = fl.DoRA(a, b, torch.ones(n_out), scaling=4.0) if dora else fl.LoRA(a, b, scaling=4.0, layout=Embedding())
    fl.save_peft(tmp_path / "adapter", {name: rule}, lora)
    size = state[name].nbytes
    del state, rule

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

    seen = [start := anonymous()]
    fl.merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=lambda *_: seen.append(anonymous())
    )
    assert len(seen) > 4
    assert max(seen) - start < size / 2, (max(seen) - start) >> 20


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["tokens", "lora", "saved"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_adapters_tie_stays_tied(tied: bool, options: dict[str, Any], tmp_path: Path) -> None:
    options = options if tied else {k: v for k, v in options.items() if k != "ensure_weight_tying"}
    cls = type(save_base(tmp_path / "base", "llama", tie_word_embeddings=tied))
    model = load(tmp_path / "base", cls)
    config = fl.LoraConfig(r=2, init_lora_weights=False, **options)
    adapters = fl.init(model, config, generator=torch.Generator().manual_seed(0))
    for name, rule in adapters.items():
        if isinstance(rule, (fl.Full, fl.TrainableTokens)):
            adapters[name] = replace(rule, value=rule.value + 1)
    fl.save_peft(tmp_path / "adapter", adapters, config)
    report = fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert report.untied == ()
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
    merged = load(tmp_path / "out", cls)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        want = fl.apply(model, fl.base_params(model), adapters, input_ids=ids).logits
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-5, atol=1e-5)
        assert (model(ids).logits - want).abs().max() > 0.05


def test_the_bias_of_b_is_merged(tmp_path: Path) -> None:
    cls = type(save_base(tmp_path / "base", "bert"))
    model = load(tmp_path / "base", cls)
    config = fl.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, lora_bias=True, target_modules=["query"])
    adapters = fl.init(model, config, generator=torch.Generator().manual_seed(0))
    fl.save_peft(tmp_path / "adapter", adapters, config)
    fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    got, want = load(tmp_path / "out", cls).state_dict(), fl.merge(fl.base_params(model), adapters)
    changed = [name for name in want if not torch.equal(want[name], model.state_dict()[name])]
    assert len(changed) == 4
    for name in changed:
        torch.testing.assert_close(got[name], want[name])
