"""Keys and files of other trainers: what they mean here, and that nothing is dropped."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from funclora._apps.train.aliases import ALIASES, VALUES, known_as
from funclora._apps.train.reading import read
from funclora._apps.train.settings import Settings
from funclora._apps.train.translation import translate
from funclora.cli._app import app
from funclora.errors import ConfigError

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: train.jsonl
    type: alpaca
  - path: more.jsonl
    type: chat_template
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - q_proj
lora_modules_to_save: [embed_tokens, lm_head]
wandb_project:
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 3
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""

FACTORY = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
use_dora: true
### dataset
dataset: mine
dataset_dir: there
template: llama3
cutoff_len: 1024
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""

TRL = """
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
max_steps: 100
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_checkpointing: true
lr_scheduler_type: cosine_with_restarts
lr_scheduler_kwargs: {num_cycles: 2}
optim: adafactor
warmup_ratio: 0.1
max_length: 1024
lora_r: 32
lora_alpha: 16
use_rslora: true
report_to: [tensorboard]
eval_strategy: "no"
save_strategy: epoch
fp16: false
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "theirs.yml"
    file.write_text(text, encoding="utf-8")
    return file


def everything(text: str) -> set[str]:
    import yaml

    return {*yaml.safe_load(text)}


@pytest.mark.parametrize("text", [AXOLOTL, FACTORY, TRL], ids=["axolotl", "LLaMA-Factory", "TRL"])
def test_each_key_is_translated_needless_or_left(text: str, tmp_path: Path) -> None:
    made = translate(written(tmp_path, text))
    found = {*made.sources.values(), *made.needless, *(key.partition("[")[0].partition(".")[0] for key in made.left)}
    assert everything(text) <= found, everything(text) - found
    assert {*made.given} == {*made.sources}
    assert {*made.given} <= {f.name for f in fields(Settings)}


def test_axolotl(tmp_path: Path) -> None:
    made = translate(written(tmp_path, AXOLOTL))
    assert made.project == "axolotl"
    assert made.given == {
        "model": Path("NousResearch/Llama-3.2-1B"), "quantize": "nf4",
        "data": (Path("train.jsonl"), Path("more.jsonl")),
        "validation_split": 0.1, "out": Path("outputs/lora-out"), "context": 2048, "packing": True, "rank": 16,
        "alpha": 32.0, "dropout": 0.05, "targets": ("gate_proj", "q_proj"), "accumulation": 2, "batch": 3,
        "modules_to_save": ("embed_tokens", "lm_head"), "epochs": 1.0, "optimizer": "adamw-8bit",
        "schedule": "cosine", "lr": 2e-4, "bf16": None, "checkpointing": True, "log_every": 1,
        "attention": "flash_attention_2", "warmup": 10.0, "weight_decay": 0.0,
    }  # fmt: skip
    assert {*made.left} == {"loss_watchdog_threshold", "evals_per_epoch", "special_tokens"}


def test_llama_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, FACTORY)
    assert "dataset" in translate(file).left
    Path("there").mkdir()
    Path("there/dataset_info.json").write_text('{"mine": {"file_name": "mine.json", "columns": {"prompt": "q"}}}')
    made = translate(file)
    assert made.project == "LLaMA-Factory"
    assert {*made.left} == {"trust_remote_code", "template", "dataset.columns"}
    want: dict[str, Any] = {
        "data": (Path("there/mine.json"),), "rank": 8, "alpha": 16.0, "targets": ("all-linear",), "method": "dora",
        "context": 1024, "batch": 1, "accumulation": 8, "lr": 1e-4, "epochs": 3.0, "warmup": 0.1, "eval_every": 500,
        "save_every": 500, "validation_split": 0.1, "bf16": True,
    }  # fmt: skip
    assert want.items() <= made.given.items()
    assert made.sources["alpha"] == "default of LLaMA-Factory"


def test_trl(tmp_path: Path) -> None:
    made = translate(written(tmp_path, TRL))
    want: dict[str, Any] = {
        "steps": 100, "batch": 2, "schedule": "cosine-restarts", "cycles": 2, "optimizer": "adafactor", "rank": 32,
        "alpha": 16.0, "rslora": True, "context": 1024, "tensorboard": True, "eval_every": 0, "checkpointing": True,
    }  # fmt: skip
    assert want.items() <= made.given.items()
    assert "epochs" not in made.given
    assert made.needless["num_train_epochs"] == "max_steps decides"
    assert {*made.left} == {"dataset_name", "save_strategy"}


