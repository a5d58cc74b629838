"""Outlines of models in the user's cache: commands write the same bytes with them, and need no transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import MODELS, contents
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import funclora
import funclora as fl
from funclora._config.embeddings import input_embeddings, output_embeddings
from funclora._config.layers import weights_of
from funclora._config.outlined import Outlined, asked, original_of
from funclora._files.cache import get, put
from funclora._torch.pytree import map_tensors
from funclora.cli._app import app
from funclora.errors import FormatError, UnsupportedError
from funclora.io.hf import outline as _outline
from funclora.io.hf import remembered as _remembered
from funclora.io.hf import structure as _structure
from funclora.io.hf.outline import outlined

HEAVY = ("transformers", "torch.distributed.tensor", "torch._dynamo", "PIL", "accelerate", "peft", "torchvision")
Result = tuple[int, str, str]


def llava() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    text = MODELS["llama"]().config
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**vision), text_config=text)
    )


def tied() -> Any:
    return MODELS["llama"](tie_word_embeddings=True)


# The base, what the adapter changes, the class that it was trained on, and what it converts to.
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], str, list[str]]] = {
    "llama": (MODELS["llama"], {"target_modules": "all-linear"}, "", ["gguf", "mlx"]),
    "gpt2": (MODELS["gpt2"], {"target_modules": ["c_attn", "c_proj"]}, "", ["gguf"]),
    "tied": (tied, {"target_modules": ["q_proj"]}, "", ["gguf", "mlx"]),
    "tied, and untied": (tied, {"target_modules": ["q_proj", "embed_tokens"]}, "", []),
    "experts": (MODELS["mixtral"], {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, "", ["gguf"]),
    "shared experts": (MODELS["qwen2-moe"], {"target_modules": ["q_proj", "shared_expert.up_proj"]}, "", ["mlx"]),
    "classifier": (
        MODELS["llama"],
        {"target_modules": ["v_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"},
        "LlamaForSequenceClassification",
        [],
    ),
    "image and text": (llava, {"target_modules": ["q_proj", "fc1"], "use_dora": True}, "", []),
    "convolutions": (MODELS["resnet"], {"target_modules": ["convolution"]}, "", []),
}


def save_adapter(model: Any, fields: dict[str, Any], folder: Path, seed: int) -> None:
    config = fl.LoraConfig(r=2, lora_alpha=3, **fields)
    torch.manual_seed(seed)
    adapters = map_tensors(lambda tensor: tensor + 0.1 * torch.randn_like(tensor), fl.init(model, config))
    fl.save_peft(folder, adapters, config, model=model)


def lines(root: Path) -> Iterator[list[str]]:
    """The commands, which write into the current folder."""
    for name, (_, _, _, formats) in CASES.items():
        folder = root / name
        base, one, two = (str(folder / part) for part in ("base", "one", "two"))
        yield ["inspect", one, "--base", base, "--json"]
        yield ["merge", base, one, "-o", f"{name} merged", "--json"]
        yield ["diff", one, two, "--base", base, "--json"]
        for to in formats:
            yield ["convert", one, "--to", to, "--base", base, "-o", f"{name} {to}", "--json"]
            yield ["convert", f"{name} {to}", "--from", to, "--base", base, "-o", f"{name} from {to}", "--json"]
    yield ["extract", str(root / "llama" / "base"), "llama merged", "-o", "extracted", "--rank", "2", "--json"]
    # What cannot be done is said in the same words.
    yield ["merge", str(root / "gpt2" / "base"), str(root / "llama" / "one"), "-o", "other", "--json"]
    yield ["convert", str(root / "gpt2" / "one"), "--to", "mlx", "--base", str(root / "gpt2" / "base"), "-o", "no mlx"]
    yield ["convert", str(root / "llama" / "one"), "--to", "mlx", "--base", str(root / "wrong"), "-o", "no model"]


REFUSED = 3  # the last of them

IN_A_PROCESS = """
import json, sys
from funclora.cli._app import app
from typer.testing import CliRunner
results, heavy = [], {}
for line in json.load(sys.stdin):
    done = CliRunner().invoke(app, line)
    results.append([done.exit_code, done.stdout, done.stderr])
    heavy = {name: line for name in %r if name in sys.modules} | heavy
