"""Runs of preferences against TRL's trainers with PEFT: losses, rewards and adapters after twenty steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from text_models import PLAIN, tokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import funclora as fl
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora._apps.train.reading import read
from funclora._apps.train.setup import Ready, ready
from funclora._apps.train.step import Steps

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]
STEPS, BATCH = 20, 3
WORDS = ["cat", "dog", "cow", "hen", "owl", "fox", "bee", "ant", "elk", "ape", "emu", "yak"]


def chat(content: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": content}


def records(kind: str) -> list[dict[str, Any]]:
    """Prompts with a good and a bad answer of other lengths, as texts or as chats, or one of them with a verdict."""
    made: list[dict[str, Any]] = []
    for i, word in enumerate(WORDS):
        prompt, good, bad = f"Say {word}" + "!" * (i % 3), word * (1 + i % 2), f"not {word}"
        if kind == "texts":
            made.append({"prompt": prompt, "chosen": good, "rejected": bad})
        elif kind == "chats":  # of which the prompt is what they have in common
            asked = [chat("hi", "user"), chat("hello"), chat(prompt, "user")] if i % 2 else [chat(prompt, "user")]
            made.append({"chosen": [*asked, chat(good)], "rejected": [*asked, chat(bad)]})
        elif kind == "verdicts":
            made.append({"prompt": prompt, "completion": bad if i % 3 else good, "label": i % 3 == 0})
        else:
            answer = [chat(bad if i % 3 else good)]
            made.append({"prompt": [chat(prompt, "user")], "completion": answer, "label": i % 3 == 0})
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokens = tokenizer(PLAIN)
    shape: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 128, "initializer_range": 0.1,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=len(tokens), bos_token_id=1, eos_token_id=2, **shape)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def ours(base: Path, folder: Path, kind: str, **options: Any) -> tuple[Ready, list[dict[str, Any]]]:
    """What is needed to train, and the records in the order of the steps."""
    rows = records(kind)
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given: dict[str, Any] = {
        "model": base, "task": "preference", "data": [file], "validation_split": 0.0, "steps": STEPS, "batch": BATCH,
        "lr": 3e-3, "schedule": "linear", "warmup": 0.0, "log_every": 1, "out": folder / "run", "context": 100,
    }  # fmt: skip
    if "adapter" not in options:
        given |= {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}
    made = ready(read(None, given | options), folder)
    steps = Steps(made.start.base, made.start.adapters, made.data, made.settings)
    sources = [source for k in range(STEPS) for source in steps.batches.sources(k)]
    return made, [rows[int(source.rpartition(":")[2]) - 1] for source in sources]


def lines(made: Ready) -> tuple[Any, list[dict[str, Any]]]:
    """The adapters after the run, and a line of metrics for each step."""
    with Journal(made.settings, quiet=True) as journal:
        outcome = train(made.start.base, made.start.adapters, made.data, made.settings, journal)
    text = (made.settings.out / "metrics.jsonl").read_text(encoding="utf-8")
    return outcome.adapters, [json.loads(line) for line in text.splitlines()]


def theirs(
    base: Path, folder: Path, made: Ready, rows: list[dict[str, Any]], **options: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """The same of TRL, from the same adapter; its copy is the reference, as TRL has it."""
    started = folder / "started"
    fl.save_peft(started, *made.start.exported(made.start.adapters))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(started), is_trainable=True)
    kto = made.settings.loss == "kto"
    config, trainer_class = (KTOConfig, KTOTrainer) if kto else (DPOConfig, DPOTrainer)
    args = config(
        output_dir=str(folder / "theirs"), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=3e-3,
        lr_scheduler_type="linear", logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential", max_length=100, weight_decay=0.0, beta=0.1,
        activation_checkpointing=False, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer: Any = trainer_class(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(PLAIN)
    )
    trainer.train()
    trainer.save_model(str(folder / "theirs"))
    done, _ = fl.load_peft(folder / "theirs", made.start.base.model)
    return done, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "loss", "options"),
    [
        ("texts", "dpo", {}),
        ("chats", "dpo", {"method": "dora"}),
        ("texts", "dpo", {"adapter": "before"}),
        ("texts", "ipo", {}),
        ("verdicts", "kto", {"desirable": 1.5}),
        ("chats with verdicts", "kto", {}),
    ],
)
def test_twenty_steps_are_those_of_trl(
    base: Path, tmp_path: Path, kind: str, loss: str, options: dict[str, Any]
) -> None:
    if "adapter" in options:  # which the reference is too
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        config = fl.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        options = {"adapter": tmp_path / options["adapter"]}
        fl.save_peft(options["adapter"], fl.init(model, config, generator=torch.Generator().manual_seed(1)), config)
    made, rows = ours(base, tmp_path, kind, loss=loss, **options)
    adapters, found = lines(made)
    more: dict[str, Any] = {"desirable_weight": options["desirable"]} if "desirable" in options else {}
    more |= {"loss_type": "ipo"} if loss == "ipo" else {}
    done, wanted = theirs(base, tmp_path, made, rows, **more)
    assert len(found) == len(wanted) == STEPS
    names = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected"]
    names += ["kl"] if loss == "kto" else ["rewards/margins", "rewards/accuracies"]
    for name in names:
        # At the start policy and reference are equal up to rounding, which then decides what is right.
        first = 1 if name == "rewards/accuracies" else 0
        got, want = ([line.get(name, 0.0) for line in run][first:] for run in (found, wanted))
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5, msg=name)
    assert abs(found[-1]["rewards/chosen"]) > 0.01
    assert {*adapters} == {*done}
    for name, rule in adapters.items():
        for leaf in rule.leaf_names:
            got, want = getattr(rule, leaf), getattr(done[name], leaf)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=f"{name}.{leaf}")
            assert not torch.equal(got, getattr(made.start.adapters[name], leaf))
