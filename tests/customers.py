"""Folders of adapters, requests for them, and the answer that each must get: transformers' `generate`, alone."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import funclora as fl
from funclora.serving import Settings, Token

WAIT = 60.0  # seconds: what hangs fails, and nothing takes nearly as long
# The linear layers of attention and of states, by their names in many models.
TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj|fc1|fc2|in_proj|embed_tokens)"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request."""

    ids: list[int]
    adapter: str | None
    settings: Settings


class Customers:
    """A base model and a folder of adapters for it: LoRA and DoRA in turn, of several ranks and scalings.

    Args:
        model: the base model.
        folder: for the adapters.
        n: how many there are.
    """

    def __init__(self, model: Any, folder: Path, n: int) -> None:
        self.model, self.folder, self.params = model, folder, fl.base_params(model)
        model.generation_config = transformers.GenerationConfig()  # some classes force tokens
        self.names = [f"customer-{i}" for i in range(n)]
        for i, name in enumerate(self.names):
            self.save(name, i)

    def save(self, name: str, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        config = fl.LoraConfig(r=2 + seed % 3, lora_alpha=3 + seed % 2, use_dora=seed % 2 == 1, target_modules=TARGETS)
        rules: Any = fl.init(self.model, config, generator=g)
        moved = {
            key: dataclasses.replace(rule, b=torch.randn(rule.b.shape, generator=g) / 3) for key, rule in rules.items()
        }
        fl.save_peft(self.folder / name, moved, config, model=self.model)

    def asked(self, n: int, seed: int = 0, longest: int = 20) -> list[Asked]:
        """Requests of all kinds: any adapter or none, long and short, greedy and sampled, with and without stops."""
        chosen = random.Random(seed)
        return [
            Asked(
                [chosen.randrange(4, 60) for _ in range(chosen.randint(1, longest))],
                chosen.choice([None, *self.names]),
                Settings(
                    max_tokens=chosen.randint(1, 12), temperature=chosen.choice([0.0, 0.8]),
                    top_p=chosen.choice([1.0, 0.9]), seed=i, stop_ids=chosen.choice([(), (5, 6, 7)]),
                ),
            )
            for i in range(n)
        ]  # fmt: skip

    def alone(self, asked: Asked) -> list[int]:
        """What `bound.generate` gives for a request, with the adapter as its folder is now."""
        adapters = {} if asked.adapter is None else fl.load_peft(self.folder / asked.adapter, self.model)[0]
        settings, options = asked.settings, {"do_sample": False}  # type: Settings, dict[str, Any]
        if settings.temperature:
            options = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": settings.top_p}
            torch.manual_seed(settings.seed or 0)
        ids = torch.tensor([asked.ids])
        out = fl.bind(self.model, self.params, adapters).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.max_tokens, pad_token_id=0,
            eos_token_id=list(settings.stop_ids) or None, **options,
        )  # fmt: skip
        answer: list[int] = out[0, ids.shape[1] :].tolist()
        return answer


class Gate:
    """A callback of a stream that holds the engine at a token, until it is opened."""

    def __init__(self, at: int) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self._left = at

    def __call__(self, token: Token | None) -> None:
        self._left -= 1
        if not self._left:
            self.reached.set()
            assert self._open.wait(WAIT)

    def wait(self) -> None:
        assert self.reached.wait(WAIT)

    def open(self) -> None:
        self._open.set()


def counted(run: Callable[[int], None]) -> Callable[[Token | None], None]:
    """A callback that gets the number of each token."""
    numbers: Iterator[int] = iter(range(1, 10**6))

    def callback(token: Token | None) -> None:
        if token is not None:
            run(next(numbers))

    return callback
