"""The settings of a run of `funclora train`: one value, from a file and the command line."""

# ruff: noqa: RUF009 -- _key is dataclasses.field

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAUSAL, SEQUENCE, TOKEN, SEQ2SEQ, PREFERENCE, EMBEDDING = TASKS = (
    "causal-lm",
    "sequence-classification",
    "token-classification",
    "seq2seq",
    "preference",
    "embedding",
)
DECODERS = (CAUSAL, PREFERENCE)  # the tasks of causal language models

# What the labels of sequence-classification are: one class, several classes, numbers.
SINGLE, MULTI, REGRESSION = PROBLEMS = ("single-label", "multi-label", "regression")
AUTO = "auto"
# What embeddings are trained for, and how one is made of the tokens of a text.
IN_BATCH, TRIPLET, COSINE, COSENT = OBJECTIVES = ("in-batch", "triplet", "cosine", "cosent")
MEAN, FIRST, LAST = POOLINGS = ("mean", "first", "last")

RUN_FILE = "run.toml"  # in the folder of a run: its settings


def _key(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A key: its default, its group, what it means, and what it may be.

    Args:
        default: the value where nothing is given.
        group: what it is listed under.
        text: one line of help.
        **limits: `choices`; `least` and `most`, inclusive; `above` and `below`, exclusive; `whole`, for a list whose
            texts may contain commas; `auto`, if the text auto means None.
    """
    return field(default=default, metadata={"group": group, "help": text, **limits})


@dataclass(frozen=True)
class Settings:
    """A run. Each field is a key of the file and, with dashes for underscores, an option of the command."""

    model: Path | None = _key(None, "Model", "Folder of a transformers model. Without it, the demo's model is used.")
    task: str = _key(CAUSAL, "Model", "Task to train for.", choices=TASKS)
    dtype: str = _key(
        "auto",
        "Model",
        "Dtype of the base weights; auto keeps the dtype of the folder.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = _key("none", "Model", "Quantise the base weights (QLoRA).", choices=("none", "nf4", "fp4", "int8"))
    double_quant: bool = _key(True, "Model", "Quantise the scales of the quantised weights too.")
    shard: bool = _key(False, "Model", "Divide the base weights among the processes of torchrun.")
    device: str = _key("auto", "Model", "Device to compute on: auto (CUDA, MPS or the CPU), cpu, cuda, cuda:1.")
    attention: str = _key(
        "auto",
        "Model",
        "Implementation of attention in transformers; auto is its own choice.",
        choices=("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    )

    data: tuple[Path, ...] = _key((), "Data", "JSONL, JSON, CSV or Parquet files, text files, or folders of texts.")
    weights: tuple[float, ...] = _key(
        (), "Data", "How often each --data is in an epoch: 2 is twice, 0.5 half of it, another half in the next."
    )
    validation: Path | None = _key(None, "Data", "Data for evaluation. Without it, a part of --data is held out.")
    validation_split: float = _key(
        0.05, "Data", "Share of --data that is held out if there is no --validation.", least=0.0, below=1.0
    )
    fields: tuple[str, ...] = _key(
        (), "Data", "Fields that have other names in the data: prompt=question, messages=dialog, role=speaker."
    )
    roles: tuple[str, ...] = _key((), "Data", "Roles that have other names in the chats: human=user, gpt=assistant.")
    skip_bad: bool = _key(False, "Data", "Leave out records that cannot be used, and count them, instead of stopping.")
    text_field: str = _key("text", "Data", "Name of the field with plain text, or with the text to classify.")
    label_field: str = _key(
        "label", "Data", "Name of the field with the class (sequence), the classes (token) or the verdict (kto)."
    )
    problem: str = _key(
        AUTO,
        "Data",
        "What labels of texts are: one class, several classes, or numbers; auto looks at the model's head and at them.",
        choices=(AUTO, *PROBLEMS),
    )
    train_on: str = _key(
        "completions",
        "Data",
        "Text on which the loss is computed, in data that marks prompts.",
        choices=("completions", "all"),
    )
    turns: str = _key("all", "Data", "Turns of the assistant with loss in a chat.", choices=("all", "last"))
    chat_template: Path | None = _key(None, "Data", "File of a chat template (Jinja), instead of the tokenizer's.")
    context: int = _key(512, "Data", "Maximum length of an example in tokens; longer plain texts are split.", least=1)
    packing: bool = _key(False, "Data", "Put several examples into one row; each attends only to itself.")

    loss: str = _key(
        "dpo",
        "Preferences",
        "Loss of pairs of answers; kto also takes single answers with a label.",
        choices=("dpo", "ipo", "orpo", "simpo", "kto"),
    )
    beta: float | None = _key(
        None,
        "Preferences",
        "Weight of the reference (dpo, ipo, kto), the odds (orpo) or the margin (simpo); auto is 0.1, for simpo 2.",
        above=0.0,
        auto=True,
    )
    reference: str = _key(
        "start",
        "Preferences",
        "What answers are compared with: the adapter at the start, the base, or the path of a PEFT folder.",
    )
    label_smoothing: float = _key(
        0.0, "Preferences", "Share of pairs whose order is taken to be wrong (dpo).", least=0.0, below=0.5
    )
    gamma: float = _key(1.0, "Preferences", "Margin between the answers of a pair (simpo).", least=0.0)
    desirable: float = _key(1.0, "Preferences", "Weight of the good answers (kto).", least=0.0)
    undesirable: float = _key(1.0, "Preferences", "Weight of the bad answers (kto).", least=0.0)

    objective: str = _key(
        AUTO,
        "Embeddings",
        "Loss: in-batch negatives, triplets, or scored pairs (cosine, cosent); auto is in-batch, for scores cosent.",
        choices=(AUTO, *OBJECTIVES),
    )
    scale: float = _key(20.0, "Embeddings", "Scale of the similarities, 1 / temperature (in-batch, cosent).", above=0.0)
    margin: float = _key(1.0, "Embeddings", "Distance between a positive and a negative (triplet).", above=0.0)
    pooling: str = _key(
        AUTO,
        "Embeddings",
        "Tokens that an embedding is made of; auto is the adapter's, or last for causal models and mean for others.",
        choices=(AUTO, *POOLINGS),
    )
    normalize: bool = _key(True, "Embeddings", "Give embeddings the length 1.")
    chunk: int = _key(
        0, "Embeddings", "Texts computed at a time, and again for the gradient (GradCache); 0: all of a batch.", least=0
    )

    adapter: Path | None = _key(None, "Adapter", "PEFT folder to start from; it decides the rest of this group.")
    method: str = _key("lora", "Adapter", "Method of the adapter.", choices=("lora", "dora"))
    rank: int = _key(16, "Adapter", "Rank of the adapter.", least=1)
    alpha: float = _key(32.0, "Adapter", "The update is scaled by alpha / rank.", above=0.0)
    rslora: bool = _key(False, "Adapter", "Scale the update by alpha / sqrt(rank) instead.")
    dropout: float = _key(0.0, "Adapter", "Dropout probability on the inputs of the adapter.", least=0.0, below=1.0)
    targets: tuple[str, ...] = _key(("all-linear",), "Adapter", "Names of the modules to adapt, or all-linear.")
    modules_to_save: tuple[str, ...] = _key((), "Adapter", "Modules that are fully fine-tuned, such as a new head.")
    init: str = _key("true", "Adapter", "PEFT's init_lora_weights: true, gaussian, orthogonal, pissa, olora, ...")

    optimizer: str = _key("adamw", "Training", "Optimizer.", choices=("adamw", "adamw-8bit", "sgd", "adafactor"))
    beta1: float = _key(0.9, "Training", "Decay of AdamW's first moment.", least=0.0, below=1.0)
    beta2: float = _key(0.999, "Training", "Decay of AdamW's second moment.", least=0.0, below=1.0)
    epsilon: float = _key(1e-8, "Training", "Added to AdamW's denominator.", least=0.0)
    momentum: float = _key(0.0, "Training", "Momentum of SGD.", least=0.0, below=1.0)
    lr: float = _key(2e-4, "Training", "Peak learning rate.", above=0.0)
    schedule: str = _key(
        "cosine",
        "Training",
        "Learning rate schedule after the warm-up; wsd is constant until its decay.",
        choices=("cosine", "cosine-restarts", "linear", "polynomial", "wsd", "constant"),
    )
    lr_end: float = _key(0.0, "Training", "Rate at the end of the schedule, as a share of --lr.", least=0.0, most=1.0)
    cycles: int = _key(3, "Training", "Number of cosines of cosine-restarts.", least=1)
    power: float = _key(2.0, "Training", "Exponent of polynomial; 1 is linear.", above=0.0)
    decay: float = _key(
        0.1, "Training", "Decay of wsd: a share of all steps if below 1, otherwise a number of steps.", above=0.0
    )
    warmup: float = _key(
        0.03, "Training", "Warm-up: a share of all steps if below 1, otherwise a number of steps.", least=0.0
    )
    lora_plus: float = _key(1.0, "Training", "Learning rate of B divided by the learning rate of A (LoRA+).", above=0.0)
    weight_decay: float = _key(0.0, "Training", "Weight decay of the optimizer.", least=0.0)
    clip: float = _key(1.0, "Training", "Maximum global norm of the gradient; 0 disables clipping.", least=0.0)
    epochs: float = _key(1.0, "Training", "Passes over the data.", above=0.0)
    steps: int | None = _key(None, "Training", "Number of optimizer steps, instead of --epochs.", least=1)
    batch: int = _key(8, "Training", "Number of rows in a forward pass.", least=1)
    accumulation: int = _key(1, "Training", "Number of forward passes in a step.", least=1)
    bf16: bool | None = _key(
        None,
        "Training",
        "Compute in bfloat16 (autocast). By default on GPUs that can.",
        auto=True,
    )
    neftune: float = _key(0.0, "Training", "Noise on the input embeddings (NEFTune); 5 is usual, 0 is none.", least=0.0)
    checkpointing: bool = _key(False, "Training", "Recompute activations in backward to save memory.")
    compile: bool = _key(False, "Training", "Compile the loss and its gradient with torch.compile.")
    seed: int = _key(
        0, "Training", "Seed of initial values, dropout, held-out part and data order.", least=0, most=2**63 - 1
    )

    eval_every: int = _key(0, "Evaluation", "Steps between evaluations; 0: only at the end.", least=0)
    patience: int = _key(0, "Evaluation", "Stop after this many evaluations without improvement; 0: never.", least=0)
    metric: str = _key(
        "loss",
        "Evaluation",
        "What makes an evaluation the best one: a low loss, a high accuracy (classes, preferences) or margin.",
        choices=("loss", "accuracy", "margin"),
    )
    final: str = _key(
        "best",
        "Evaluation",
        "Adapter that is written: of the best evaluation, or of the last step.",
        choices=("best", "last"),
    )
    sample: tuple[str, ...] = _key((), "Evaluation", "Prompts to continue at each evaluation.", whole=True)
    sample_tokens: int = _key(48, "Evaluation", "Maximum number of tokens of a continuation.", least=1)

    out: Path = _key(Path("funclora-run"), "Output", "Folder of the run.")
    resume: bool = _key(False, "Output", "Continue from the last checkpoint in --out.")
    save_every: int = _key(0, "Output", "Steps between checkpoints; 0: at evaluations, or ten per run.", least=0)
    keep: int = _key(2, "Output", "Number of checkpoints to keep.", least=1)
    merge: bool = _key(False, "Output", "Also write the merged model.")
    log_every: int = _key(1, "Output", "Steps between lines of metrics.jsonl.", least=1)
    tensorboard: bool = _key(False, "Output", "Write TensorBoard event files.")
    wandb: str | None = _key(None, "Output", "Weights & Biases project to log to.")
    mlflow: str | None = _key(None, "Output", "MLflow experiment to log to.")


def compares_rows(settings: Settings) -> bool:
    """Whether the loss compares the rows of a batch with each other, so that it needs all of them at once."""
    return settings.task == EMBEDDING and settings.objective not in (TRIPLET, COSINE)
