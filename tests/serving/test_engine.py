"""`Engine`: every answer is that of its adapter alone, whatever the others do."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch

import funclora as fl
from funclora.serving import Engine, Settings

WAIT = 60.0  # seconds, much more than any answer takes


def save(model: Any, folder: Path, number: int, seed: int | None = None) -> None:
    """An adapter with random values: LoRA for even numbers, DoRA for odd ones, of several ranks."""
    g = torch.Generator().manual_seed(number if seed is None else seed)
    config = fl.LoraConfig(
        r=2 + number % 3,
        lora_alpha=3,
        use_dora=number % 2 == 1,
        target_modules=r".*(proj|lin)\w*",
        exclude_modules="lm_head",
    )
    rules: Any = fl.init(model, config, generator=g)
    rules = {name: dataclasses.replace(rule, b=torch.randn(rule.b.shape, generator=g)) for name, rule in rules.items()}
    fl.save_peft(folder / f"customer-{number}", rules, config)


def alone(model: Any, folder: Path, adapter: str | None, ids: list[int], settings: Settings) -> list[int]:
    adapters = {} if adapter is None else fl.load_peft(folder / adapter, model)[0]
    options: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        options = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": settings.top_p}
        torch.manual_seed(settings.seed or 0)
    x = torch.tensor([ids])
    out = fl.bind(model, fl.base_params(model), adapters).generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=settings.max_tokens, pad_token_id=0,
        eos_token_id=list(settings.stop_ids) or None, **options,
    )  # fmt: skip
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def requests(names: list[str | None], n: int, seed: int = 0) -> list[tuple[list[int], str | None, Settings]]:
    chosen = random.Random(seed)
    found: list[tuple[list[int], str | None, Settings]] = []
    for i in range(n):
        ids = [chosen.randrange(4, 60) for _ in range(chosen.randint(1, 20))]
        settings = Settings(
            max_tokens=chosen.randint(1, 12), temperature=chosen.choice([0.0, 0.8]), top_p=chosen.choice([1.0, 0.9]),
            seed=i, stop_ids=chosen.choice([(), (5, 6, 7)]),
        )  # fmt: skip
        found.append((ids, chosen.choice(names), settings))
    return found


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MistralForCausalLM", "MambaForCausalLM"])
def test_every_answer_is_that_of_its_adapter_alone(kind: str, tmp_path: Path) -> None:
    model, _ = architectures.build(kind)
    for number in range(4):
        save(model, tmp_path, number)
    asked = requests([None, *(f"customer-{i}" for i in range(4))], 16)
    with Engine(model, fl.base_params(model), tmp_path, max_rows=5, prefill_tokens=6, eos_ids=()) as engine:
        streams = [engine.submit(*request) for request in asked]
        answers = [stream.result(WAIT) for stream in streams]
    assert answers == [alone(model, tmp_path, name, ids, settings) for ids, name, settings in asked]
