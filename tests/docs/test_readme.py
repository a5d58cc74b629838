"""The code in the README and on the pages of the documentation runs, and does what it says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pages import CONTRIBUTING, DOCS, PAGES, README, ROOT, Block, blocks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN = {"python"}
CHECKED = {"sh", "console"}  # by test_pages_commands.py
SHOWN = {"text", "json", "jsonl", "yaml", "toml"}  # what stands in a file, or is printed

SESSIONS = {
    "classification.md",
    "embeddings.md",
    "many-devices.md",
    "preferences.md",
    "serve.md",
    "session.md",
    "training.md",
}  # run from first to last line by tests of their own

# What other libraries warn of, which no page can help.
QUIET = {
    "coming-from-peft.md": ["ignore::UserWarning:peft", "ignore::FutureWarning"],
}


def code(page: Path) -> list[Block]:
    """The Python of a page, without what `test_examples.py` reads from the examples, and scripts: their pages' tests
    run those.
    """
    return [b for b in blocks(page) if b.language in RUN and not b.snippets and not b.title.endswith(".py")]


def named(page: Path, *more: Any) -> Any:
    marks = [pytest.mark.filterwarnings(text) for text in QUIET.get(page.name, [])]
    name = "-".join([str(page.relative_to(ROOT)), *(f"{value}" for value in more if value is not None)])
    return pytest.param(page, *more, id=name, marks=marks)


def test_the_example_runs() -> None:
    (block,) = code(README)
    names: dict[str, Any] = {}
    block.run(names)
    model, params, merged = names["model"], names["params"], names["merged"]
    assert all(torch.equal(params[name], tensor) for name, tensor in model.state_dict().items())
    before = torch.nn.functional.cross_entropy(model(names["x"]), names["y"])
    assert names["metrics"]["loss"] < 0.5 * before
    model.load_state_dict(merged)
    torch.testing.assert_close(model(names["x"]), names["logits"])


def runs() -> Iterator[Any]:
    """(page, what bitsandbytes takes the processor for): on those with AVX512-BF16 its layers repack their weights."""
    for page in PAGES:
        if page != README and code(page):
            packs = any("bitsandbytes" in block.code for block in code(page))
            for avx512_bf16 in (False, True) if packs else (None,):
                yield named(page, avx512_bf16)


@pytest.mark.parametrize(("page", "avx512_bf16"), [*runs()])
def test_the_code_of_a_page_runs(
    page: Path, avx512_bf16: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the page, in one namespace; a block under "PEFT" and the next under "funclora" have one value."""
    if avx512_bf16 is not None:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: avx512_bf16)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    waiting: list[tuple[Block, Any]] = []
    for block in code(page):
        value = block.run(names)
        if block.title == "PEFT":
            assert value is not None, f"{block.place}: its last line must have the value that is compared"
            waiting.append((block, value))
        elif block.title == "funclora":
            assert len(waiting) == 1, f"{block.place}: expected one block under PEFT before, found {len(waiting)}"
            same(block.place, value, waiting.pop()[1])
    assert not waiting, f"{waiting[0][0].place}: there is no block under funclora after it"


def same(place: str, ours: Any, theirs: Any) -> None:
    """Numbers, and those of tensors and lists, agree to rounding; all else is equal."""
    if isinstance(theirs, list):
        assert isinstance(ours, list), place
        assert len(ours) == len(theirs) > 0, place
        for one, other in zip(ours, theirs, strict=True):
            same(place, one, other)
    elif isinstance(theirs, (torch.Tensor, float)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text: f"{place}: {text}")
    else:
        assert ours == theirs, place


def test_a_pair_that_differs_is_found() -> None:
    same("here", [1.0, torch.ones(2), "a"], [1.0 + 1e-7, torch.ones(2), "a"])
    for ours, theirs in [(torch.ones(2), torch.zeros(2)), ([1.0], [1.1]), ([1.0], [1.0, 2.0]), ("a", "b"), (None, 1.0)]:
        with pytest.raises((AssertionError, TypeError), match=r"here|None"):
            same("here", ours, theirs)


@pytest.mark.parametrize("page", [named(page) for page in PAGES])
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    for block in blocks(page):
        known = ", ".join(sorted(RUN | CHECKED | SHOWN))
        assert block.language in RUN | CHECKED | SHOWN, (
            f"{block.place}: expected one of {known}, got {block.language!r}"
        )
        if block.language == "python" and block.title not in ("", "PEFT", "funclora"):
            assert block.title.endswith(".py"), block.place
            assert page.name in SESSIONS, block.place


def read(block: Block) -> None:
    """Read what stands in a file, as a program would."""
    if block.language == "json":
        json.loads(block.code)
    elif block.language == "jsonl":
        for line in block.code.splitlines():
            json.loads(line)
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)


@pytest.mark.parametrize("page", [named(page) for page in PAGES if any(b.language in SHOWN for b in blocks(page))])
def test_what_stands_in_a_file_can_be_read(page: Path) -> None:
    for block in blocks(page):
        read(block)


def test_a_file_that_cannot_be_read_is_found() -> None:
    for language, text in [("json", "{"), ("jsonl", "{}\n{"), ("yaml", "a: ["), ("toml", "a = ")]:
        with pytest.raises((ValueError, yaml.YAMLError)):
            read(Block(README, 1, language, "", text))


def test_a_script_on_a_page_is_run_by_the_tests_of_the_examples() -> None:
    tests = (ROOT / "tests" / "docs" / "test_examples.py").read_text(encoding="utf-8")
    found = [(block, *snippet) for page in PAGES for block in blocks(page) for snippet in block.snippets]
    assert found
    for block, file, section in found:
        path = ROOT / file
        assert path.parent == ROOT / "examples", f"{block.place}: {file} is no example"
        assert f'run("{path.stem}"' in tests, f"{block.place}: test_examples.py does not run {file}"
        text = path.read_text(encoding="utf-8")
        for mark in ("start", "end"):
            assert not section or text.count(f"# --8<-- [{mark}:{section}]") == 1, f"{block.place}: {file}:{section}"


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Leaves the tags of mkdocs alone."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    listed = pages(settings["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) >= {"contributing.md"} | {str(page.relative_to(DOCS)) for page in PAGES if page.parent == DOCS}


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=lambda page: page.name)
def test_what_a_page_of_the_root_links_to_is_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8").replace("\n", " "))
    assert len(targets) > 2
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []
