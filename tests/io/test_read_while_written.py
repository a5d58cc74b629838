"""Readers of a folder that another process writes: all of one version, or an error of the library."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_adapter, save_base
from torch import nn

import funclora as fl
from funclora._files import snapshot
from funclora._files.atomic import replace_files
from funclora._files.snapshot import ChangedError, OpenFile, open_files
from funclora._files.staging import staged_folder
from funclora.errors import FormatError, FuncloraError
from funclora.io.hf.checkpoint import Checkpoint
from funclora.io.peft.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from funclora.rules.low_rank import LowRank

forks = pytest.mark.skipif(sys.platform != "linux", reason="forks")
LOADS = 300


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


MODEL = Tiny()


def version(k: int) -> tuple[dict[str, fl.Rule], fl.LoraConfig]:
    """An adapter whose weights, ranks, scaling and method all say which one it is."""
    r = 1 + k % 3
    config = fl.LoraConfig(r=r, lora_alpha=7 * r, target_modules=["first", "second"], use_dora=k % 2 == 1)
    made = fl.init(MODEL, config)
    tree: dict[str, Any] = {}
    for name, rule in made.items():
        assert isinstance(rule, LowRank)
        tree[name] = type(rule)(**{**vars(rule), "a": torch.full_like(rule.a, r), "b": torch.full_like(rule.b, r)})
    return tree, config


def is_whole(adapters: dict[str, fl.Rule], config: fl.LoraConfig) -> bool:
    kind = fl.DoRA if config.use_dora else fl.LoRA
    return (
        all(
            type(rule) is kind
            and rule.r == config.r
            and bool((rule.a == config.r).all() and (rule.b == config.r).all())
            for rule in adapters.values()
            if isinstance(rule, LowRank)
        )
        and len(adapters) == 2
    )


class Writer:
    """A process that does something again and again, until it is stopped."""

    def __init__(self, task: Callable[[int], None]) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                for k in range(10**9):
                    task(k)
                    if k == 1:
                        os.write(write, b".")
            finally:
                os._exit(1)
        os.close(write)
        self.began = os.read(read, 1) == b"."
        os.close(read)

    def __enter__(self) -> Writer:
        assert self.began, "it has written twice"
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert code == -signal.SIGKILL, "it was still at work"


@pytest.fixture
def one_thread() -> Iterator[None]:
    n = torch.get_num_threads()
    torch.set_num_threads(1)  # no threads of torch's that a fork would lose
    yield
    torch.set_num_threads(n)


def counted(read: Callable[[], bool]) -> Counter[str]:
    """How many reads gave what."""
    found: Counter[str] = Counter()
    for _ in range(LOADS):
        found[outcome(read)] += 1
    return found


def outcome(read: Callable[[], bool]) -> str:
    try:
        return "whole" if read() else "mixed"
    except FuncloraError as error:
        return f"ours: {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is counted
        return f"foreign: {type(error).__name__}: {error}"


@forks
@pytest.mark.usefixtures("one_thread")
def test_an_adapter_that_is_rewritten_all_the_time(tmp_path: Path) -> None:
    """`save_peft` in one process; `load_peft`, the cache and `combine` in another. No mixture, and no error at all."""
    folder = tmp_path / "adapters" / "served"
    folder.parent.mkdir()
    versions = [version(k) for k in range(6)]
    cache = fl.AdapterCache(MODEL, folder.parent, memory=2**20)
    seen = set()

    def loads() -> bool:
        adapters, config = fl.load_peft(folder, MODEL)
        seen.add((config.r, config.use_dora))
        return is_whole(adapters, config)

    def caches() -> bool:
        cache.drop("served")
        adapters = cache["served"]
        (rank,) = {rule.r for rule in adapters.values() if isinstance(rule, LowRank)}
        return any(is_whole(adapters, config) for _, config in versions if config.r == rank)

    with Writer(lambda k: fl.save_peft(folder, *versions[k % 6])):
        assert counted(loads) == {"whole": LOADS}
        assert counted(caches) == {"whole": LOADS}
    assert len(seen) > 1, "it was rewritten meanwhile"


@forks
@pytest.mark.usefixtures("one_thread")
def test_folders_that_are_combined_while_they_are_rewritten(tmp_path: Path) -> None:
    """Without a model, where the configuration is asked for more than once."""
    folder = tmp_path / "served"
    versions = [version(k) for k in (0, 2, 4)]  # LoRA

    def combines() -> bool:
        found = fl.combine_peft([folder, folder], tmp_path / "both", combination_type="cat")
        return all(
            isinstance(rule, fl.LoRA) and bool((rule.a == rule.r).all() and (rule.b == rule.r).all())
            for source in found.sources
            for rule in source.values()
        )

    with Writer(lambda k: fl.save_peft(folder, *versions[k % 3])):
        assert counted(combines) == {"whole": LOADS}


@forks
@pytest.mark.usefixtures("one_thread")
def test_a_folder_that_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """As `funclora train` replaces its own."""
    folder = tmp_path / "served"
    versions = [version(k) for k in range(6)]

    def replace(k: int) -> None:
        with staged_folder(folder, replace=True) as draft:
            fl.save_peft(draft, *versions[k % 6])

    with Writer(replace):
        assert counted(lambda: is_whole(*fl.load_peft(folder, MODEL))) == {"whole": LOADS}


@forks
@pytest.mark.usefixtures("one_thread")
def test_a_program_that_writes_into_the_files(tmp_path: Path) -> None:
    """As PEFT does: a reader cannot know that a file belongs to the one before, but it never gets half of one."""
    folder, sources = tmp_path / "served", [tmp_path / f"{k}" for k in range(2)]
    for k, source in enumerate(sources):
        fl.save_peft(source, *version(3 * k))  # r=1, LoRA and DoRA
    shutil.copytree(sources[0], folder)
    lora, dora = ((source / WEIGHTS_FILE).read_bytes() for source in sources)

    def write(k: int) -> None:
        (folder / WEIGHTS_FILE).write_bytes((lora, lora + b" ")[k % 2])  # cut off, part of the time

    with Writer(write):
        found = counted(lambda: is_whole(*fl.load_peft(folder, MODEL)))
    assert not [what for what in found if what.startswith(("mixed", "foreign"))], found
    assert len(dora) > len(lora)


@forks
@pytest.mark.usefixtures("one_thread")
def test_a_model_that_is_rewritten_while_it_is_opened(tmp_path: Path) -> None:
    """Two versions of a checkpoint in shards, which take turns as a whole."""
    for k in range(2):
        torch.manual_seed(k)
        save_base(tmp_path / f"{k}", "llama", shard=("5KB", "20KB")[k])
    expected = [{key: value.clone() for key, value in read_all(tmp_path / f"{k}").items()} for k in range(2)]
    folder = tmp_path / "served"

    def replace(k: int) -> None:
        with staged_folder(folder, replace=True) as draft:
            shutil.copytree(tmp_path / f"{k % 2}", draft, dirs_exist_ok=True)

    def whole() -> bool:
        found = read_all(folder)
        return any(all(torch.equal(found[key], value) for key, value in each.items()) for each in expected)

    with Writer(replace):
        assert counted(whole) == {"whole": LOADS}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(folder) as opened:
        return {key: opened.read(key) for key in opened.tensors}


# --- between the renames -------------------------------------------------------------------------------------------

NAMES = (WEIGHTS_FILE, CONFIG_FILE)


class KilledError(BaseException):
    pass


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], bool]:
    """Runs something that ends after its n-th rename, without the chance to clean up; whether it came so far."""

    def run(n: int, task: Callable[[], None]) -> bool:
        done: list[Path] = []
        renamed, removed = Path.replace, Path.unlink

        def replace(self: Path, target: Path) -> Path:
            if len(done) == n:
                raise KilledError
            done.append(target)
            return renamed(self, target)

        def unlink(self: Path, missing_ok: bool = False) -> None:
            if len(done) < n:
                removed(self, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            patch.setattr(Path, "unlink", unlink)
            try:
                task()
            except KilledError:
                return True
        return False

    return run


@pytest.mark.parametrize("fresh", [False, True])
def test_a_writer_that_is_killed_between_its_renames(
    fresh: bool, tmp_path: Path, killed_after: Callable[[int, Callable[[], None]], bool]
) -> None:
    """The reader has the old adapter as long as its weights are there, and then the new one; so has the next writer."""
    found = []
    for n in range(9):
        folder = tmp_path / f"{n}"
        if not fresh:
            fl.save_peft(folder, *version(0))
        if not killed_after(n, partial(fl.save_peft, folder, *version(1))):
            break
        if fresh and n == 0:  # nothing has its name yet
            with pytest.raises(FormatError, match=r"there is no adapter_config\.json in this folder"):
                fl.load_peft(folder, MODEL)
        else:
            adapters, config = fl.load_peft(folder, MODEL)
            assert is_whole(adapters, config)
            found.append(config.r)
        fl.save_peft(folder, *version(2))
        assert fl.load_peft(folder, MODEL)[1].r == 3
        assert sorted(file.name for file in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE], "drafts are swept up"
    assert found == ([2] if fresh else [1, 1, 2])


def test_what_a_killed_writer_left_is_put_right_before_the_next_one_writes(
    tmp_path: Path, killed_after: Callable[[int, Callable[[], None]], bool]
) -> None:
    """So that readers have one version while the next writer is at work, which may take long."""
    fl.save_peft(tmp_path, *version(0))
    assert killed_after(2, lambda: fl.save_peft(tmp_path, *version(1)))
    assert not (tmp_path / CONFIG_FILE).exists()

    def write(file: Path) -> None:
        assert is_whole(*fl.load_peft(tmp_path, MODEL))
        raise KilledError("here")

    with pytest.raises(KilledError, match="here"):
        replace_files(tmp_path, dict.fromkeys(NAMES, write), together=True)
    assert fl.load_peft(tmp_path, MODEL)[1].r == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


# --- one version ---------------------------------------------------------------------------------------------------


def test_what_is_open_stays_what_it_is(tmp_path: Path) -> None:
    fl.save_peft(tmp_path, *version(0))
    files = AdapterFiles(tmp_path)
    fl.save_peft(tmp_path, *version(1))
    files.check()
    from funclora.io.peft.folder import load_files

    adapters, config = load_files(files, MODEL)
    assert config.r == 1
    assert is_whole(adapters, config)


def test_a_file_that_is_written_into_is_noticed(tmp_path: Path) -> None:
    fl.save_peft(tmp_path, *version(0))
    files = AdapterFiles(tmp_path)
    with (tmp_path / WEIGHTS_FILE).open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(ChangedError, match=r"adapter_model\.safetensors: another process has changed it while"):
        files.check()


def test_a_folder_that_never_stands_still_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("0")
    opened, count = OpenFile.__init__, iter(range(10**6))

    def changing(self: OpenFile, path: Path) -> None:
        opened(self, path)
        replace_files(tmp_path, {"a": lambda file: file.write_text(f"{next(count)}") and None})  # type: ignore[dict-item]

    monkeypatch.setattr(OpenFile, "__init__", changing)
    monkeypatch.setattr(snapshot, "_PATIENCE", 0.05)
    with pytest.raises(FormatError, match="it is being replaced by another process"):
        open_files(tmp_path, ["a"])


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe in the place of a file would keep a reader for ever."""
    os.mkfifo(tmp_path / CONFIG_FILE)
    (tmp_path / WEIGHTS_FILE).mkdir()
    assert open_files(tmp_path, NAMES) == {}
    with pytest.raises(FormatError, match="there is no adapter_config"):
        fl.load_peft(tmp_path, MODEL)


def test_a_base_that_is_replaced_during_a_merge(tmp_path: Path) -> None:
    """Its tensors are those of the start, and the other files must be, too."""
    cls = type(save_base(tmp_path / "base", "llama"))
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", target_modules=["q_proj"])
    shutil.copytree(tmp_path / "base", tmp_path / "new")
    fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")

    def replaced(done: int, total: int) -> None:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        shutil.copytree(tmp_path / "new", tmp_path / "base")

    def written(done: int, total: int) -> None:
        with (tmp_path / "base" / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")

    for change, said in ((replaced, "changed or removed it meanwhile"), (written, "has changed it while it was read")):
        with pytest.raises(FormatError, match=said):
            fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=change)
        assert not (tmp_path / "out").exists()
