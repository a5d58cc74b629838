"""Where results are to go: full, read-only, taken, linked, gone meanwhile. One line says so; nothing else changes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, save_adapter, save_base
from typer.testing import CliRunner

import funclora as fl
from funclora._files.atomic import replace_files
from funclora._files.locks import lock_folder
from funclora._files.staging import staged_folder
from funclora.cli._app import app
from funclora.errors import ConfigError, FormatError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    cls = type(save_base(root / "base", "llama", shard="10KB"))
    save_adapter(root / "base", cls, root / "adapter", target_modules=["q_proj"])
    save_adapter(root / "base", cls, root / "other", target_modules=["v_proj"])
    save_base(root / "tuned", "llama")
    model = cls.from_pretrained(root / "base")
    adapters, _ = fl.load_peft(root / "adapter", model)
    fl.save_gguf(root / "adapter.gguf", adapters, model)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "root"))


def command(name: str, root: Path, out: Path) -> list[str]:
    """The arguments of a command that writes."""
    return [*map(str, {
        "merge": ["merge", root / "base", root / "adapter", "-o", out],
        "extract": ["extract", root / "base", root / "tuned", "-o", out, "--rank", 1, "--ignore-rest"],
        "combine": ["combine", root / "adapter", root / "other", "-o", out],
        "to gguf": ["convert", root / "adapter", "-o", out / "a.gguf", "--base", root / "base", "--to", "gguf"],
        "from gguf": ["convert", root / "adapter.gguf", "-o", out, "--base", root / "base", "--from", "gguf"],
    }[name])]  # fmt: skip


COMMANDS = ["merge", "extract", "combine", "to gguf", "from gguf"]


def refused(name: str, root: Path, out: Path) -> str:
    """The one line that a command ends with, which changes no file."""
    before = contents(root)
    result = CliRunner().invoke(app, command(name, root, out))
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert contents(root) == before
    *_, line = result.stderr.strip().splitlines()
    assert line.startswith(f"funclora {name.split()[-1] if 'gguf' not in name else 'convert'}: ")
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "copy_file_range", full)
    assert "No space left on device" in refused(name, root, root / "made" / "out")
    assert not (root / "made").exists()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system in a folder, if the test may."""
    folder = tmp_path / "mounted"
    mounted = []

    def make(*options: str) -> Path:
        folder.mkdir(exist_ok=True)
        try:
            done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for each in reversed(mounted):
        subprocess.run(["umount", str(each)], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_small_file_system(name: str, root: Path, mount: Callable[..., Path]) -> None:
    small = mount("-t", "tmpfs", "-o", "size=4k", "tmpfs")
    (small / "full").write_bytes(bytes(4096))
    line = refused(name, root, small / "out")
    assert "No space left on device" in line or "bytes are needed" in line
    assert [file.name for file in small.rglob("*")] == ["full"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_file_system(name: str, root: Path, mount: Callable[..., Path]) -> None:
    closed = mount("-t", "tmpfs", "-o", "ro", "tmpfs")
    assert "Read-only file system" in refused(name, root, closed / "out")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_the_way(name: str, root: Path) -> None:
    (root / "file").write_text("here")
    assert "file" in refused(name, root, root / "file" / "out")


@pytest.mark.parametrize("name", ["merge", "extract"])
@pytest.mark.parametrize("place", ["base", "base/out", "."])
def test_an_output_in_an_input(name: str, place: str, root: Path) -> None:
    assert "not empty" in (line := refused(name, root, root / place)) or "overlaps with" in line


def test_an_adapter_that_is_combined_into_itself(root: Path) -> None:
    (root / "link").symlink_to(root / "adapter")
    for place in ("adapter", "link", "other/../adapter"):
        line = refused("combine", root, root / place)
        assert "is one of the adapters" in line or "already contains an adapter" in line
    with pytest.raises(ConfigError, match="is one of the adapters"):
        fl.combine_peft([root / "adapter", root / "other"], root / "link")


@pytest.mark.parametrize("name", ["merge", "extract"])
def test_a_link_in_the_way(name: str, root: Path) -> None:
    (root / "empty").mkdir()
    (root / "link").symlink_to(root / "empty")
    assert "link exists and is not a folder" in refused(name, root, root / "link")
    (root / "lost").symlink_to(root / "nowhere")
    assert "lost exists and is not a folder" in refused(name, root, root / "lost")


def test_a_base_of_links(root: Path) -> None:
    """As the cache of the Hugging Face Hub has them."""
    linked = root / "linked" / "base"
    linked.mkdir(parents=True)
    for file in (root / "base").iterdir():
        (linked / file.name).symlink_to(file)
    fl.merge_checkpoint(linked, root / "adapter", root / "a")
    fl.merge_checkpoint(root / "base", root / "adapter", root / "b")
    assert contents(root / "a") == contents(root / "b")
    assert not any(file.is_symlink() for file in (root / "a").iterdir())
    (linked / "notes.txt").symlink_to(root / "gone")
    with pytest.raises(FormatError, match=r"notes\.txt: it is a link to a file that is not there"):
        fl.merge_checkpoint(linked, root / "adapter", root / "c")
    assert not (root / "c").exists()


@pytest.mark.parametrize("what", ["base", "adapter", "place"])
def test_a_folder_that_vanishes_meanwhile(what: str, root: Path) -> None:
    place = root / "place"
    place.mkdir()

    def vanish(done: int, total: int) -> None:
        shutil.rmtree(root / what, ignore_errors=True)

    if what == "adapter":  # it was read, or its tensors are in memory
        fl.merge_checkpoint(root / "base", root / "adapter", place / "out", progress=vanish)
        return
    error, said = {
        "base": (FormatError, r"base/config\.json: another process has changed or removed it meanwhile"),
        "place": (FileNotFoundError, "No such file"),
    }[what]
    with pytest.raises(error, match=said):
        fl.merge_checkpoint(root / "base", root / "adapter", place / "out", progress=vanish)
    assert not (place / "out").exists()
    assert not [*root.glob("place/.*")]


# --- adapters over adapters ----------------------------------------------------------------------------------------


def test_what_killed_processes_left_is_removed(root: Path) -> None:
    abandoned = [root / "adapter" / f".{name}.{'0' * 32}.tmp" for name in (WEIGHTS, CONFIG)]
    others = [root / "adapter" / f".{CONFIG}.mine.tmp", root / "adapter" / f".x.{'0' * 32}.tmp"]
    for file in (*abandoned, *others):
        file.write_text("left")
    model = save_base(root / "again", "llama")
    fl.save_peft(root / "adapter", *fl.load_peft(root / "adapter", model))
    assert not any(file.exists() for file in abandoned)
    assert all(file.exists() for file in others)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_result_from_the_start(umask: int, tmp_path: Path) -> None:
    """A draft is never open to more users than what it becomes, a file that is replaced keeps its permissions."""
    seen: list[int] = []

    def mode(file: Path) -> int:
        return file.stat().st_mode & 0o777

    def write(file: Path) -> None:
        seen.append(mode(file))
        file.write_text("new")

    secret, hidden, before = tmp_path / "secret", tmp_path / "hidden", os.umask(umask)
    try:
        replace_files(tmp_path, {"new": write})
        assert [*seen, mode(tmp_path / "new")] == 2 * [0o666 & ~umask]
        for given in (0o600, 0o640, 0o444):
            secret.write_text("old")
            secret.chmod(given)
            replace_files(tmp_path, {"secret": write})
            assert mode(secret) == given
            assert seen[-1] & ~0o600 & ~given == 0
            secret.unlink()
        hidden.mkdir(mode=0o700)
        with staged_folder(hidden) as draft:
            assert mode(draft) == 0o700
        assert mode(hidden) == 0o700
        with staged_folder(tmp_path / "open") as draft:
            assert mode(draft) == 0o777 & ~umask
    finally:
        os.umask(before)


def test_names_of_drafts_cannot_be_predicted(tmp_path: Path) -> None:
    """Neither can a link be planted where a draft will be, nor does one that is there matter."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("mine")
    (tmp_path / ".out.funclora-partial").symlink_to(tmp_path / "target")
    (tmp_path / f".out.{'0' * 32}.partial").symlink_to(tmp_path / "target")
    names = set()
    for _ in range(3):
        with staged_folder(tmp_path / "out") as draft:
            names.add(draft.name)
        (tmp_path / "out").rmdir()
        replace_files(tmp_path, {"file": lambda file: names.add(file.name)})
    assert len(names) == 6
    assert (tmp_path / "target" / "mine").read_text() == "mine"


def test_two_writers_of_one_adapter(root: Path) -> None:
    def second(file: Path) -> None:
        file.write_text("first")
        with pytest.raises(OSError, match=r"another process is writing it.*adapter_model") as caught:
            replace_files(root / "adapter", {WEIGHTS: write, CONFIG: write}, together=True)
        assert caught.value.errno == errno.EBUSY

    def write(file: Path) -> None:
        file.write_text("second")

    replace_files(root / "adapter", {WEIGHTS: second, CONFIG: second}, together=True)
    assert (root / "adapter" / CONFIG).read_text() == "first"
    assert sorted(file.name for file in (root / "adapter").iterdir()) == ["README.md", CONFIG, WEIGHTS]
    replace_files(root / "adapter", {WEIGHTS: write, CONFIG: write}, together=True)
    assert (root / "adapter" / CONFIG).read_text() == (root / "adapter" / WEIGHTS).read_text() == "second"


def test_a_draft_in_use_is_not_removed(tmp_path: Path) -> None:
    draft = tmp_path / f".a.{'f' * 32}.tmp"
    draft.write_text("at work")
    with lock_folder(draft, BlockingIOError()):
        replace_files(tmp_path, {"a": lambda file: file.write_text("new") and None})  # type: ignore[dict-item]
    assert draft.exists()
    assert (tmp_path / "a").read_text() == "new"


def test_a_rename_that_fails_leaves_the_old_adapter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace = contents(root / "adapter"), Path.replace

    def failing(self: Path, target: Path) -> Path:
        if Path(target).name == WEIGHTS:
            raise OSError(errno.EIO, "input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    config = fl.LoraConfig(r=2, target_modules=["0"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(OSError, match="input/output error"):
        fl.save_peft(root / "adapter", fl.init(model, config), config)
    assert contents(root / "adapter") == before


def test_a_folder_in_the_place_of_a_file(root: Path) -> None:
    config = fl.LoraConfig(r=2, target_modules=["0"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    for name in (WEIGHTS, CONFIG):
        folder = root / f"with {name}"
        (folder / name).mkdir(parents=True)
        with pytest.raises(IsADirectoryError, match=name):
            fl.save_peft(folder, fl.init(model, config), config)
        assert [file.name for file in folder.rglob("*")] == [name]
        with pytest.raises(FormatError, match="there is no adapter_config"):
            fl.load_peft(folder, model)
