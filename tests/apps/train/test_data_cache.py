"""Large data on the disk: the examples, batches and weights are those of data in memory, and it is tokenised once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text_models import PLAIN, tokenizer

from funclora._apps.train import cache, examples, tokens
from funclora._apps.train.base import load_base
from funclora._apps.train.batches import Batches, evaluation
from funclora._apps.train.cache import FOLDER, META
from funclora._apps.train.examples import Data, prepare
from funclora._apps.train.packing import is_packed
from funclora._apps.train.rows import Example
from funclora._apps.train.run import run
from funclora._apps.train.settings import PREFERENCE, SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora._apps.train.setup import check_vocabulary
from funclora._apps.train.stored import Stored, Writer, sizes
from funclora._apps.train.tokenizer import ByteTokenizer
from funclora.errors import ConfigError, FormatError
from funclora.io.peft.folder import load_peft

HERE = Path(__file__).parents[2]
MODEL = Path("model")
TEXTS = [{"text": f"{i} " + "é words " * (i % 9)} for i in range(150)]
RECORDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "texts": (TEXTS, {"context": 20}),
    "pairs": ([{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(150)], {}),
    "chats": (
        [{"messages": [{"role": "user", "content": "a" * (i % 5)}, {"role": "assistant", "content": str(i)}]}
         for i in range(70)], {}),
    "packed": (TEXTS, {"context": 90, "packing": True}),
    "packed answers": (
        [{"prompt": "a" * (i % 5), "chosen": f"{i}", "rejected": "b" * (1 + i % 9)} for i in range(90)],
        {"task": PREFERENCE, "context": 60, "packing": True}),
    "classes": ([{"text": f"{i}", "label": "ab"[i % 2]} for i in range(90)], {"task": SEQUENCE}),
    "numbers": ([{"text": f"{i}", "text_pair": "a", "label": i / 7} for i in range(90)], {"task": SEQUENCE}),
    "several": ([{"text": f"{i}", "label": [0, i % 2, 1]} for i in range(90)], {"task": SEQUENCE}),
    "words": ([{"tokens": ["a", "b", str(i)], "label": [0, i % 2, 1]} for i in range(90)], {"task": TOKEN}),
    "translations": ([{"prompt": "a" * (i % 7), "completion": f"{i}"} for i in range(90)], {"task": SEQ2SEQ}),
    "a long text": ([{"text": "some words " * 200}], {"context": 30}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def all_data_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGE", 0)


def jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def settings(folder: Path, kind: str = "texts", **more: Any) -> Settings:
    rows, given = RECORDS[kind]
    return Settings(**{"data": (jsonl(folder / "data.jsonl", rows),), "model": MODEL, **given, **more})


def made(given: Settings, folder: Path | None) -> Data:
    return prepare(given, tokenizer(PLAIN, eos="</s>"), None, folder=folder)


@pytest.mark.parametrize("kind", RECORDS)
def test_examples_on_the_disk_are_those_in_memory(tmp_path: Path, kind: str) -> None:
    given = settings(tmp_path, kind, validation_split=0.1, batch=3)
    ours, want = made(given, tmp_path), made(given, None)
    assert (tmp_path / FOLDER / META).is_file()
    assert not isinstance(ours.train, list)
    assert len(want.train) > 10
    for mine, theirs in ((ours.train, want.train), (ours.validation, want.validation)):
        assert [*mine] == [*theirs] == [mine[i] for i in range(len(mine))]
        assert [tuple(map(int, size)) for size in sizes(mine)] == [(len(e.ids), len(e.labels)) for e in theirs]
        assert [*mine[2:5]] == [theirs[i] for i in range(len(theirs))][2:5]
        assert mine[-1] == theirs[-1]
    assert (ours.classes, ours.notes) == (want.classes, want.notes)
    assert is_packed(ours.train, given.task) == is_packed(want.train, given.task) == kind.startswith("packed")
    if kind != "a long text" and not kind.startswith("packed"):
        assert ours.digest() == want.digest()
    one, two = (Batches.of(given, data.train, 0) for data in (ours, want))
    for k in (0, 1, one.steps_per_epoch, 2 * one.steps_per_epoch - 1):
        assert one.rows(k) == two.rows(k)
    options = {"batch": 4, "pad": 0, "task": given.task}
    for mine, theirs in zip(*(evaluation(d.validation, **options) for d in (ours, want)), strict=True):  # type: ignore[arg-type]
        assert all(torch.equal(mine[key], theirs[key]) for key in (*mine, *theirs))


def test_files_with_weights_and_validation(tmp_path: Path) -> None:
    held = jsonl(tmp_path / "held.jsonl", TEXTS[:3])
    more = jsonl(tmp_path / "more.jsonl", TEXTS[:20])
    given = settings(tmp_path, validation=held, validation_split=0.0)
    given = replace(given, data=(*given.data, more), weights=(0.5, 2.0))
    ours, want = made(given, tmp_path), made(given, None)
    assert (ours.shares, [*ours.validation]) == (want.shares, want.validation)
    assert ours.digest() == want.digest()


def test_data_are_tokenised_once_for_their_contents_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path)
    first = made(given, tmp_path)
    read: list[str] = []
    own = tokens.reader

    def reader(*args: Any) -> Any:
        read.append("again")
        return own(*args)

    monkeypatch.setattr(examples, "reader", reader)
    again = made(given, tmp_path)
    assert (read, [*again.train], again.notes, again.digest()) == ([], [*first.train], first.notes, first.digest())
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "data.jsonl").rename(moved / "data.jsonl")
    made(replace(given, data=(moved / "data.jsonl",), rank=3, out=moved), tmp_path)
    assert read == []
    given = replace(given, data=(moved / "data.jsonl",))
    changes = (replace(given, context=21), replace(given, seed=1), given, replace(given, fields=("system=x",)))
    for n, changed in enumerate(changes, 1):
        made(changed, tmp_path)
        assert len(read) == n
    prepare(given, tokenizer(PLAIN, eos=None), None, folder=tmp_path)
    assert len(read) == 5
    made(given, tmp_path)
    file = given.data[0]
    file.write_text(file.read_text().replace("149", "148"))
    assert any("148" in tokenizer().decode(example.ids) for example in made(given, tmp_path).train)
    assert len(read) == 7


@pytest.mark.parametrize("name", ["train.arrow", "train.sizes", "validation.arrow", META])
@pytest.mark.parametrize("how", ["changed", "cut off", "removed"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, name: str, how: str) -> None:
    given = settings(tmp_path)
    first = [*made(given, tmp_path).train]
    file = tmp_path / FOLDER / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(content if how == "changed" else content[: len(content) // 2])
    assert [*made(given, tmp_path).train] == first


def test_data_that_cannot_be_used_leave_no_cache(tmp_path: Path) -> None:
    given = settings(tmp_path)
    jsonl(given.data[0], [*TEXTS, {"text": 5}])
    with pytest.raises(FormatError, match=r"data\.jsonl:151: text: expected a text, got 5"):
        made(given, tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_small_data_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGE", 1 << 24)
    assert isinstance(made(settings(tmp_path), tmp_path).train, list)
    assert not (tmp_path / FOLDER).exists()


def test_an_id_that_the_model_lacks_is_found_on_the_disk(tmp_path: Path) -> None:
    base = load_base(Settings(), ByteTokenizer())
    writer = Writer(tmp_path / "rows.arrow")
    writer.extend(Example([i, 300 if i == 70 else 1], [-100, 1], (2,), f"d:{i}") for i in range(200))
    writer.close()
    stored = Stored(tmp_path / "rows.arrow", writer.sizes(), writer.largest, writer.digest)
    with pytest.raises(ConfigError, match=r"d:70: token 300 has the id 300, but the embedding .* has 256 rows"):
        check_vocabulary(base, stored)


# A child that trains the demo's model, and is killed.
CHILD = """
import os, signal, sys
from pathlib import Path
from dying import die_after_writing
from funclora._apps.train import cache, stored
cache.LARGE = 0
if sys.argv[2] == "tokenising":
    own, calls = stored.Writer.extend, []
    def extend(self, rows):
        own(self, rows)
        calls.append(0)
        if len(calls) == 40:
            os.kill(os.getpid(), signal.SIGKILL)
    stored.Writer.extend = extend
