"""An encoder: the vectors of texts, each under its own adapter, equal those of transformers with PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import task_models
import torch
import torch.nn.functional as F
import transformers
from running_server import Running, running
from torch import Tensor

from funclora._apps.serve.embeddings import pooling_of
from funclora.errors import ConfigError, UnsupportedError

TEXTS = ["a short text", "é", "another text that is longer than the others"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    task_models.save(folder / "model", "bert")
    for i in range(3):
        torch.manual_seed(i)
        config = peft.LoraConfig(
            r=2 + i, target_modules=["query", "value"], use_dora=i == 1, init_lora_weights=False, lora_alpha=16,
            task_type="FEATURE_EXTRACTION",
        )  # fmt: skip
        peft.get_peft_model(transformers.AutoModel.from_pretrained(folder / "model"), config).save_pretrained(
            folder / "adapters" / f"ad-{i}"
        )
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Running]:
    with running(folder) as found:
        yield found


def expected(folder: Path, text: str, adapter: str | None, pooling: str = "mean") -> Tensor:
    model: Any = transformers.AutoModel.from_pretrained(folder / "model")
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, folder / "adapters" / adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    with torch.no_grad():
        hidden = model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
    return F.normalize({"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling], dim=0)


def vectors(run: Running, model: str, texts: Any) -> Tensor:
    out = run.client.embeddings.create(model=model, input=texts)
    assert [each.index for each in out.data] == list(range(len(out.data)))
    return torch.tensor([each.embedding for each in out.data])


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_vectors_are_those_of_each_adapter(run: Running, folder: Path) -> None:
    names = ["model", "ad-0", "ad-1", "ad-2"] * 3
    with ThreadPoolExecutor(6) as pool:
        found = [*pool.map(lambda name: vectors(run, name, TEXTS), names)]
    for name, rows in zip(names[:4], found, strict=False):
        for row, text in zip(rows, TEXTS, strict=True):
            torch.testing.assert_close(row, expected(folder, text, None if name == "model" else name))
    for first, again in zip(found[:4], found[4:8], strict=True):
        torch.testing.assert_close(first, again)
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", ["first", "last"])
def test_poolings(folder: Path, pooling: str) -> None:
    with running(folder, pooling=pooling) as run:
        for row, text in zip(vectors(run, "model", TEXTS), TEXTS, strict=True):
            torch.testing.assert_close(row, expected(folder, text, None, pooling))


def test_forms_and_counts(run: Running) -> None:
    plain = run.http.post("/v1/embeddings", json={"model": "ad-0", "input": "a"}).json()
    assert plain["usage"] == {"prompt_tokens": 2, "total_tokens": 2}  # the tokenizer ends texts
    torch.testing.assert_close(torch.tensor([plain["data"][0]["embedding"]]), vectors(run, "ad-0", "a"))
    ids = run.http.post("/v1/embeddings", json={"model": "ad-0", "input": [[5, 6], [7]]}).json()
    assert len(ids["data"]) == 2


WRONG = [
    ({"model": "none"}, 404, "model"),
    ({"input": ""}, 200, None),
    ({"input": []}, 400, "input"),
    ({"input": [None]}, 400, "input"),
    ({"input": "x" * 200}, 400, "input"),
    ({"dimensions": 4}, 400, "dimensions"),
    ({"encoding_format": "int8"}, 400, "encoding_format"),
]


@pytest.mark.parametrize(("extra", "status", "param"), WRONG, ids=str)
def test_wrong_requests(run: Running, extra: Any, status: int, param: str | None) -> None:
    response = run.http.post("/v1/embeddings", json={"model": "model", "input": "a", **extra})
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["param"] == param


def test_an_encoder_generates_nothing(run: Running) -> None:
    assert run.http.post("/v1/completions", json={"model": "model", "prompt": "a"}).status_code == 404
    assert run.http.get("/health").json() == {"status": "ok"}
    assert "funclora_requests_total" in run.http.get("/metrics").text


def test_a_broken_adapter_and_a_full_queue(folder: Path) -> None:
    broken = folder / "adapters" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    with running(folder, max_queue=4) as run:

        def ask(name: str, texts: list[str]) -> int:
            return run.http.post("/v1/embeddings", json={"model": name, "input": texts}).status_code

        with ThreadPoolExecutor(3) as pool:
            assert [*pool.map(ask, ["broken", "ad-0", "model"], [["a"]] * 3)] == [422, 200, 200]
        assert ask("model", ["a"] * 5) == 429


def test_the_pooling_of_a_folder(tmp_path: Path, folder: Path) -> None:
    assert pooling_of(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert pooling_of(tmp_path) == "first"
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UnsupportedError, match="pooling_mode_max_tokens, and mean, first, last are supported"):
        pooling_of(tmp_path)
    with pytest.raises(ConfigError, match=r"--quantize: .* is an encoder"), running(folder, quantize="nf4"):
        pass


def test_sequence_to_sequence_is_refused(tmp_path: Path) -> None:
    task_models.save(tmp_path / "model", "t5")
    with (
        pytest.raises(UnsupportedError, match="only decoders and encoders can be served"),
        running(tmp_path, adapters=None),
    ):
        pass
