"""Bases that are quantised, or of a smaller dtype: the answers are those of the same base bound alone."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from running_server import WAIT, running, save_all
from torch import nn

import funclora as fl
from funclora.demo.model import load_base
from funclora.serving import Settings

PROMPTS = ["one and two", "a", "def f(x):\n    return"]
NAMES = ["model", "ad-0", "ad-1"]
TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("served"), 2)


def quantized(model: nn.Module, kept: str | None = None) -> dict[str, torch.Tensor]:
    """Its weights with all linear layers in nf4, but perhaps one, as QLoRA has them."""
    linear = [f"{name}.weight" for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != kept]
    params = fl.base_params(model)
    return {**params, **fl.quantize(params, linear, "nf4", double_quant=True)}


def asked_at_once(run: Any, pairs: list[tuple[str, str]]) -> list[Any]:
    def ask(pair: tuple[str, str]) -> Any:
        return run.client.completions.create(
            model=pair[0], prompt=pair[1], max_tokens=TOKENS, temperature=0, logprobs=2
        ).choices[0]

    with ThreadPoolExecutor(len(pairs)) as pool:
        return [*pool.map(ask, pairs)]


def test_a_quantised_base(folder: Path) -> None:
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "model")
    params = quantized(model, "lm_head")
    pairs = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    with running(folder, quantize="nf4") as run:
        answers = [answer.text for answer in asked_at_once(run, pairs)]
    expected: list[str] = []
    dense: list[str] = []
    for name, prompt in pairs:
        adapters = {} if name == "model" else fl.load_peft(folder / "adapters" / name, model)[0]
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        for found, weights in ((expected, params), (dense, fl.base_params(model))):
            out = fl.bind(model, weights, adapters).generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )
            found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert answers == expected != dense


def test_the_demo_with_a_quantised_base(tmp_path: Path) -> None:
    model = load_base()
    g = torch.Generator().manual_seed(0)
    adapters: dict[str, Any] = {"demo": {}}
    for name, dora in (("lora", False), ("dora", True)):
        config = fl.LoraConfig(r=4, use_dora=dora, target_modules=["q_proj", "down_proj"])
        rules: Any = fl.init(model, config, generator=g)
        adapters[name] = {
            key: dataclasses.replace(rule, b=torch.randn(rule.b.shape, generator=g) / 4) for key, rule in rules.items()
        }
        fl.save_peft(tmp_path / "adapters" / name, adapters[name], config)
    params = quantized(model)
    pairs = [(name, prompt) for prompt in PROMPTS for name in adapters]
    with running(tmp_path, base=None, quantize="nf4") as run:
        assert run.server.notes
        answers = [answer.text for answer in asked_at_once(run, pairs)]
    expected = []
    for name, prompt in pairs:
        said: bytes = fl.bind(model, params, adapters[name]).generate(prompt.encode(), TOKENS, temperature=0.0)
        expected.append(said[len(prompt) :].decode(errors="replace"))
    assert answers == expected
    assert len(set(answers[:3])) == 3


def test_bfloat16(folder: Path) -> None:
    """Each token is the likeliest one of the bound model, up to rounding, which depends on the batch."""
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "model")
    params = fl.base_params(model)
    asked = [(tokenizer(prompt)["input_ids"], name) for prompt in PROMPTS for name in (None, "ad-0", "ad-1")]
    with running(folder, dtype="bfloat16") as run:
        assert {value.dtype for value in (run.engine.cache.params or {}).values()} == {torch.bfloat16}
        streams = [run.engine.submit(ids, name, Settings(TOKENS, temperature=0.0)) for ids, name in asked]
        answers = [stream.result(WAIT) for stream in streams]
    for (ids, name), answer in zip(asked, answers, strict=True):
        adapters = {} if name is None else fl.load_peft(folder / "adapters" / name, model)[0]
        logits: Any = fl.bind(model, params, adapters)(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        chosen = logits[torch.arange(len(answer)), torch.tensor(answer)].float()
        most = logits.float().amax(1)
        assert (chosen >= most - 0.02 * most.abs()).all()
