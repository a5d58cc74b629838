"""Folders of tiny transformers models with their tokenizer, and data for each task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import text_models
import torch
import transformers

from funclora._apps.train.settings import CAUSAL, EMBEDDING, PREFERENCE, SEQ2SEQ, SEQUENCE, TOKEN

_TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model(kind: str, vocabulary: int) -> Any:
    """With random weights, biases included."""
    made: Any
    if kind == "llama":
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, **_TEXT))
    elif kind == "gpt2":
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=16, n_layer=2, n_head=2, n_positions=128, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2
            )
        )
    elif kind == "bert":
        made = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=vocabulary, **_TEXT))
    elif kind == "t5":
        made = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=vocabulary,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
            )
        )  # fmt: skip
    elif kind == "roberta":  # with another padding id than the tokenizer's
        made = transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(vocab_size=vocabulary, pad_token_id=1, **_TEXT)
        )
    elif kind == "bart":
        made = transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128,
                vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            )
        )  # fmt: skip
    else:
        raise ValueError(kind)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


def save(folder: Path, kind: str, *, template: str | None = None, rows: int | None = None, **options: Any) -> Path:
    """Write a model and its tokenizer.

    Args:
        folder: where to.
        kind: of the model.
        template: chat template.
        rows: of the embedding; else as many as the tokenizer has tokens.
        **options: of the tokenizer.
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer = text_models.tokenizer(
        template, begins=kind == "llama", ends=kind in ("bert", "t5", "roberta", "bart"), **options
    )
    model(kind, rows or len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_classifier(folder: Path, kind: str, classes: Sequence[str]) -> Path:
    """Write a model with a head for classes, in that order, and its tokenizer.

    Args:
        folder: where to.
        kind: "bert" or "distilbert".
        classes: their names.
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer = text_models.tokenizer(ends=True)
    names: dict[str, Any] = {
        "id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)},
        "vocab_size": len(tokenizer),
    }  # fmt: skip
    made: Any
    if kind == "bert":
        made = transformers.BertForSequenceClassification(transformers.BertConfig(**names, **_TEXT))
    else:
        made = transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(
                dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=128, **names
            )
        )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WORDS = ("red", "green", "blue", "dog", "cat", "runs", "sleeps")
RECORDS: dict[str, Sequence[dict[str, Any]]] = {
    "text": [{"text": " ".join(WORDS[: 2 + i % 5])} for i in range(12)],
    "prompt": [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(12)],
    "messages": [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for word in WORDS
    ],
    SEQUENCE: [
        {"text": f"the {word}", "label": ("colour", "beast", "verb")[i % 3]} for i, word in enumerate(WORDS * 2)
    ],
    "numbers": [{"text": f"the {word}", "text_pair": "a", "label": i / 4} for i, word in enumerate(WORDS * 2)],
    "several": [
        {"text": f"the {word}", "label": ["odd"] * (i % 2) + ["third"] * (i % 3 < 1)}
        for i, word in enumerate(WORDS * 2)
    ],
    TOKEN: [{"tokens": ["a", word, "x"], "label": ["O", "W", "O"]} for word in WORDS],
    SEQ2SEQ: [{"prompt": f"double {word}", "completion": f"{word} {word}"} for word in WORDS],
    EMBEDDING: [{"anchor": f"the {word}", "positive": f"{word} {i}"} for i, word in enumerate(WORDS * 2)],
    "scored": [{"sentence1": f"the {word}", "sentence2": "a", "score": i / 4} for i, word in enumerate(WORDS * 2)],
    "verdicts": [
        {"prompt": f"say {word}:", "completion": f" {word}" if i % 2 else f" no {word}", "label": i % 2 == 1}
        for i, word in enumerate(WORDS)
    ],
    PREFERENCE: [{"prompt": f"say {word}:", "chosen": f" {word}", "rejected": f" no {word}"} for word in WORDS],
}


def data(file: Path, name: str) -> Path:
    """Write records as JSONL."""
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[name]))
    return file


# What is loaded for a task, by transformers and PEFT.
CLASSES = {
    CAUSAL: transformers.AutoModelForCausalLM,
    SEQUENCE: transformers.AutoModelForSequenceClassification,
    TOKEN: transformers.AutoModelForTokenClassification,
    SEQ2SEQ: transformers.AutoModelForSeq2SeqLM,
    PREFERENCE: transformers.AutoModelForCausalLM,
    EMBEDDING: transformers.AutoModel,
}
KIND = {CAUSAL: "llama", SEQUENCE: "bert", TOKEN: "bert", SEQ2SEQ: "t5", PREFERENCE: "llama", EMBEDDING: "bert"}
