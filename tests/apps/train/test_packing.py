"""Packed rows: each example has the logits and the loss that it has alone, or the model is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from text_models import tokenizer
from torch import Tensor

from funclora._apps.train.base import load_base, load_tokenizer
from funclora._apps.train.batches import collate, evaluation
from funclora._apps.train.examples import prepare
from funclora._apps.train.packing import check_packing, is_packed, pack, positions
from funclora._apps.train.rows import IGNORED, Example
from funclora._apps.train.settings import CAUSAL, PREFERENCE, Settings
from funclora._apps.train.setup import ready
from funclora.errors import ConfigError, UnsupportedError

VOCAB = 37
SHAPE = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def build(name: str, attention: str = "sdpa") -> Any:
    """A tiny model with large random weights: positions and neighbours matter in every logit."""
    import transformers

    config: Any
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    elif name == "OPT":
        config = transformers.OPTConfig(
            vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=16,
        )  # fmt: skip
    elif name == "Bloom":
        config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4)
    elif name == "Mamba":
        config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    elif name == "Mistral":
        config = transformers.MistralConfig(**SHAPE, sliding_window=3)
    else:
        more = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1} if name == "Qwen2" else {}
        config = getattr(transformers, f"{name}Config")(**SHAPE, **more)
    config._attn_implementation = "eager" if name in ("Bloom", "Mamba") else attention
    cls = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM"))
    model = cls(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model


def logits_of(model: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    def logits(batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        return out

    return logits


def examples(n: int = 9, longest: int = 11) -> list[Example]:
    """Of lengths from 2, with a prompt of random length."""
    generator = torch.Generator().manual_seed(n)
    found = []
    for i in range(n):
        length = int(torch.randint(2, longest + 1, (1,), generator=generator))
        prompt = int(torch.randint(length, (1,), generator=generator))
        ids = torch.randint(VOCAB, (length,), generator=generator).tolist()
        found.append(Example(ids, [IGNORED] * prompt + ids[prompt:], (length,), f"t.jsonl:{i + 1}"))
    return found


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss at each position, [batch, seq - 1]."""
    return F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=IGNORED, reduction="none")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT2", "Mistral"])
@torch.no_grad()
def test_packed_examples_have_the_logits_and_losses_that_they_have_alone(name: str, attention: str) -> None:
    logits = logits_of(build(name, attention))
    texts = examples()
    rows = pack(texts, 16)
    assert is_packed(rows, "causal-lm")
    batch = collate(rows, pad=0, task="causal-lm")
    assert "attention_mask" not in batch
    packed, losses = logits(batch), nats(logits(batch), batch["labels"])
    by_ids = {tuple(text.ids): text for text in texts}
    total = torch.zeros(())
    for i, row in enumerate(rows):
        start = 0
        for length in row.lengths:
            text = by_ids.pop(tuple(row.ids[start : start + length]))
            single = collate([text], pad=0, task="causal-lm")
            alone = logits(single)
            torch.testing.assert_close(packed[i : i + 1, start : start + length], alone, rtol=1e-4, atol=1e-5)
            expected = nats(alone, single["labels"])
            torch.testing.assert_close(losses[i : i + 1, start : start + length - 1], expected, rtol=1e-4, atol=1e-5)
            assert start == 0 or losses[i, start - 1] == 0  # the step from one example to the next
            total += expected.sum()
            start += length
    assert not by_ids
    torch.testing.assert_close(losses.sum(), total)
    # Padded but not packed: the same again.
    plain = collate(texts, pad=0, task="causal-lm")
    torch.testing.assert_close(nats(logits(plain), plain["labels"]).sum(), total)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT2", "Mistral"])
def test_models_that_pack_are_taken(name: str) -> None:
    check_packing(logits_of(build(name)), VOCAB, name)


@pytest.mark.parametrize("name", ["OPT", "Bloom", "Mamba"])
def test_models_that_take_the_positions_and_attend_across_the_borders_are_refused(name: str) -> None:
    message = "^folder: this model cannot train on packed rows: an example's logits depend on the one before"
    with pytest.raises(UnsupportedError, match=message):
        check_packing(logits_of(build(name)), VOCAB, "folder")


def test_a_model_without_positions_is_refused() -> None:
    def forward(input_ids: Tensor) -> Tensor:
        return input_ids

    def logits(batch: dict[str, Tensor]) -> Tensor:
        return forward(**batch)

    with pytest.raises(UnsupportedError, match=r"packed rows: .*'position_ids'.* Turn packing off\.$"):
        check_packing(logits, VOCAB, "folder")


