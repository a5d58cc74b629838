"""Adapters that are loaded when a row of a batch names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import funclora as fl
from funclora._apps.train.adapters import check_head
from funclora._apps.train.base import Base
from funclora.cli._adapters import for_base
from funclora.io.hf.origin import check_origin
from funclora.io.peft.files import WEIGHTS_FILE

# Bytes of adapters that are kept between batches; more if the largest adapter needs more.
HELD = 1 << 30


class Loader:
    """The adapters of a command by name, of which a part is kept in memory.

    Args:
        base: the model.
        folders: PEFT folders by name.
        model: the model's folder, which adapters are compared with; None if it is in none.
    """

    def __init__(self, base: Base, folders: Mapping[str, Path], model: Path | None) -> None:
        self._base, self._folders, self._model = base, folders, model
        self._new = {*folders}
        sizes = [
            (folder / WEIGHTS_FILE).stat().st_size for folder in folders.values() if (folder / WEIGHTS_FILE).exists()
        ]
        # Half precision on disk may be float32 in memory.
        self._cache = fl.AdapterCache(
            base.model,
            dict(folders),
            memory=max(HELD, 4 * max(sizes, default=0)),
            device=base.device,
            params=base.params,
        )

    def route(self, names: Sequence[str | None]) -> dict[str, fl.Rule]:
        """The adapters of a batch whose rows name theirs; None is the base model.

        Raises:
            ConfigError: one does not load, belongs to another model, or does not bring the head that the model lacks.
        """
        used = self._new & {name for name in names if name is not None}
        with for_base(self._base.name, [self._folders[name] for name in names if name is not None]):
            if self._base.new:
                for name in sorted(used):
                    check_head(self._base, self._cache[name], name)
            # Where all rows are of one adapter, the model may do with them what it likes.
            (one, *others) = dict.fromkeys(names)
            adapters = self._cache.route(names) if others else {} if one is None else self._cache[one]
        self._new -= used
        check_origin([self._folders[name] for name in sorted(used)], self._model)
        return adapters