def test_a_dry_run_prints_a_file_that_says_all_and_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, AXOLOTL)
    result = CliRunner().invoke(app, ["train", "--from", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "# - special_tokens: " in result.stdout
    run = tmp_path / "run.toml"
    run.write_text(result.stdout)
    settings = read(run, {})
    assert all(getattr(settings, key) == value for key, value in translate(file).given.items())
    as_json = CliRunner().invoke(app, ["train", "--from", str(file), "--dry-run", "--json"])
    assert {*json.loads(as_json.stdout)["left"]} == {*translate(file).left}


def test_a_run_from_a_file_drops_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, AXOLOTL)
    result = CliRunner().invoke(app, ["train", "--from", str(file)])
    assert result.exit_code == 2
    assert "has keys without a counterpart: loss_watchdog_threshold, evals_per_epoch, special_tokens." in result.stderr
    both = CliRunner().invoke(app, ["train", "run.toml", "--from", str(file)])
    assert "a run has one file of settings" in both.stderr
    silent = CliRunner().invoke(app, ["train", "--from", str(file), "--dry-run", "--lr", "1"])
    assert "--lr: --from with --dry-run only translates" in silent.stderr
    file.write_text("learning_rate: 1.0e-3\nlora_r: 4\nlora_alpha: 8\nmax_steps: 1\nmax_length: 32\noptim: sgd\n")
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["train", "--from", str(file), "--out", str(out), "--batch", "2"])
    assert done.exit_code == 0, done.output
    settings = read(out / "run.toml", {})
    assert (settings.lr, settings.rank, settings.steps, settings.optimizer, settings.schedule) == (
        1e-3, 4, 1, "sgd", "linear",
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_keys_of_others_are_understood_in_a_file(suffix: str, tmp_path: Path) -> None:
    pairs: dict[str, Any] = {
        "learning_rate": 1e-3, "lora_r": 4, "lora_alpha": 8, "per_device_train_batch_size": 2, "num_train_epochs": 2,
        "gradient_accumulation_steps": 3, "target_modules": "q_proj,v_proj", "optim": "adamw_torch",
        "lr_scheduler_type": "constant_with_warmup", "max_grad_norm": 0.5, "load_in_4bit": False, "bf16": "auto",
    }  # fmt: skip
    line = "{} = {}" if suffix == "toml" else "{}: {}"
    file = tmp_path / f"run.{suffix}"
    file.write_text("".join(line.format(key, json.dumps(value)) + "\n" for key, value in pairs.items()))
    assert read(file, {}) == Settings(
        lr=1e-3, rank=4, alpha=8.0, batch=2, epochs=2.0, accumulation=3, targets=("q_proj", "v_proj"), clip=0.5,
        schedule="constant",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1.0\nlearning_rate = 2.0", "lr and learning_rate both mean lr. Give one of them"),
        ("val_set_size = 20", "val_set_size: 20 is a number of records"),
        ("eval_steps = 0.1", "eval_steps: a share of the run, 0.1, is not known here"),
        ("lr_scheduler_kwargs = {gamma = 1}", "lr_scheduler_kwargs: {'gamma': 1}: of these, only num_cycles"),
        ('resume_from_checkpoint = "x"', "resume_from_checkpoint: a run goes on from the last checkpoint in its own"),
        ("learning_rate = -1.0", "run.toml: learning_rate: expected more than 0.0, got -1.0"),
        ('report_to = "wandb"', "report_to: Weights & Biases needs the name of a project"),
        ("use_dora = 1", "use_dora: expected true or false, got 1"),
    ],
)
def test_what_has_no_counterpart_is_said(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(file, {})


def test_the_table_names_keys_that_there_are() -> None:
    keys = {f.name: f for f in fields(Settings)}
    for name, alias in ALIASES.items():
        assert name not in keys, name
        assert {*alias.key.split(", ")} <= {*keys}, name
        assert alias.projects
    for key, words in VALUES.items():
        assert {*words.values()} <= {*keys[key].metadata["choices"]}
        assert not {*words} & {*keys[key].metadata["choices"]}
    assert known_as("--per_device_train_batch_size") == known_as("--micro-batch-size") == "batch"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--learning-rate", "1"], "No such option: --learning-rate. Here it is --lr."),
        (["train", "--lora_r", "1"], "No such option: --lora_r. Here it is --rank."),
        (["train", "--lr", "1", "--lr", "2"], "--lr: given twice, and it has only one value"),
        (["train", "--merge", "--no-merge"], "--merge: given twice"),
        (["eval", "x", "--device", "cpu", "--device", "cpu"], "--device: given twice"),
        (["merge", "a", "b", "--out", "x", "--out", "y"], "--out: given twice"),
    ],
)
def test_options_are_said(args: list[str], message: str) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_flags_take_words_and_lists_take_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Settings] = []
    monkeypatch.setattr("funclora.cli.train._plan", lambda settings, as_json: found.append(settings))
    args = ["--packing", "true", "--merge", "False", "--bf16", "auto", "--targets", "q_proj,v_proj", "--targets", "o"]
    assert CliRunner().invoke(app, ["train", "--dry-run", *args]).exit_code == 0
    assert (found[0].packing, found[0].merge, found[0].bf16) == (True, False, None)
    assert found[0].targets == ("q_proj", "v_proj", "o")


def test_the_version_and_quiet(tmp_path: Path) -> None:
    import funclora

    assert CliRunner().invoke(app, ["--version"]).stdout == f"funclora {funclora.__version__}\n"
    args = ["train", "--steps", "1", "--batch", "1", "--context", "8", "--rank", "1"]
    loud = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "a")])
    quiet = CliRunner().invoke(app, [*args, "--quiet", "--out", str(tmp_path / "b")])
    first = CliRunner().invoke(app, ["--quiet", *args, "--out", str(tmp_path / "c")])
    assert "step 1" in loud.stderr
    assert quiet.stderr == first.stderr == ""
    assert "wrote" in quiet.stdout
