"""What transformers said about a configuration, for later processes, which then need not import it.

An answer is kept under a digest of the question and of everything else that it depends on: the code of funclora, and
what is installed besides. Where that cannot be told, or the program has imported transformers itself and may have
changed it, nothing is remembered.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from funclora._config.outlined import Plain
from funclora._files.cache import cache_folder, digest_of, get, put
from funclora.io.hf.library import IMPORTED_BEFORE

_KIND = "structures"
_OWN = Path(__file__).parents[2]


class Entry:
    """A place for an answer.

    Args:
        question: what is asked.

    Attributes:
        is_usable: whether anything is remembered here.
    """

    def __init__(self, question: Plain) -> None:
        known = None if IMPORTED_BEFORE or cache_folder() is None else environment()
        self.is_usable = known is not None
        self._key = digest_of([known, question]) if self.is_usable else ""

    def get(self) -> Any:
        """The answer; None if there is none."""
        return get(_KIND, self._key) if self.is_usable else None

    def put(self, answer: Plain) -> None:
        """Remember an answer."""
        if self.is_usable:
            put(_KIND, self._key, answer)


def remembered(question: Plain, ask: Callable[[], str]) -> str:
    """The text that `ask` returns, or that it returned in an earlier process; errors are not remembered."""
    entry = Entry(question)
    answer = entry.get()
    if not isinstance(answer, str):
        answer = ask()
        entry.put(answer)
    return answer


@functools.cache
def environment() -> Plain:
    """What answers depend on besides questions: Python, the code of this package, and all that is installed.

    Returns:
        None if that cannot be told: torch or transformers are not where an installer has put them, so that their files
        may change while their version does not.
    """
    try:
        installed = {
            (folder, entry.name): entry.stat().st_mtime_ns
            for folder in {Path(path).resolve() for path in sys.path}
            if folder.is_dir()
            for entry in os.scandir(folder)
            if entry.name.endswith((".dist-info", ".egg-info", ".egg-link"))
        }
        for name in ("torch", "transformers"):
            spec = importlib.util.find_spec(name)
            site = Path((spec and spec.origin) or "").resolve().parent.parent
            if not any(folder == site and entry.startswith(f"{name}-") for folder, entry in installed):
                return None
        own = hashlib.sha256()
        for file in sorted(_OWN.rglob("*.py")):
            own.update(f"{file.relative_to(_OWN)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    except (OSError, ValueError):
        return None
    return [
        sys.version,
        own.hexdigest(),
        sorted([str(folder), name, changed] for (folder, name), changed in installed.items()),
    ]
