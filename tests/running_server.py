"""A server for tests: a tiny model with adapters, answered from a thread of this process."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import task_models
import text_models
import torch
import transformers

import funclora as fl
from funclora._apps.serve.server import Server
from funclora._apps.serve.settings import ServeSettings
from funclora.serving import Engine

WAIT = 60.0  # seconds, much more than anything here takes
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does in the end."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def save_base(folder: Path) -> Path:
    """A tiny Llama over bytes, with a chat template, whose answers differ from prompt to prompt."""
    torch.manual_seed(0)
    task_models.save(folder, "llama", template=text_models.PLAIN)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int, *, dora: bool) -> None:
    """An adapter with random values that changes every answer."""
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    g = torch.Generator().manual_seed(seed)
    config = fl.LoraConfig(
        r=2 + seed % 3, lora_alpha=8, use_dora=dora, target_modules=TARGETS, base_model_name_or_path=str(base)
    )
    rules: Any = fl.init(model, config, generator=g)
    rules = {name: dataclasses.replace(rule, b=torch.randn(rule.b.shape, generator=g)) for name, rule in rules.items()}
    fl.save_peft(folder, rules, config)


def save_all(folder: Path, adapters: int) -> Path:
    """`model/`, and `adapters/ad-0` and so on, LoRA and DoRA in turn."""
    save_base(folder / "model")
    for i in range(adapters):
        save_adapter(folder / "model", folder / "adapters" / f"ad-{i}", i, dora=i % 2 == 1)
    return folder


class Alone:
    """What each adapter answers alone: transformers' own generation with the bound model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model: Any = transformers.LlamaForCausalLM.from_pretrained(folder / "model").eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "model")
        self._params = fl.base_params(self.model)

    def ids(
        self, prompt: str | Sequence[int], adapter: str | None, tokens: int, *, seed: int | None = None, **options: Any
    ) -> list[int]:
        """The answer's tokens: greedy, or sampled where there is a seed."""
        adapters = {} if adapter is None else fl.load_peft(self._folder / "adapters" / adapter, self.model)[0]
        if seed is not None:
            torch.manual_seed(seed)
            options |= {"do_sample": True, "top_k": 0}
        x = torch.tensor([self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
        out = fl.bind(self.model, self._params, adapters).generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=tokens,
            pad_token_id=0,
            **{"do_sample": False, **options},
        )
        answer: list[int] = out[0, x.shape[1] :].tolist()
        return answer

    def text(self, prompt: str | Sequence[int], adapter: str | None, tokens: int, **options: Any) -> str:
        """The answer."""
        return str(self.tokenizer.decode(self.ids(prompt, adapter, tokens, **options), skip_special_tokens=True))


@dataclasses.dataclass
class Running:
    """A server that answers.

    Attributes:
        server: it.
        client: OpenAI's, without retries.
        http: for what that client would not send.
    """

    server: Server
    client: openai.OpenAI
    http: httpx.Client

    @property
    def engine(self) -> Engine:
        """That of a model that generates."""
        assert self.server.engine is not None
        return self.server.engine


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Running]:
    """Serve `model` and `adapters` of a folder."""
    wanted = {"base": folder / "model", "adapters": folder / "adapters", "port": 0, "device": "cpu", "grace": 5.0}
    server = Server(ServeSettings(**{**wanted, **settings}))
    thread = threading.Thread(target=server.run)
    thread.start()
    key = settings.get("key") or "none"
    try:
        # A connection that is used again may be closed by the server at that moment.
        headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
        with (
            openai.OpenAI(
                base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=WAIT, default_headers=headers
            ) as client,
            httpx.Client(base_url=server.url, timeout=WAIT, trust_env=False, headers=headers) as http,
        ):
            yield Running(server, client, http)
    finally:
        server.stop()
        thread.join(WAIT)
        assert not thread.is_alive()
