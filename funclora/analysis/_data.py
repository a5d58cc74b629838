"""The conversion to JSON, for the results of all analyses."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any


class Data:
    """A dataclass of plain values."""

    def to_dict(self) -> dict[str, Any]:
        """The values by name, nested as they are."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # subclasses are dataclasses

    def to_json(self) -> str:
        """The values as JSON text. A missing value is null; there is no NaN."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
