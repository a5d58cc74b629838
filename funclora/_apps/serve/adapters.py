"""Which adapters there are, by the names that requests use."""

from __future__ import annotations

import threading
from pathlib import Path

from funclora._apps.serve.problems import Problem
from funclora._files.names import is_file_name
from funclora.errors import ConfigError, near, shortened
from funclora.io.peft.files import CONFIG_FILE, WEIGHTS_FILE


class Names:
    """The names of the base and of the adapters in a folder, which is looked at anew for each request.

    Args:
        base: the base's name.
        root: contains the adapters' folders; None without adapters.

    Raises:
        ConfigError: `root` is no folder, or an adapter in it has the base's name.
    """

    def __init__(self, base: str, root: Path | None) -> None:
        if root is not None and not root.is_dir():
            raise ConfigError(f"--adapters: {root} is not a folder. Give one that contains PEFT folders.")
        self.base, self.root = base, root
        self._aliases: dict[str, str] = {}  # name -> folder in the root
        self._hidden: set[str] = set()
        self._lock = threading.Lock()
        if base in self.all():
            raise ConfigError(
                f"--adapters: {root} has an adapter {base!r}, and this is the base's name. Rename it, or give the base "
                "another name with --name."
            )

    def all(self) -> list[str]:
        """The names of the adapters."""
        if self.root is None:
            return []
        found = {folder.parent.name for folder in self.root.glob(f"*/{CONFIG_FILE}")}
        with self._lock:
            named = {name for name, folder in self._aliases.items() if self._inside(folder)}
            return sorted(({name for name in found if self._inside(name)} - self._hidden) | named)

    def folder(self, name: str) -> str | None:
        """The folder of a model in the root: an id of the cache; None for the base.

        Raises:
            Problem: there is no such model.
        """
        if name == self.base:
            return None
        with self._lock:
            found = self._aliases.get(name, name)
            hidden = name in self._hidden and name not in self._aliases
        if not hidden and self._inside(found):
            return found
        raise Problem(
            404,
            f"There is no model {shortened(name)}.{near(name, [*self.all(), self.base])} /v1/models lists all.",
            param="model",
            code="model_not_found",
        )

    def find(self, name: str, path: str) -> str:
        """The folder that a request wants to give a name.

        Args:
            name: the name.
            path: of the folder: absolute, or in the root.

        Returns:
            The folder in the root.

        Raises:
            Problem: the name is taken or is none, or the folder is not directly in the root.
        """
        if self.root is None:
            raise Problem(400, "lora_path: the server was started without --adapters.", param="lora_path")
        given = Path(path)
        folder = given.name
        if (len(given.parts) > 1 and given.parent.resolve() != self.root.resolve()) or not self._inside(folder):
            raise Problem(
                400,
                f"lora_path: expected a PEFT folder directly in the folder of adapters, got {shortened(path)}.",
                param="lora_path",
            )
        if not is_file_name(name) or name == self.base:
            raise Problem(400, f"lora_name: {shortened(name)} cannot be a name here. Give another.", param="lora_name")
        with self._lock:
            self._check_free(name, folder)
        return folder

    def add(self, name: str, folder: str) -> None:
        """Give a folder in the root a name, as from `find`.

        Raises:
            Problem: the name was given to another one in the meantime.
        """
        with self._lock:
            self._check_free(name, folder)
            self._hidden.discard(name)
            if name != folder:
                self._aliases[name] = folder

    def _check_free(self, name: str, folder: str) -> None:
        known = self._aliases.get(name, name if name not in self._hidden and self._inside(name) else folder)
        if known != folder:
            raise Problem(
                400,
                f"lora_name: {name!r} is already the name of another adapter. Unload it first, or give another.",
                param="lora_name",
            )

    def remove(self, name: str) -> str:
        """Take a name away from requests that come from now on.

        Returns:
            The folder in the root.

        Raises:
            Problem: there is no such adapter.
        """
        folder = self.folder(name)
        if folder is None:
            raise Problem(400, "lora_name: the base cannot be unloaded.", param="lora_name")
        with self._lock:
            if self._aliases.pop(name, None) is None or self._inside(name):
                self._hidden.add(name)
        return folder

    def is_used(self, folder: str) -> bool:
        """Whether a folder of the root has a name."""
        with self._lock:
            return folder in self._aliases.values() or folder not in self._hidden

    def _inside(self, name: str) -> bool:
        """Whether the root has an adapter in this folder, and neither it nor its files lead out of the root.

        What begins with a dot is being written, or was put aside.
        """
        if self.root is None or not is_file_name(name) or name.startswith("."):
            return False
        root, folder = self.root.resolve(), self.root / name
        files = (folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        return (folder / CONFIG_FILE).is_file() and all(file.resolve().is_relative_to(root) for file in files)
