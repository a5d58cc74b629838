"""A real server on loopback, asked by OpenAI's own client: every answer is that of its adapter alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from running_server import Alone, Running, running, save_all, until

import funclora as fl
from funclora._apps.serve.app import HEADERS
from funclora.io.peft.files import WEIGHTS_FILE

PROMPT = "one and two"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("served"), 3)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    return Alone(folder)


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Running]:
    with running(folder) as found:
        yield found


def test_the_models(run: Running) -> None:
    found = [(model.id, getattr(model, "parent", None)) for model in run.client.models.list()]
    assert found == [("model", None), ("ad-0", "model"), ("ad-1", "model"), ("ad-2", "model")]
    assert run.client.models.retrieve("ad-1").id == "ad-1"


def test_each_model_answers_as_alone(run: Running, alone: Alone) -> None:
    answers = []
    for model in ("model", "ad-0", "ad-1", "ad-2"):
        out = run.client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
        ids = alone.ids(PROMPT, None if model == "model" else model, 24)
        assert out.choices[0].text == alone.tokenizer.decode(ids, skip_special_tokens=True)
        assert out.choices[0].finish_reason == ("length" if len(ids) == 24 and ids[-1] != 2 else "stop")
        assert out.usage is not None
        # <s> and a token for each byte
        assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (len(PROMPT) + 1, len(ids))
        assert out.model == model
        answers.append(out.choices[0].text)
    assert len(set(answers)) == 4


@pytest.mark.parametrize("prompt", [[5, 6, 7], "é 漢字"], ids=["ids", "text"])
def test_a_stream_is_the_same_text(run: Running, alone: Alone, prompt: Any) -> None:
    asked: Any = {"model": "ad-0", "prompt": prompt, "max_tokens": 30, "temperature": 0}
    whole = run.client.completions.create(**asked)
    parts = [*run.client.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    text = "".join(part.choices[0].text for part in parts if part.choices)
    assert text == whole.choices[0].text == alone.text(prompt, "ad-0", 30)
    assert len(parts) > 5
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(part.choices[0].finish_reason is None for part in parts[:-2])


def test_a_sample_depends_on_its_seed_alone(run: Running, alone: Alone) -> None:
    asked: Any = {"model": "ad-1", "prompt": PROMPT, "max_tokens": 20, "temperature": 0.9, "top_p": 0.8}
    out = run.client.completions.create(**asked, n=3, seed=7)
    expected = [alone.text(PROMPT, "ad-1", 20, seed=seed, temperature=0.9, top_p=0.8) for seed in (7, 8, 9)]
    assert [choice.text for choice in out.choices] == expected
    assert len(set(expected)) == 3
    assert [choice.index for choice in out.choices] == [0, 1, 2]
    again = run.client.completions.create(**asked, seed=8)
    assert again.choices[0].text == expected[1]
    assert out.usage is not None
    assert out.usage.prompt_tokens == len(PROMPT) + 1


def test_several_prompts(run: Running, alone: Alone) -> None:
    out = run.client.completions.create(model="ad-2", prompt=["a", "bc"], n=1, max_tokens=5, temperature=0)
    assert [choice.text for choice in out.choices] == [alone.text(prompt, "ad-2", 5) for prompt in ("a", "bc")]


def test_a_chat(run: Running, alone: Alone) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
    ids = alone.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    asked: Any = {"model": "ad-0", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    out = run.client.chat.completions.create(**asked)
    assert out.choices[0].message.content == alone.text(ids, "ad-0", 12)
    assert out.choices[0].message.role == "assistant"
    assert out.usage is not None
    assert out.usage.prompt_tokens == len(ids)
    parts = [*run.client.chat.completions.create(**asked, stream=True)]
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == out.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == out.choices[0].finish_reason
    parted: Any = [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]}]
    found = run.client.chat.completions.create(**asked | {"messages": messages[:1] + parted})
    assert found.choices[0].message.content == out.choices[0].message.content


def test_an_answer_without_a_number_of_tokens_has_what_the_context_allows(run: Running) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    out = run.client.chat.completions.create(model="model", messages=messages, temperature=0)
    assert out.usage is not None
    assert out.choices[0].finish_reason == "stop" or out.usage.total_tokens == 128
    short = run.client.completions.create(model="model", prompt=PROMPT, temperature=0)
    assert short.usage is not None
    assert short.usage.completion_tokens <= 16


def test_stop_strings(run: Running, alone: Alone) -> None:
    text = alone.text(PROMPT, "ad-0", 40)
    for stop in (text[7:10], [text[12:16], text[5:7]], "not in it"):
        at = [text.index(each) for each in ([stop] if isinstance(stop, str) else stop) if each in text]
        asked: Any = {"model": "ad-0", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": stop}
        out = run.client.completions.create(**asked)
        streamed = "".join(part.choices[0].text for part in run.client.completions.create(**asked, stream=True))
        assert out.choices[0].text == streamed == (text[: min(at)] if at else text)
        if at:
            assert out.choices[0].finish_reason == "stop"
            assert out.usage is not None
            assert out.usage.completion_tokens < 40


def test_log_probabilities(run: Running, alone: Alone, folder: Path) -> None:
    asked: Any = {"model": "ad-0", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    found = run.client.completions.create(**asked, logprobs=2).choices[0].logprobs
    ids = alone.ids(PROMPT, "ad-0", 6)
    adapters = fl.load_peft(folder / "adapters" / "ad-0", alone.model)[0]
    prompt = alone.tokenizer(PROMPT)["input_ids"]
    logits: Any = fl.bind(alone.model, fl.base_params(alone.model), adapters)(torch.tensor([prompt + ids])).logits
    expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert found is not None
    assert found.tokens == [alone.tokenizer.decode([i]) for i in ids]
    torch.testing.assert_close(
        torch.tensor(found.token_logprobs), expected[torch.arange(len(ids)), torch.tensor(ids)], rtol=1e-4, atol=1e-4
    )
    assert found.top_logprobs is not None
    assert [len(each) for each in found.top_logprobs] == [2] * len(ids)
    whole = [alone.tokenizer.decode(ids[:i]).rstrip("\ufffd") for i in range(len(ids))]  # half a character is none yet
    assert found.text_offset == [len(text) for text in whole]
    messages: Any = [{"role": "user", "content": "x"}]
    chat = run.client.chat.completions.create(
        model="ad-0", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    said = chat.choices[0].logprobs
    assert said is not None
    assert said.content is not None
    for entry in said.content:
        assert entry.token == entry.top_logprobs[0].token
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob
    bare = run.client.completions.create(**asked)
    assert bare.choices[0].logprobs is None


def test_the_page_and_its_headers(run: Running) -> None:
    page = run.http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for name, value in HEADERS.items():
        assert page.headers[name] == value
    for name in ("page.js", "page.css"):
        assert f'"{name}"' in page.text
        assert run.http.get(f"/{name}").status_code == 200
    for text in (page.text, run.http.get("/page.js").text, run.http.get("/page.css").text):
        assert "://" not in text
        assert "innerHTML" not in text
        assert "<style" not in text
        assert "onclick" not in text


def test_sixty_requests_over_twelve_adapters_with_eviction(tmp_path: Path) -> None:
    folder = save_all(tmp_path, 12)
    alone = Alone(folder)
    largest = max(file.stat().st_size for file in folder.glob(f"adapters/*/{WEIGHTS_FILE}"))
    chosen = random.Random(0)
    requests: list[Any] = []
    for i in range(60):
        sampled = i % 3 == 0
        requests.append(
            {
                "model": f"ad-{i % 12}" if i % 10 else "model",
                "prompt": "".join(chosen.choice("abc de") for _ in range(chosen.randint(1, 20))),
                "max_tokens": chosen.randint(1, 16),
                "temperature": 0.8 if sampled else 0,
                "seed": i if sampled else None,
            }
        )
    with running(folder, max_rows=6, memory=6 * largest) as run:

        def ask(i: int) -> str:
            asked = requests[i]
            if i % 2:
                parts = run.client.completions.create(**asked, stream=True)
                return "".join(part.choices[0].text for part in parts)
            return str(run.client.completions.create(**asked).choices[0].text)

        with ThreadPoolExecutor(20) as pool:
            answers = [*pool.map(ask, range(60))]
        numbers = metrics(run)
    for asked, answer in zip(requests, answers, strict=True):
        options = {} if asked["seed"] is None else {"seed": asked["seed"], "temperature": 0.8}
        name = None if asked["model"] == "model" else asked["model"]
        assert answer == alone.text(asked["prompt"], name, asked["max_tokens"], **options), asked
    assert len(set(answers)) > 40
    assert numbers["funclora_adapter_cache_evictions_total"] > 0
    assert numbers['funclora_requests_total{path="/v1/completions",status="200"}'] == 60
    assert numbers["funclora_time_to_first_token_seconds_count"] == 60


def metrics(run: Running) -> dict[str, float]:
    """The numbers of /metrics, in the form that Prometheus reads."""
    response = run.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for line in response.text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name not in found
            found[name] = float(value)
    return found


def test_the_metrics(run: Running) -> None:
    before = metrics(run)
    run.client.completions.create(model="ad-0", prompt="abc", max_tokens=3, temperature=0)
    run.http.get("/nothing/here")
    after = metrics(run)
    generated = after["funclora_generated_tokens_total"] - before["funclora_generated_tokens_total"]
    assert 1 <= generated <= 3
    assert after["funclora_prompt_tokens_total"] == before["funclora_prompt_tokens_total"] + 4
    assert after['funclora_requests_total{path="other",status="404"}'] >= 1
    until(lambda: metrics(run)["funclora_batch_rows"] == metrics(run)["funclora_queue_length"] == 0)
    buckets = [value for name, value in after.items() if "first_token_seconds_bucket" in name]
    assert buckets == sorted(buckets)
    assert buckets[-1] == after["funclora_time_to_first_token_seconds_count"]
    assert json.loads(run.http.get("/health").text) == {"status": "ok"}
