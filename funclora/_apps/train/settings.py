"""All that decides a run of `funclora train`: one value, which a file and the command line fill in."""

# ruff: noqa: RUF009 -- _key is dataclasses.field

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAUSAL, SEQUENCE, TOKEN, SEQ2SEQ = TASKS = ("causal-lm", "sequence-classification", "token-classification", "seq2seq")

RUN_FILE = "run.toml"  # in the folder of a run: its settings


def _key(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A key: its default, its group, what it means, and what it may be.

    Args:
        default: the value where nothing is given.
        group: what it is listed under.
        text: one line of help.
        **limits: `choices`; `least` and `most`, inclusive; `above` and `below`, exclusive.
    """
    return field(default=default, metadata={"group": group, "help": text, **limits})


@dataclass(frozen=True)
class Settings:
    """A run. Each field is a key of the file and, with dashes for underscores, an option of the command."""

    model: Path | None = _key(None, "Model", "Folder of a transformers model; the demo's base if not given.")
    task: str = _key(CAUSAL, "Model", "What the model is trained for.", choices=TASKS)
    dtype: str = _key(
        "auto",
        "Model",
        "Of the base weights; auto keeps the folder's.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = _key("none", "Model", "Pack the base's weights (QLoRA).", choices=("none", "nf4", "fp4", "int8"))
    double_quant: bool = _key(True, "Model", "Pack the packed weights' scales too.")
    device: str = _key("cpu", "Model", "Where to compute: cpu, cuda, cuda:1.")

    data: Path | None = _key(None, "Data", "JSONL, JSON, CSV or Parquet file, text file, or folder of texts.")
    validation: Path | None = _key(None, "Data", "Data to evaluate on; else a part of --data is held out.")
    validation_split: float = _key(
        0.05, "Data", "Share of --data that is held out without --validation.", least=0.0, below=1.0
    )
    text_field: str = _key("text", "Data", "Field of plain text, and of the text to classify.")
    label_field: str = _key("label", "Data", "Field of the class (sequence), or of the classes (token).")
    train_on: str = _key(
        "completions", "Data", "Where the loss is, in data that marks prompts.", choices=("completions", "all")
    )
    context: int = _key(512, "Data", "Longest example in tokens; longer plain texts are cut into several.", least=1)
    packing: bool = _key(False, "Data", "Put several examples in a row, each of which sees itself only.")

    method: str = _key("lora", "Adapter", "The rule.", choices=("lora", "dora"))
    rank: int = _key(16, "Adapter", "Rank.", least=1)
    alpha: float = _key(32.0, "Adapter", "Scaling is alpha / rank.", above=0.0)
    rslora: bool = _key(False, "Adapter", "Scaling is alpha / sqrt(rank).")
    dropout: float = _key(0.0, "Adapter", "Dropout on the adapters' inputs.", least=0.0, below=1.0)
    targets: tuple[str, ...] = _key(("all-linear",), "Adapter", "Names of the modules to adapt, or all-linear.")
    modules_to_save: tuple[str, ...] = _key((), "Adapter", "Modules trained whole, such as a new head.")
    init: str = _key("true", "Adapter", "PEFT's init_lora_weights: true, gaussian, orthogonal, pissa, olora, ...")

    lr: float = _key(2e-4, "Training", "Peak learning rate.", above=0.0)
    schedule: str = _key("cosine", "Training", "After the warm-up.", choices=("cosine", "linear", "constant"))
    warmup: float = _key(0.03, "Training", "Warm-up: a share of all steps below 1, else a number of steps.", least=0.0)
    lora_plus: float = _key(1.0, "Training", "Learning rate of B over that of A (LoRA+).", above=0.0)
    weight_decay: float = _key(0.0, "Training", "AdamW's.", least=0.0)
    clip: float = _key(1.0, "Training", "Largest global norm of the gradient; 0 does not clip.", least=0.0)
    epochs: float = _key(1.0, "Training", "Passes over the data.", above=0.0)
    steps: int | None = _key(None, "Training", "Optimizer steps, in place of --epochs.", least=1)
    batch: int = _key(8, "Training", "Rows of a forward pass.", least=1)
    accumulation: int = _key(1, "Training", "Forward passes of a step.", least=1)
    bf16: bool = _key(False, "Training", "Compute in bfloat16 (autocast).")
    checkpointing: bool = _key(False, "Training", "Recompute activations in backward.")
    compile: bool = _key(False, "Training", "torch.compile the loss and its gradient.")
    seed: int = _key(
        0, "Training", "Of initial values, dropout, held-out part and data order.", least=0, most=2**63 - 1
    )

    eval_every: int = _key(0, "Evaluation", "Steps between evaluations; 0: at the end only.", least=0)
    patience: int = _key(0, "Evaluation", "Stop after this many evaluations without a better one; 0 never.", least=0)
    sample: tuple[str, ...] = _key((), "Evaluation", "Prompts to continue at each evaluation.")
    sample_tokens: int = _key(48, "Evaluation", "Tokens of a continuation.", least=1)

    out: Path = _key(Path("funclora-run"), "Output", "Folder of the run.")
    resume: bool = _key(False, "Output", "Go on from the last checkpoint in --out.")
    save_every: int = _key(0, "Output", "Steps between checkpoints; 0: at evaluations, or ten in a run.", least=0)
    keep: int = _key(2, "Output", "Checkpoints kept.", least=1)
    merge: bool = _key(False, "Output", "Write the merged model too.")
    log_every: int = _key(1, "Output", "Steps between lines of metrics.jsonl.", least=1)
    tensorboard: bool = _key(False, "Output", "Write TensorBoard's event files.")
    wandb: str | None = _key(None, "Output", "Weights & Biases project to log to.")
