"""The pages of the documentation as the tests read them: their code, and where it stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCS = ROOT / "docs"
PAGES = (README, CONTRIBUTING, *sorted(DOCS.rglob("*.md")))

FENCE = re.compile(r"(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>.*)")
INFO = re.compile(r"(?P<language>\w*)(?:\s+title=\"(?P<title>[^\"]*)\")?")
# This form of a snippet is no Python, so that formatters of code leave it alone.
SNIPPET = re.compile(r"^--8<--\n(?P<file>[^:\n]+)(?::(?P<section>[\w-]+))?\n--8<--$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the page that it stands on.
        line: number of its first line of code, from 1.
        language: the word behind the opening fence.
        title: what the page writes above the block; empty if nothing.
        code: what is between the fences.
    """

    page: Path
    line: int
    language: str
    title: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def snippets(self) -> list[tuple[str, str]]:
        """(file, section) of each snippet that takes the place of code here."""
        return [(m["file"], m["section"] or "") for m in SNIPPET.finditer(self.code)]

    def run(self, names: dict[str, Any]) -> Any:
        """Run the code in that namespace. The value is that of its last line, if that is an expression."""
        tree = ast.parse(self.code)
        ast.increment_lineno(tree, self.line - 1)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(self._compiled(tree, "exec"), names)
        return eval(self._compiled(ast.Expression(last.value), "eval"), names) if isinstance(last, ast.Expr) else None

    def _compiled(self, tree: ast.Module | ast.Expression, mode: str) -> CodeType:
        return compile(tree, str(self.page), mode)  # tracebacks then show the line of the page


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, in its order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: tuple[str, str, int, str] | None = None
    code: list[str] = []
    for number, line in enumerate(lines, start=1):
        fence = FENCE.fullmatch(line)
        if opened is None:
            if fence is not None:
                opened, code = (fence["indent"], fence["marks"], number + 1, fence["info"].strip()), []
            continue
        indent, marks, first, info = opened
        if fence is not None and fence["marks"].startswith(marks) and not fence["info"].strip():
            words = INFO.fullmatch(info)
            assert words is not None, (
                f"{page.relative_to(ROOT)}:{first - 1}: {info!r} says more than a language, a title"
            )
            yield Block(page, first, words["language"], words["title"] or "", "\n".join(code) + "\n")
            opened = None
        else:
            assert line.startswith(indent) or not line.strip(), f"{page.relative_to(ROOT)}:{number}: less indented"
            code.append(line[len(indent) :])
    assert opened is None, f"{page.relative_to(ROOT)}:{opened[2] - 1}: this block has no end"
