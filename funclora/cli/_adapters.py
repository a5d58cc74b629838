"""The adapters that are given on the command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from funclora._files.locks import claimed_folder
from funclora.errors import ConfigError, FormatError, FuncloraError
from funclora.io.peft.files import CONFIG_FILE


def adapter_folders(paths: Sequence[Path]) -> dict[str, Path]:
    """The PEFT folders among the paths and directly inside them, each with a name.

    Raises:
        FormatError: a path is not a folder, or contains no adapter.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise FormatError(f"{path}: there is no such folder. Give PEFT folders, or a folder that contains them.")
        inside = (
            [path] if (path / CONFIG_FILE).is_file() else sorted(file.parent for file in path.glob(f"*/{CONFIG_FILE}"))
        )
        if not inside:
            raise FormatError(
                f"{path}: there is no {CONFIG_FILE} in it, nor in the folders inside it. Give a PEFT folder."
            )
        found += [folder for folder in inside if folder not in found]
    names = [folder.resolve().name for folder in found]
    return {str(folder) if names.count(name) > 1 else name: folder for name, folder in zip(names, found, strict=True)}


@contextlib.contextmanager
def adapter_out(out: Path, *, overwrite: bool) -> Iterator[None]:
    """Keep other processes from a folder that an adapter is to be written to, before anything is read for it.

    Raises:
        ConfigError: another process is at work there; or there is an adapter, which may not be replaced.
        OSError: the folder cannot be made.
    """
    busy = ConfigError(f"--out: another process is using {out}. Wait for it to end, or give another folder.")
    with claimed_folder(out, busy):
        if (out / CONFIG_FILE).exists() and not overwrite:
            raise ConfigError(f"--out: {out} already contains an adapter. Give another folder, or --overwrite.")
        yield


@contextlib.contextmanager
def for_base(name: str, folders: Sequence[Path] = ()) -> Iterator[None]:
    """Adds to errors inside the block that the adapter may belong to another base model.

    Args:
        name: the base model's, for people.
        folders: of the adapters that are loaded. If they name another base, the message says so.

    Raises:
        ConfigError: in place of any `FuncloraError` inside the block.
    """
    try:
        yield
    except FuncloraError as error:
        named = {base for folder in folders if (base := _named_base(folder)) and str(folder) in str(error)}
        says = f" {CONFIG_FILE} names {' and '.join(sorted(map(repr, named)))}." if named else ""
        raise ConfigError(f"{error} Is {name} its base model?{says} Give its base with --model.") from error


def _named_base(folder: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        name = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None
    return None
