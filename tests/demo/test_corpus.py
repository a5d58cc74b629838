import itertools
import sysconfig
from pathlib import Path

import pytest
import torch

from funclora.demo.corpus import (
    CHUNK,
    DOMAINS,
    EVERY,
    base_files,
    base_text,
    batches,
    domain_files,
    domain_text,
    split,
    split_text,
    windows,
)


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_has_enough_text(name: str) -> None:
    train, heldout = split(name)
    assert len(train) + len(heldout) >= 60_000
    assert 0.08 < len(heldout) / (len(train) + len(heldout)) < 0.15


def test_there_are_enough_domains() -> None:
    assert len(DOMAINS) >= 8


@pytest.mark.parametrize("length", [0, 1, CHUNK, CHUNK * EVERY - 1, CHUNK * EVERY, CHUNK * EVERY * 3 + 5])
def test_each_byte_goes_to_one_side_of_the_split(length: int) -> None:
    # Four bytes number each position, so equal contents cannot hide a byte that is on both sides, or lost.
    text = b"".join(position.to_bytes(4, "big") for position in range(length // 4 + 1))[:length]
    train, heldout = split_text(text)
    chunks = [text[start : start + CHUNK] for start in range(0, length, CHUNK)]
    kept, held = iter([train[i : i + CHUNK] for i in range(0, len(train), CHUNK)]), 0
    for index, chunk in enumerate(chunks):
        if index % EVERY == EVERY - 1:
            assert heldout[held : held + len(chunk)] == chunk
            held += len(chunk)
        else:
            assert next(kept) == chunk
    assert len(train) + len(heldout) == length


def test_a_domain_is_its_package_in_the_order_of_paths() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = domain_files("email")
    assert [file.relative_to(root).as_posix() for file in files] == sorted(
        file.relative_to(root).as_posix() for file in files
    )
    assert root / "email" / "mime" / "text.py" in files
    assert domain_text("email") == b"".join(file.read_bytes() for file in files)


def test_the_base_has_no_file_of_a_domain() -> None:
    domains = set(itertools.chain.from_iterable(domain_files(name) for name in DOMAINS))
    assert domains
    assert not domains & set(base_files())


def test_the_base_is_the_rest_of_the_library() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = base_files()
    assert {root / "argparse.py", root / "json" / "decoder.py"} <= set(files)
    assert len(base_text()) > 3_000_000


def test_no_text_has_tests_or_foreign_packages() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    for file in itertools.chain(base_files(), *(domain_files(name) for name in DOMAINS)):
        assert not unwanted & set(file.relative_to(root).parts)


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of asyncio, .*, got 'emial'"):
        domain_text("emial")


def test_a_python_without_the_sources_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"expected the sources of 'email', found no \.py file"):
        domain_text("email")


def test_batches_are_windows_that_the_generator_decides() -> None:
    text = bytes(range(200))
    one, two, three = (
        list(itertools.islice(batches(text, batch=4, context=9, generator=torch.Generator().manual_seed(s)), 20))
        for s in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], three[0])
    assert one[0].shape == (4, 10)
    assert one[0].dtype == torch.int64
    assert all((batch.diff(dim=1) == 1).all() for batch in one)


def test_batches_reach_both_ends() -> None:
    drawn = torch.cat(list(itertools.islice(batches(b"abc", batch=8, context=1, generator=torch.Generator()), 9)))
    assert {tuple(row) for row in drawn.tolist()} == {(97, 98), (98, 99)}


def test_windows_span_the_text() -> None:
    rows = windows(bytes(range(100)), count=3, context=9)
    assert rows.shape == (3, 10)
    assert rows[0, 0] == 0
    assert rows[-1, -1] == 99
    assert torch.equal(rows, windows(bytes(range(100)), count=3, context=9))
