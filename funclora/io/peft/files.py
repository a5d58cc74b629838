"""The two files of a PEFT folder, read as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from funclora._files.atomic import parse_json
from funclora._files.snapshot import OpenFile, open_files
from funclora.errors import FormatError, UnsupportedError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


class AdapterFiles:
    """The configuration and the weights of an adapter, of one version even while another process writes the folder.

    Attributes:
        folder: the folder.
        config_file: the path of the configuration, for messages.
        weights_file: the path of the weights, for messages.
        config: the contents of the configuration.

    Args:
        folder: the folder.

    Raises:
        FormatError: there is no configuration, it is broken, or the folder is being replaced again and again.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file, self.weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        self._open = open_files(folder, [WEIGHTS_FILE, CONFIG_FILE])  # as they are written
        if CONFIG_FILE not in self._open:
            raise FormatError(self._missing())
        content = self._open[CONFIG_FILE].read()
        self.check()
        self.config: dict[str, Any] = parse_json(self.config_file, content)

    @property
    def weights(self) -> OpenFile:
        """The file of the weights.

        Raises:
            FormatError: there is none.
            UnsupportedError: there is a pickle instead.
        """
        if WEIGHTS_FILE in self._open:
            return self._open[WEIGHTS_FILE]
        if (self.folder / PICKLE_FILE).exists():
            raise UnsupportedError(
                f"{self.folder / PICKLE_FILE} is a pickle, which can run code when it is read. Load it with PEFT if "
                "you trust it, and save it again with safe_serialization=True."
            )
        raise FormatError(f"{self.folder}: there is no {WEIGHTS_FILE} in this folder.")

    @property
    def has_in_out_linear(self) -> bool:
        """Whether layers of transformers' `Conv1D` are adapted. PEFT lets the last layer decide."""
        return bool(self.config.get("fan_in_fan_out"))

    def check(self) -> None:
        """Raise `ChangedError` if a program that replaces no files but writes into them has done so meanwhile."""
        for file in self._open.values():
            file.check()

    def _missing(self) -> str:
        if not self.folder.is_dir():
            return f"{self.folder}: there is no such folder. Give a PEFT folder: it holds {CONFIG_FILE}."
        inner = sorted(str(found.parent) for found in self.folder.glob(f"*/{CONFIG_FILE}"))
        hint = f" PEFT keeps named adapters in folders of their own: {', '.join(inner)}." if inner else ""
        return f"{self.folder}: there is no {CONFIG_FILE} in this folder.{hint}"
