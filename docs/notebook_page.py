"""Makes a page of the notebook when mkdocs builds the site: its text, its code, and the outputs stored in it."""

import base64
import json
import pkgutil
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "examples" / "demo.ipynb"
PAGE = "notebook.md"
SOURCE = (
    "\n*This page is `examples/demo.ipynb`, with the outputs that are stored in it. To run it:* "
    "`pip install '.[test]' jupyterlab`, `jupyter lab examples/demo.ipynb`.\n"
)


def page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The text of the page, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif picture := output.get("data", {}).get("image/png"):
                name = f"notebook-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(picture)
                title = source.partition('title("')[2].partition('"')[0] or "Learning curves and gains"
                parts.append(f"![{title}]({name})")
    return "\n\n".join([parts[0], SOURCE, *parts[1:]]) + "\n", pictures


def on_files(files: Any, *, config: Any) -> Any:
    """The hook that mkdocs calls: adds the page and its pictures to the files of the site."""
    file = pkgutil.resolve_name("mkdocs.structure.files:File")
    text, pictures = page(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    files.append(file.generated(config, PAGE, content=text))
    for name, content in pictures.items():
        files.append(file.generated(config, name, content=content))
    return files
