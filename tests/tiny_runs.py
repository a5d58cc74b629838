"""Runs small enough to take a moment: a byte model, a tiny Llama, random rows."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import llama

import funclora as fl
from funclora._apps.train.base import Base
from funclora._apps.train.examples import IGNORED, Data, Example
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora._apps.train.preference_rows import compared, judged
from funclora._apps.train.reference import preferring
from funclora._apps.train.settings import CAUSAL, PREFERENCE, Settings
from funclora._apps.train.tokenizer import ByteTokenizer
from funclora.demo.model import ByteLM, ByteLMConfig


class Rows(Data):
    """Data that were never in a file."""

    def digest(self) -> str:
        return hashlib.sha256(repr((self.train, self.validation)).encode()).hexdigest()


class Padded:
    """All that the loop asks of a tokenizer."""

    pad_token_id = 0


def rows(n: int, vocabulary: int, seed: int = 0, longest: int = 9) -> list[Example]:
    """Random rows of different lengths, the first tokens of each without loss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        size = int(torch.randint(4, longest + 1, (), generator=generator))
        ids = torch.randint(1, vocabulary, (size,), generator=generator).tolist()
        prompt = i % 3
        made.append(Example(ids, [IGNORED] * prompt + ids[prompt:], (size,), f"train.jsonl:{i + 1}"))
    return made


def data(vocabulary: int = 256, n: int = 13, validation: int = 5) -> Rows:
    return Rows(rows(n, vocabulary), rows(validation, vocabulary, seed=1))


def preferences(given: Settings) -> Rows:
    """Pairs of answers; for kto single ones with a verdict."""

    def made(n: int, seed: int) -> list[Example]:
        some, others = rows(n, 256, seed), rows(n, 256, seed + 7)
        if given.loss == "kto":
            return [judged(row, i % 3 == 0) for i, row in enumerate(some)]
        return [compared(*pair) for pair in zip(some, others, strict=True)]

    return Rows(made(13, 0), made(5, 1))


def byte_base() -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ByteLM(ByteLMConfig(dim=8, layers=1, heads=2, hidden=12, context=12)).eval()
    return Base("tiny", model, fl.base_params(model), ByteTokenizer(), CAUSAL, 12)


def llama_base(dtype: torch.dtype = torch.float32) -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = llama().to(dtype).eval()
    return Base("tiny", model, fl.base_params(model), Padded(), CAUSAL, 16)


def fresh(base: Base, settings: Settings, **options: Any) -> dict[str, Any]:
    config = lora_config(settings, **options)
    return fl.init(base.model, config, generator=torch.Generator().manual_seed(settings.seed), params=base.params)


def lora_config(settings: Settings, **options: Any) -> fl.LoraConfig:
    given: dict[str, Any] = {
        "r": settings.rank, "lora_alpha": settings.alpha, "use_dora": settings.method == "dora",
        "lora_dropout": settings.dropout, "target_modules": ["q_proj", "v_proj", "down_proj"],
    }  # fmt: skip
    return fl.LoraConfig(**given | options)


def settings(out: Path, **options: Any) -> Settings:
    tiny = Settings(out=out, rank=2, alpha=4, lr=1e-2, batch=2, accumulation=2, steps=8, warmup=2, dropout=0.25)
    return replace(tiny, **options)


def run(
    given: Settings, base: Base | None = None, rows: Data | None = None, adapters: Any = None
) -> tuple[Any, Journal]:
    """The outcome, and what was told."""
    preferred = given.task == PREFERENCE and base is None
    base = base or byte_base()
    if preferred:
        base, rows = preferring(base, {}, given), rows or preferences(given)
    adapters = adapters or fresh(base, given)
    with Journal(given, quiet=True) as journal:
        return train(base, adapters, rows or data(), given, journal), journal


def console() -> tuple[Any, io.StringIO]:
    from rich.console import Console

    text = io.StringIO()
    return Console(file=text, width=200), text


def same(got: Any, want: Any) -> None:
    """Adapters alike, bit for bit."""
    assert {*got} == {*want}
    for name, rule in want.items():
        for leaf in rule.leaf_names:
            assert torch.equal(getattr(got[name], leaf), getattr(rule, leaf)), (name, leaf)


def close(got: Any, want: Any, tolerance: float) -> None:
    """Adapters alike, up to rounding."""
    assert {*got} == {*want}
    for name, rule in want.items():
        for leaf in rule.leaf_names:
            torch.testing.assert_close(getattr(got[name], leaf), getattr(rule, leaf), rtol=tolerance, atol=tolerance)
