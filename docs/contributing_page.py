"""Makes a page of CONTRIBUTING.md, which is in the root folder because GitHub looks for it there."""

import pkgutil
from pathlib import Path
from typing import Any

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
PAGE = "contributing.md"


def on_files(files: Any, *, config: Any) -> Any:
    """The hook that mkdocs calls: adds the page, whose links start from the folder of the pages."""
    file = pkgutil.resolve_name("mkdocs.structure.files:File")
    text = CONTRIBUTING.read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(file.generated(config, PAGE, content=text))
    return files