json.dump({"results": results, "heavy": heavy}, sys.stdout)
"""


class Runs:
    """The same commands three times: without a cache, with an empty one, and in another process with the full one.

    Attributes:
        lines: the commands.
        results: of each time, the exit code, stdout and stderr of each command.
        files: of each time, what was written.
        heavy: the large packages that the other process has imported, and the command that did.
        cache: the folder of the cache.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        for name, (build, fields, other, _) in CASES.items():
            torch.manual_seed(1)
            base = build()
            base.save_pretrained(root / name / "base")
            model = getattr(transformers, other)(base.config) if other else base
            for seed, adapter in enumerate(("one", "two")):
                save_adapter(model, fields, root / name / adapter, seed)
        self.lines, self.cache = [*lines(root)], root / "cache"
        self.results: list[list[Result]] = []
        self.files: list[dict[str, bytes]] = []
        patch.setattr(_remembered, "IMPORTED_BEFORE", False)
        for run in ("off", "empty", "full"):
            (root / run).mkdir()
            patch.chdir(root / run)
            patch.setenv("FUNCLORA_CACHE_DIR", "" if run == "off" else str(self.cache))
            self.results.append(self._in_a_process() if run == "full" else [*map(invoked, self.lines)])
            self.files.append(contents(root / run))

    def _in_a_process(self) -> list[Result]:
        paths = [str(Path(funclora.__file__).parents[1])]
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS % (HEAVY,)], input=json.dumps(self.lines), check=False, timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        self.heavy: dict[str, list[str]] = found["heavy"]
        return [tuple(result) for result in found["results"]]


def invoked(line: list[str]) -> Result:
    done = CliRunner().invoke(app, line)
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        yield Runs(tmp_path_factory.mktemp("outlines"), patch)


def test_commands_say_the_same_with_outlines(runs: Runs) -> None:
    off, empty, full = runs.results
    for line, *said in zip(runs.lines, off, empty, full, strict=True):
        assert said[1] == said[0], f"{line}: with an empty cache"
        assert said[2] == said[0], f"{line}: with what was remembered"
    codes = [code for code, _, _ in off]
    assert codes == [0] * (len(codes) - REFUSED) + [2] * REFUSED, off


def test_commands_write_the_same_bytes_with_outlines(runs: Runs) -> None:
    off, empty, full = runs.files
    assert len(off) > 30
    for found in (empty, full):
        assert found.keys() == off.keys()
        assert [name for name in off if found[name] != off[name]] == []


def test_what_was_seen_needs_no_transformers(runs: Runs) -> None:
    assert runs.heavy == {}


