"""sentence-transformers' trainer trains an adapter of a frozen encoder: questions find their answers.

    python examples/sentence_trainer.py
    python examples/sentence_trainer.py --dora --out adapter

Nothing is downloaded: the encoder is a tiny random BERT, the tokenizer has a token for each word. Needs
sentence-transformers (pip install sentence-transformers).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import funclora as fl

PLACES = {"france": "paris", "italy": "rome", "spain": "madrid", "greece": "athens", "egypt": "cairo", "peru": "lima"}
FORMS = ("where is the capital of {}", "capital of {}", "main city in {}")
WORDS = ["[PAD]", "[UNK]", *sorted({word for form in FORMS for word in form.split()} | {*PLACES, *PLACES.values()})]


class Result(NamedTuple):
    before: float  # share of questions whose nearest answer is theirs
    after: float
    difference: float  # between the trained model's embeddings and those of the saved adapter
    base_unchanged: bool


def encoder(folder: Path) -> Path:
    """A folder with a tiny random BERT and its tokenizer."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def recall(model: Any) -> float:
    """The share of questions whose nearest answer is theirs."""
    questions = [form.format(place) for form, place in itertools.product(FORMS, PLACES)]
    similar = torch.tensor(model.encode(questions)) @ torch.tensor(model.encode([*PLACES.values()])).T
    return (similar.argmax(1) == torch.arange(len(PLACES)).repeat(len(FORMS))).float().mean().item()


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", help="folder for the adapter (default: a temporary one)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        body = Transformer(str(encoder(Path(scratch, "base"))), model_kwargs={"add_pooling_layer": False})
        base: Any = body.model
        params = fl.base_params(base)
        before = {name: tensor.clone() for name, tensor in params.items()}
        config = fl.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", use_dora=args.dora, task_type="FEATURE_EXTRACTION"
        )
        module = fl.as_module(base, params, fl.init(base, config), config)
        body.model = module
        model = SentenceTransformer(modules=[body, Pooling(32, "mean"), Normalize()], device="cpu")
        first = recall(model)
        rows = [(form.format(place), city) for form, (place, city) in itertools.product(FORMS, PLACES.items())]
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch, max_steps=args.steps, per_device_train_batch_size=6, learning_rate=5e-3,
                logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict(dict(zip(("anchor", "positive"), zip(*rows, strict=True), strict=True))),
            loss=MultipleNegativesRankingLoss(model),
        )  # fmt: skip
        trainer.train()
        model.eval()
        after, trained = recall(model), model.encode([*PLACES])
        folder = args.out or Path(scratch, "adapter")
        module.save_pretrained(folder)
        adapters, _ = fl.load_peft(folder, base)
        body.model = fl.bind(base.eval(), params, adapters)
        difference = float(abs(model.encode([*PLACES]) - trained).max())
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in params.items())
    print(f"nearest answer is right: {first:.0%} -> {after:.0%}; base unchanged: {unchanged}")
    return Result(first, after, difference, unchanged)


if __name__ == "__main__":
    main()
