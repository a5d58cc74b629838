"""transformers on untrusted folders: it runs no code from them, and each failure becomes one error."""

from __future__ import annotations

import contextlib
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from funclora.errors import FormatError, FuncloraError, UnsupportedError

# For every call that reads a folder. With None instead of False, transformers asks on stdin whether to run the code.
OPTIONS: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}

# Whether the program has imported transformers before it used a folder: then it may also have changed its classes.
IMPORTED_BEFORE = "transformers" in sys.modules

# transformers makes lists of this length before there is a model whose parameters could be counted.
_COUNTS = re.compile(r"(layers?|num_labels)$")
_MOST = 10_000
_LONGEST = 300  # characters of a quoted error


def transformers() -> Any:
    """The library.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import transformers as library
    except ModuleNotFoundError as error:
        raise UnsupportedError("a model's folder needs transformers. Type: pip install 'funclora[hf]'") from error
    return library


@contextlib.contextmanager
def reading(folder: Path, message: str, remedy: str = "") -> Iterator[None]:
    """A block in which transformers reads a folder. Its classes have no common error, so every error is converted.

    Args:
        folder: the folder.
        message: what failed.
        remedy: what to do.

    Raises:
        UnsupportedError: the folder needs its own code.
        FormatError: for any other error that is not from this package.
    """
    try:
        with quiet(transformers()):
            yield
    except (FuncloraError, MemoryError):
        raise
    except BaseException as error:
        if "trust_remote_code" in str(error):
            raise needs_code(folder) from error
        # A panic in tokenizers, which is written in Rust, is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{message}: {first_line(error)}.{remedy}") from error


def needs_code(folder: Path, what: str = "auto_map in config.json or tokenizer_config.json") -> UnsupportedError:
    """The error for a folder that transformers cannot load without running code from it."""
    return UnsupportedError(
        f"model: {folder} needs code that is not in transformers ({what}), and code from a folder is never run. Give a "
        "model whose class is in transformers, or another version of transformers."
    )


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that making a configuration from this JSON runs no code and takes a bounded time.

    Args:
        folder: its folder, for messages.
        config: the contents of `config.json`.

    Raises:
        UnsupportedError: it needs code that is not in transformers.
        FormatError: it has more layers or labels than any model.
    """
    from transformers import CONFIG_MAPPING

    own, kind = config.get("auto_map"), config.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if isinstance(own, Mapping) and "AutoConfig" in own and not known:
        raise needs_code(folder, f"auto_map in config.json: {reprlib.repr(own['AutoConfig'])}")
    todo: list[Any] = [config]
    while todo:
        value = todo.pop()
        if isinstance(value, Mapping):
            todo += value.values()
            for key, number in value.items():
                if _COUNTS.search(key) and isinstance(number, int | float) and abs(number) > _MOST:
                    got = reprlib.repr(number)
                    raise FormatError(f"{folder / 'config.json'}: {key}: expected at most {_MOST}, got {got}.")
                if key.endswith("attn_implementation") and isinstance(number, str) and "/" in number:
                    raise needs_code(folder, f"{key} in config.json: {reprlib.repr(number)}")
        elif isinstance(value, list):
            todo += value


@contextlib.contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Without transformers' report of new heads and its progress bar; funclora reports what matters."""
    logging = library.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one if it announces that; its kind if it has none."""
    text = str(error).encode("utf-8", "backslashreplace").decode()
    first, second, *_ = [*(line.strip() for line in text.splitlines() if line.strip()), "", ""]
    line = f"{first} {second}" if first.endswith(":") else first
    line = line.strip().rstrip(".") or type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