# --- what is remembered, and when it is not used ----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that is used although the tests have imported transformers."""
    monkeypatch.setattr(_remembered, "IMPORTED_BEFORE", False)
    monkeypatch.setenv("FUNCLORA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "structures"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations of which a model was made."""
    found: list[Any] = []
    build = _structure.build

    def counted(folder: Path, config: Any, *rest: Any) -> nn.Module:
        found.append(config)
        return build(folder, config, *rest)

    monkeypatch.setattr(_structure, "build", counted)
    return found


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    base = MODELS["llama"]()
    base.save_pretrained(tmp_path / "base")
    save_adapter(base, {"target_modules": ["q_proj"]}, tmp_path / "adapter", 1)
    return tmp_path / "base", tmp_path / "adapter"


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def test_a_model_is_made_once(folders: tuple[Path, Path], cache: Path, built: list[Any], tmp_path: Path) -> None:
    for i in range(3):
        fl.merge_checkpoint(*folders, tmp_path / str(i))
        assert len(built) == 1
    assert len([*cache.iterdir()]) == 1
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "configuration": lambda base, _: change_config(base, max_position_embeddings=77),
    "another tensor": lambda base, _: change_tensors(base, other=torch.ones(2)),
    "version": lambda _, patch: patch.setattr(_remembered, "environment", lambda: ["another"]),
    "format": lambda _, patch: patch.setattr(_outline, "_FORMAT", 0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_made_again(
    what: str,
    folders: tuple[Path, Path],
    cache: Path,
    built: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fl.merge_checkpoint(*folders, tmp_path / "first")
    CHANGES[what](folders[0], monkeypatch)
    fl.merge_checkpoint(*folders, tmp_path / "second")
    assert len(built) == 2
    fl.merge_checkpoint(*folders, tmp_path / "third")
    assert len(built) == 2


def test_the_environment_is_all_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = _remembered.environment.__wrapped__
    before = environment()
    assert before is not None
    assert environment() == before
    site = tmp_path / "site"
    (site / "timm-1.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    after = environment()
    assert after != before
    (site / "timm-1.0.dist-info").rename(site / "timm-1.1.dist-info")
    assert environment() not in (before, after)
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(_remembered, "_OWN", own)
    codes = [environment()]
    for text in ("a = 1", "a = 2"):
        (own / "module.py").write_text(text)
        codes.append(environment())
    assert len({json.dumps(code) for code in codes}) == 3


def test_a_source_folder_of_transformers_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `pip install -e`: its files may change while its version stays."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _remembered.environment.__wrapped__() is None


@pytest.mark.parametrize("off", ["variable", "imported before"])
def test_nothing_is_remembered(
    off: str, folders: tuple[Path, Path], cache: Path, built: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if off == "variable":
        monkeypatch.setenv("FUNCLORA_CACHE_DIR", "")
    else:
        monkeypatch.setattr(_remembered, "IMPORTED_BEFORE", True)
    for i in range(2):
        fl.merge_checkpoint(*folders, tmp_path / str(i))
    assert len(built) == 2
    assert not cache.exists()


ERRORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "class": (lambda base: change_config(base, architectures=["Unknown"]), "no model class 'Unknown'"),
    "size": (lambda base: change_config(base, hidden_size=8), "has shape .* in the checkpoint, but"),
    "layers": (
        lambda base: change_config(base, num_hidden_layers=3),
        "there is no '.*layers.2.self_attn.q_proj.lora_A.weight'",
    ),
    "many layers": (lambda base: change_config(base, num_hidden_layers=10**6), "expected at most 10000"),
    "shape": (
        lambda base: change_tensors(base, **{"model.layers.0.self_attn.q_proj.weight": torch.ones(3, 3)}),
        r"has shape \[3, 3\] in the checkpoint",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_the_same_and_not_remembered(
    what: str, folders: tuple[Path, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fl.merge_checkpoint(*folders, tmp_path / "sound")
    change, match = ERRORS[what]
    change(folders[0])
    said = []
    for variable in ("", os.environ["FUNCLORA_CACHE_DIR"], os.environ["FUNCLORA_CACHE_DIR"]):
        monkeypatch.setenv("FUNCLORA_CACHE_DIR", variable)
        with pytest.raises((FormatError, UnsupportedError), match=match) as caught:
            fl.merge_checkpoint(*folders, tmp_path / "out")
        said.append(str(caught.value))
    assert said == [said[0]] * 3


FOREIGN: dict[str, Callable[[Any], Any]] = {
    "another value": lambda value: ["not", "ours"],
    "no answers": lambda value: {**value, "answers": None},
    "no modules": lambda value: {**value, "outline": {**value["outline"], "modules": []}},
    "code": lambda value: json.loads(
        json.dumps(value).replace('"torch.nn.modules.linear", "Linear"', '"os", "system"')
    ),
    "no such class": lambda value: json.loads(json.dumps(value).replace('"Linear"', '"Nonlinear"')),
    "no such dtype": lambda value: json.loads(json.dumps(value).replace('"float32"', '"float33"')),
    "numbers for names": lambda value: {**value, "outline": 7},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_entry_is_replaced(
    what: str, folders: tuple[Path, Path], cache: Path, built: list[Any], tmp_path: Path
) -> None:
    fl.merge_checkpoint(*folders, tmp_path / "first")
    (key,) = (file.stem for file in cache.iterdir())
    value = get("structures", key)
    changed = FOREIGN[what](value)
    assert changed != value
    put("structures", key, changed)
    fl.merge_checkpoint(*folders, tmp_path / "second")
    assert len(built) == 2
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert get("structures", key) == value


# --- what an outline is ------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """What models have: shared modules and tensors, missing ones, buffers that are not saved, layers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(4, 6, bias=False), nn.Embedding(6, 4, padding_idx=1, max_norm=2.0)
        self.second = self.first
        self.table.weight = self.first.weight
        odd = nn.Conv2d(4, 8, (3, 1), dilation=2, groups=2, padding_mode="circular")
        self.convs = nn.ModuleList([odd, nn.Conv1d(2, 2, 1)])
        self.attention, self.recurrent = nn.MultiheadAttention(4, 2, kdim=3), nn.LSTM(4, 3, num_layers=2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3))
        self.nothing, self.empty = None, nn.ModuleList()
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float16), requires_grad=False)
        self.register_parameter("none", None)
        self.register_buffer("saved", torch.zeros(2, 2, dtype=torch.int64))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)
        self.is_transposed, self.depth, self.names = True, 3, ["a"]

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


@pytest.fixture
def outline(cache: Path) -> Any:
    """The outline of `Odd`, read from the cache."""
    outlined("odd", lambda: on_meta(Odd))
    return outlined("odd", lambda: on_meta(Odd))


def test_an_outline_has_the_modules_and_tensors_of_the_model(outline: Any) -> None:
    model: Any = on_meta(Odd)
    assert not isinstance(outline, Odd)
    assert type(outline).__name__ == "Odd"
    for (name, one), (other_name, other) in zip(
        model.named_modules(remove_duplicate=False), outline.named_modules(remove_duplicate=False), strict=True
    ):
        assert (name, type(one).__name__, weights_of(one)) == (other_name, type(other).__name__, weights_of(other))
        for kind in (nn.Linear, nn.Embedding, nn.Conv2d, nn.MultiheadAttention, nn.LSTM, nn.ModuleList):
            assert isinstance(one, kind) == isinstance(other, kind)
    assert outline.first is outline.second
    assert outline.table.weight is outline.first.weight
    assert type(outline.first) is nn.Linear
    for names in ("named_parameters", "named_buffers"):
        ones, others = (dict(getattr(each, names)()) for each in (model, outline))
        assert ones.keys() == others.keys()
        for name, one in ones.items():
            other = others[name]
            assert (one.shape, one.dtype, one.requires_grad) == (other.shape, other.dtype, other.requires_grad)
            assert other.is_meta
    assert {n: t.shape for n, t in outline.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    for each in (outline, model):
        assert (input_embeddings(each), output_embeddings(each)) == ("table", "")
    assert (outline.table.num_embeddings, outline.table.padding_idx, outline.table.max_norm) == (6, 1, 2.0)
    assert (outline.nothing, outline.none, outline.is_transposed) == (None, None, True)


def test_what_is_not_in_an_outline_comes_from_the_model(outline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(on_meta(Odd))
        return made[0]

    monkeypatch.setattr(outline.original, "_make", make)
    assert not hasattr(outline, "embed_scale")
    assert not made
    assert outline.depth == 3
    assert not hasattr(outline, "height")
    assert len(made) == 1
    for name in ("names", "get_input_embeddings"):
        with pytest.raises(RuntimeError, match=f"'{name}' of 'the model' must be asked of the original"):
            getattr(outline, name)
    with pytest.raises(RuntimeError, match="an outline of a Odd has no code"):
        outline(torch.ones(2))
    assert original_of(outline) is made[0]
    assert original_of(made[0]) is made[0]


def test_an_answer_is_remembered(outline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(model: Any) -> Any:
        assert isinstance(model, Odd)
        return {"depth": model.depth, "pair": (1, 2)}

    assert asked(outline, ["how deep"], ask) == {"depth": 3, "pair": [1, 2]}
    made: list[Any] = []
    again = outlined("odd", lambda: made.append(1) or on_meta(Odd))  # type: ignore[func-returns-value]
    assert asked(again, ["how deep"], ask) == {"depth": 3, "pair": [1, 2]}
    assert not made
    assert asked(Odd(), ["how deep"], ask)["pair"] == (1, 2)
    odd = object()
    assert asked(again, ["no JSON"], lambda model: odd) is odd


def test_a_model_without_an_outline_is_used_itself(cache: Path) -> None:
    """Its weights have values, which an outline does not have."""
    model = outlined("values", lambda: nn.Linear(2, 3))
    assert not isinstance(model, Outlined)
    assert not model.weight.is_meta
    assert not cache.exists()