else:
    die_after_writing("00000004.safetensors", 9000)
from funclora._apps.train.reading import read
from funclora._apps.train.run import run
run(read(Path(sys.argv[1]), {}), quiet=True)
"""


def test_killed_while_tokenising_and_training_a_run_ends_as_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from funclora._apps.train.reading import write
    from funclora.demo.model import load_base as demo

    given = settings(tmp_path, model=None, steps=7, batch=3, save_every=2, rank=2, dropout=0.1, out=tmp_path / "run")
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    for moment, resume in (("tokenising", False), ("training", False)):
        write(replace(given, resume=resume), tmp_path / "given.toml")
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path / "given.toml"), moment], check=False, capture_output=True,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, text=True,
        )  # fmt: skip
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert (given.out / FOLDER).exists() == (moment == "training")
    with monkeypatch.context() as patch:
        patch.setattr(examples, "reader", None)  # nothing is tokenised again
        resumed = run(replace(given, resume=True), quiet=True)
    monkeypatch.setattr(cache, "LARGE", 1 << 24)
    whole = run(replace(given, out=tmp_path / "whole"), quiet=True)
    assert not (tmp_path / "whole" / FOLDER).exists()
    assert resumed.outcome.losses == whole.outcome.losses
    trees = [load_peft(out / "adapter", demo())[0] for out in (given.out, tmp_path / "whole")]
    for name in trees[1]:
        for mine, theirs in zip(*(vars(tree[name]).values() for tree in trees), strict=True):
            assert not isinstance(theirs, torch.Tensor) or torch.equal(mine, theirs)