def test_a_cache_would_switch_packing_off() -> None:
    model = build("Llama")

    def cached(batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = model(**batch, use_cache=True).logits
        return out

    with pytest.raises(UnsupportedError, match="depend on the one before"):
        check_packing(cached, VOCAB, "folder")


def test_positions_that_do_not_restart_are_refused() -> None:
    # Each example is kept apart, but placed after the other.
    model = logits_of(build("GPT2"))

    def shifted(batch: dict[str, Tensor]) -> Tensor:
        if "position_ids" in batch:
            positions = torch.arange(12)[None]
            kept = torch.cat([torch.zeros(5), torch.ones(7)])
            mask = ((kept[:, None] == kept) & (positions <= positions.T)).float().log()[None, None]
            return model({"input_ids": batch["input_ids"], "position_ids": positions, "attention_mask": mask})
        return model(batch)

    with pytest.raises(UnsupportedError, match="positions do not restart"):
        check_packing(shifted, VOCAB, "folder")


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(12, 40))
def test_every_example_is_packed_once(lengths: list[int], context: int) -> None:
    texts = [Example([i] * n, [i] * n, (n,), f"t:{i}") for i, n in enumerate(lengths)]
    rows = pack(texts, context)
    assert rows == pack(texts, context)
    found = []
    for row in rows:
        assert sum(row.lengths) == len(row.ids) == len(row.labels) <= context
        start = 0
        for length in row.lengths:
            ids, labels = row.ids[start : start + length], row.labels[start : start + length]
            assert ids == [ids[0]] * lengths[ids[0]]
            assert labels[1:] == ids[1:]
            assert labels[0] == IGNORED or len(row.lengths) == 1
            found.append(ids[0])
            start += length
        assert row.source == ", ".join(f"t:{i}" for i in dict.fromkeys(row.ids))
    assert sorted(found) == list(range(len(lengths)))
    # No two rows would fit into one, unless they are of examples that do not.
    assert sum(len(row.ids) * 2 <= context for row in rows) <= 1


def test_an_example_fills_what_is_left_of_a_row() -> None:
    texts = [Example([i] * n, [i] * n, (n,), f"t:{i}") for i, n in enumerate([6, 5, 4, 3, 2])]
    assert [row.lengths for row in pack(texts, 10)] == [(6, 4), (5, 3, 2)]


def test_positions_of_padding_are_an_example_of_their_own() -> None:
    rows = [Example([1, 2, 3], [1, 2, 3], (2, 1), "a"), Example([4], [4], (1,), "b")]
    batch = collate(rows, pad=0, task="causal-lm")
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert batch["position_ids"].tolist()[0] == positions((2, 1))


def test_an_example_longer_than_a_row() -> None:
    with pytest.raises(ConfigError, match="t:1: has 3 tokens, but a row can have 2"):
        pack([Example([1, 2, 3], [1, 2, 3], (3,), "t:1")], 2)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@torch.no_grad()
def test_a_run_has_the_same_loss_packed_and_not(name: str, tmp_path: Path) -> None:
    import transformers

    import funclora as fl

    tokens = tokenizer()
    tokens.save_pretrained(tmp_path / "model")
    config: Any = (
        transformers.GPT2Config(vocab_size=len(tokens), n_embd=16, n_layer=2, n_head=4, n_positions=32)
        if name == "GPT2"
        else transformers.LlamaConfig(**SHAPE | {"vocab_size": len(tokens)})
    )
    cls = transformers.GPT2LMHeadModel if name == "GPT2" else transformers.LlamaForCausalLM
    cls(config).save_pretrained(tmp_path / "model")
    with (tmp_path / "data.jsonl").open("w") as file:
        for i in range(12):
            file.write(json.dumps({"prompt": "p" * (i % 4), "completion": "completion"[: 2 + i % 7]}) + "\n")
    found = []
    for packing in (False, True):
        settings = Settings(
            model=tmp_path / "model", data=(tmp_path / "data.jsonl",), packing=packing, validation_split=0
        )
        base = load_base(settings, load_tokenizer(settings))
        data = prepare(settings, base.tokenizer, base.limit)
        adapters = fl.init(
            base.model, fl.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        bound = fl.bind(base.model, base.params, adapters)
        batches = list(evaluation(data.train, batch=3, pad=base.tokenizer.pad_token_id, task="causal-lm"))
        assert all(("position_ids" in batch) == packing for batch in batches)
        loss = float(sum(base.loss(bound, batch) for batch in batches))
        found.append((sum(base.count(batch) for batch in batches), loss, len(data.train)))
    plain, packed = found
    assert packed[0] == plain[0]
    assert packed[1] == pytest.approx(plain[1], rel=1e-5)
    assert packed[2] < plain[2]


@pytest.mark.parametrize(
    ("name", "task"), [("Llama", CAUSAL), ("OPT", CAUSAL), ("Llama", PREFERENCE), ("OPT", PREFERENCE)]
)
def test_a_run_tries_its_model_out(name: str, task: str, tmp_path: Path) -> None:
    folder, file = tmp_path / name, tmp_path / "data.jsonl"
    model, words = build(name), tokenizer()
    model.resize_token_embeddings(len(words), mean_resizing=False)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    record = {"text": "one two"} if task == CAUSAL else {"prompt": "one", "chosen": " two", "rejected": " 2"}
    file.write_text(f"{json.dumps(record)}\n" * 8, encoding="utf-8")
    given = Settings(model=folder, data=(file,), context=20, task=task)
    assert len(ready(given, tmp_path).data.train) == 8
    packed = replace(given, packing=True)
    if name == "Llama":
        assert len(ready(packed, tmp_path).data.train) < 8
        return
    with pytest.raises(UnsupportedError, match=r"OPT: this model cannot train on packed rows: .* Turn packing off"):
        ready(packed, tmp_path)
