"""Settings: what is read, what is refused and how, and that writing and reading are inverse."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from funclora._apps.train.reading import as_toml, kind_of, option, read, write
from funclora._apps.train.settings import EMBEDDING, PREFERENCE, SEQ2SEQ, TASKS, TOKEN, Settings
from funclora.errors import ConfigError, FormatError, FuncloraError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "quantize": st.sampled_from(["none", "nf4", "fp4", "int8"]),
    "device": TEXT,
    "data": st.lists(TEXT.map(Path)).map(tuple),
    "task": st.sampled_from(TASKS),
    "validation_split": st.floats(0, 1, exclude_max=True),
    "text_field": TEXT,
    "rank": st.integers(1, 10**30),
    "alpha": st.floats(1e-30, 1e30),
    "rslora": st.booleans(),
    "targets": st.lists(TEXT).map(tuple),
    "init": st.sampled_from(["true", "false", "pissa", "pissa_niter_7", "olora"]),
    "lr": st.floats(1e-300, 1e300),
    "steps": st.none() | st.integers(1),
    "seed": st.integers(0, 2**63 - 1),
    "out": TEXT.map(Path),
    "wandb": st.none() | TEXT,
    "mlflow": st.none() | TEXT,
}


@st.composite
def overrides(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.sets(st.sampled_from(sorted(VALID))))
    values = {key: draw(VALID[key]) for key in sorted(keys)}
    others = (SEQ2SEQ, TOKEN, PREFERENCE, EMBEDDING)  # which read other fields
    if "text_field" in values and values.get("task") in others:
        del values["text_field"]
    return values


@given(overrides())
def test_written_and_read_again_is_the_same(values: dict[str, Any]) -> None:
    settings = read(None, values)
    assert all(getattr(settings, key) == value for key, value in values.items())
    with tempfile.TemporaryDirectory() as folder:
        write(settings, Path(folder, "run.toml"))
        assert read(Path(folder, "run.toml"), {}) == settings
        # Of texts, too, as a command line gives them.
        texts = {k: str(v) if isinstance(v, (int, float, Path)) and not isinstance(v, bool) else v
                 for k, v in values.items()}  # fmt: skip
        assert read(None, texts) == settings


@given(overrides())
def test_yaml_says_the_same_as_toml(values: dict[str, Any]) -> None:
    settings = read(None, values)
    plain = {
        k: str(v) if isinstance(v, Path) else [*map(str, v)] if isinstance(v, tuple) else v for k, v in values.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.yaml")
        file.write_text(yaml.safe_dump(plain, allow_unicode=True), encoding="utf-8")
        assert read(file, {}) == settings


@given(st.sampled_from([".toml", ".yaml"]), st.binary() | st.text().map(str.encode))
def test_any_bytes_are_settings_or_an_error_of_ours(suffix: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"run{suffix}")
        file.write_bytes(content)
        try:
            assert isinstance(read(file, {}), Settings)
        except FuncloraError as error:
            assert str(file) in str(error)  # noqa: PT017


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(st.sampled_from([f.name for f in fields(Settings)]), JUNK)
def test_a_value_of_any_kind_is_taken_or_refused_by_the_name_of_its_option(key: str, value: Any) -> None:
    try:
        read(None, {key: value})
    except ConfigError as error:
        assert option(key) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".toml", "rnak = 3", r"run.toml: 'rnak' is not a key of a run. Near names: rank\."),
        (".toml", "rank = 3\nrank = 4", "is not valid TOML: "),
        (".yaml", "rank: 3\nrank: 4", "is not valid YAML: line 2: 'rank' appears twice"),
        (".yaml", "[1, 2]", r"expected keys with values, got \[1, 2\]"),
        (".yaml", "1: 2", "expected names as keys, got 1"),
        (".yaml", "a: &a [*a]", "'a' is not a key"),
        (".yaml", "!!python/object/apply:os.system ['true']", "is not valid YAML: could not determine a constructor"),
        (".toml", "rank = true", "run.toml: rank: expected a whole number, got True"),
        (".toml", "rank = 3.0", "run.toml: rank: expected a whole number, got 3.0"),
        (".toml", "rank = '3'", "run.toml: rank: expected a whole number, got '3'"),
        (".toml", "rank = 0", "run.toml: rank: expected at least 1, got 0"),
        (".toml", "lr = nan", "lr: expected a number, got nan"),
        (".toml", "lr = inf", "lr: expected a number, got inf"),
        (".toml", "lr = 0", "lr: expected more than 0.0, got 0"),
        (".toml", "dropout = 1.0", "dropout: expected less than 1.0"),
        (".toml", "method = 'lroa'", "method: expected one of lora, dora, got 'lroa'. Near names: lora"),
        (".toml", "sample = 'x, y'", "sample: expected a list of texts, got 'x, y'"),
        (".toml", "targets = [1]", "targets: expected a text, got 1"),
        (".toml", "data = ''", "data: expected a text, got an empty one"),
        (".toml", "packing = 1", "packing: expected true or false, got 1"),
        (".toml", "steps = 3\nepochs = 2.0", "run.toml: steps and .*run.toml: epochs exclude each other"),
        (".toml", "validation = 'a'\nvalidation_split = 0.1", "validation and .*validation_split exclude each other"),
        (".toml", "init = 'pisa'", "init: expected one of .*, got 'pisa'. Near names: pissa"),
        (".toml", "init = 'loftq'", "init: loftq compensates for 4-bit quantisation"),
        (".toml", "double_quant = true", "double_quant: only nf4 and fp4 have scales"),
        (".toml", "packing = true\ntask = 'seq2seq'", "packing: only causal-lm and preference use it"),
        (".toml", "train_on = 'all'\ntask = 'seq2seq'", "train_on: only causal-lm uses it"),
        (".toml", "text_field = 'x'\ntask = 'seq2seq'", "text_field: only causal-lm and sequence-classification use "),
        (".toml", "label_field = 'x'", "label_field: only sequence-classification, token-classification and"),
        (".toml", "sample_tokens = 3", "sample_tokens: there is no prompt to continue. Give --sample too"),
        (".toml", "patience = 2", "patience: needs evaluations"),
        (".toml", "model = 'm'", "--data: there is no data to train m on"),
        (".txt", "rank = 3", r"expected a .toml or .yaml file"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, suffix: str, content: str, message: str) -> None:
    file = tmp_path / f"run{suffix}"
    file.write_text(content)
    with pytest.raises(FuncloraError, match=message):
        read(file, {})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="there is no such file"):
        read(tmp_path / "none.toml", {})
    (tmp_path / "latin.toml").write_bytes(b"data = '\xe9'")
    with pytest.raises(FormatError, match="is not UTF-8, from byte 8 on"):
        read(tmp_path / "latin.toml", {})
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(FormatError, match="is larger than"):
        read(tmp_path / "large.toml", {})
    (tmp_path / "deep.yaml").write_text("[" * 60_000)
    with pytest.raises(FormatError, match="is not valid YAML"):
        read(tmp_path / "deep.yaml", {})


def test_the_command_line_wins_and_may_choose_the_other_of_two(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("epochs = 3.0\nrank = 4\nvalidation_split = 0.5")
    settings = read(file, {"steps": "7", "rank": 8, "validation": "held.jsonl"})
    assert (settings.steps, settings.epochs, settings.rank) == (7, 1.0, 8)
    assert (settings.validation, settings.validation_split) == (Path("held.jsonl"), 0.05)
    with pytest.raises(ConfigError, match=r"^--rank: expected a whole number, got 'x'"):
        read(file, {"rank": "x"})


def test_yaml_knows_numbers_without_a_point(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 2e-4\nalpha: 8\ninit: true\nsteps: 10\n")
    settings = read(file, {})
    assert (settings.lr, settings.alpha, settings.init, settings.steps) == (2e-4, 8.0, "true", 10)


def test_every_key_has_a_group_a_text_and_a_kind() -> None:
    for f in fields(Settings):
        assert {"group", "help"} <= f.metadata.keys()
        assert kind_of(f.name)[0] in (bool, int, float, str, Path, tuple)
    groups = [f.metadata["group"] for f in fields(Settings)]
    assert sorted(set(groups), key=groups.index) == [g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]
    for task in (PREFERENCE, EMBEDDING):  # each has a group of its own
        assert as_toml(Settings(task=task)).count("# ") == len(set(groups)) - 1
