"""Fails when the API pages and the package disagree.

Every public name must stand on a page, as `::: funclora.name` or another public name of the same object, and have a
docstring of its own, with examples under "Examples:" (elsewhere they are not shown as code). Every name on a page must
exist.
"""

import importlib
import pkgutil
import re
import sys
from pathlib import Path

import griffe

DOCS = Path(__file__).parent
PARTS = ("algebra", "analysis", "distributed", "io", "losses", "optim", "rules", "serving")
NAMESPACES = ("funclora", *(f"funclora.{part}" for part in PARTS))


def documented() -> dict[str, str]:
    """Every name that a page documents, with the place where it does."""
    found = {}
    for page in sorted(DOCS.rglob("*.md")):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            if match := re.match(r":::\s+(\S+)", line):
                found[match[1]] = f"{page.relative_to(DOCS.parent)}:{number}"
    return found


def public() -> list[str]:
    """Every name that `__all__` makes public, in full."""
    names = [f"{space}.{name}" for space in NAMESPACES for name in importlib.import_module(space).__all__]
    return [name for name in names if name not in NAMESPACES and not name.endswith("__version__")]


def exists(name: str) -> bool:
    """Whether the full name can be imported."""
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


def stray_examples(node: griffe.Object | griffe.Alias) -> list[str]:
    """The names of the object and its members whose docstrings show an example outside an "Examples:" section."""
    found = []
    own = (member for member in node.members.values() if not member.is_alias)  # not what the module imports
    for part in (node, *own):
        if part.docstring is not None:
            # Text as it is, the contents of an admonition ("Example:" is one), nothing of other sections.
            values = [section.value for section in part.docstring.parse("google")]
            if any(">>>" in (value if isinstance(value, str) else getattr(value, "contents", "")) for value in values):
                found.append(part.path)
    return found


def node_of(package: griffe.Object | griffe.Alias, name: str) -> griffe.Object | griffe.Alias:
    """What the full name stands for."""
    found: griffe.Object | griffe.Alias = package if name == package.path else package[name.removeprefix("funclora.")]
    return found


def complaints() -> list[str]:
    """What is wrong, one line each."""
    on_pages = documented()
    # Read from the source, as the pages are: an inherited or generated docstring does not count.
    package = griffe.load("funclora", search_paths=[DOCS.parent], resolve_aliases=True)
    found = [f"{place}: {name} does not exist" for name, place in on_pages.items() if not exists(name)]
    shown = {node_of(package, name).canonical_path for name in on_pages if exists(name)}
    for name in [*NAMESPACES, *public()]:
        node = node_of(package, name)
        if not node.has_docstring:
            found.append(f"{node.filepath}:{node.lineno}: {name} has no docstring")
        if name not in NAMESPACES:
            found += [f"{path}: put its example under 'Examples:'" for path in stray_examples(node)]
        if name not in NAMESPACES and node.canonical_path not in shown:
            found.append(f"{name} is public and on no page of {DOCS.name}/: add '::: {name}'")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(complaints()) or None)
