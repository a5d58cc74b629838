"""The results of a run: the adapter as a PEFT folder, with a model card and the tokenizer, and the merged model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optree
from torch import Tensor

from funclora._apps.train.adapters import Start
from funclora._apps.train.base import Base
from funclora._apps.train.embedding import EmbeddingBase
from funclora._apps.train.examples import Data
from funclora._apps.train.folder import CLASSES, PROBLEM_TYPES, load_model, positions_after_padding
from funclora._apps.train.loop import Outcome
from funclora._apps.train.packing import Packed
from funclora._apps.train.reading import as_toml
from funclora._apps.train.rows import Example
from funclora._apps.train.settings import (
    CAUSAL,
    EMBEDDING,
    MULTI,
    PREFERENCE,
    REGRESSION,
    SEQ2SEQ,
    SEQUENCE,
    SINGLE,
    TOKEN,
    Settings,
)
from funclora._bind.merge import merge
from funclora._bind.params import base_params
from funclora._bind.summary import summary
from funclora._files.staging import check_out, staged_folder
from funclora._quant.quantize import dequantize
from funclora.errors import ConfigError
from funclora.io.hf.heads import CLASSES_FILE, classes_text
from funclora.io.hf.library import quiet, transformers
from funclora.io.hf.origin import write_origin
from funclora.io.hf.sentence import POOLINGS, write_pooling
from funclora.io.merge.merge import merge_checkpoint
from funclora.io.peft.folder import save_peft
from funclora.rules.base import Rule

ADAPTER, MERGED, CARD = "adapter", "merged", "README.md"
PIPELINES = {
    CAUSAL: "text-generation",
    SEQUENCE: "text-classification",
    TOKEN: "token-classification",
    SEQ2SEQ: "text-generation",
    PREFERENCE: "text-generation",
    EMBEDDING: "sentence-similarity",
}


def check_results(settings: Settings) -> None:
    """Raise `ConfigError` if the results cannot be written because something else is in their place.

    A resumed run replaces its own results.
    """
    if settings.resume:
        return
    read = [path for path in (settings.model, *settings.data, settings.validation) if path is not None]
    for path in read:
        if path.is_dir() and path.resolve() in (settings.out.resolve(), *settings.out.resolve().parents):
            raise ConfigError(f"out: {settings.out} is inside {path}, which is read. Give another folder with --out.")
    for name in (ADAPTER, *([MERGED] if settings.merge else [])):
        check_out(settings.out / name, read)


def rehearse(start: Start, settings: Settings) -> None:
    """Raise before the training if the results could not be written as a PEFT folder, or not be merged.

    Raises:
        UnsupportedError: PEFT does not support such an adapter, or the model's folder cannot be merged.
        FormatError: the model's folder cannot be merged.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree: Any = start.adapters
        moved: Any = optree.tree_map(
            lambda x: x + 1e-3, tree
        )  # B is still zero, and merging such an update changes nothing
        save_peft(Path(folder, ADAPTER), *start.exported(moved), model=start.base.model)
        if settings.merge and settings.model is not None and _fits_folder(start):
            merge_checkpoint(settings.model, Path(folder, ADAPTER), Path(folder, MERGED), dry_run=True)


def finish(start: Start, outcome: Outcome, data: Data, settings: Settings) -> list[Path]:
    """Write the results of a run, each folder completely or not at all.

    Args:
        start: what the run started from.
        outcome: the result of the training.
        data: the training data, for the model card.
        settings: the run's.

    Returns:
        The folders: `adapter`, relative to the base as it was loaded, and with `merge` `merged`.

    Raises:
        UnsupportedError: PEFT does not support the adapter, or a merged model cannot be written.
        NonFiniteError: an adapter or a merged weight is not finite.
        OSError: something cannot be written.
    """
    folders = [settings.out / ADAPTER]
    # What an earlier process of the same run has written may go: its checkpoints hold all that it was made of.
    with staged_folder(folders[0], replace=True) as draft:
        write_adapter(draft, start, outcome, data, settings)
    if settings.merge:
        folders.append(settings.out / MERGED)
        _merge(start, start.exported(outcome.adapters)[0], settings, folders[1])
    return folders


def write_adapter(folder: Path, start: Start, outcome: Outcome, data: Data, settings: Settings) -> None:
    """Write an adapter with all that belongs to it: model card, tokenizer, names of classes, sample of the base.

    Args:
        folder: a new folder, as from `staged_folder`.
        start: as for `finish`.
        outcome: as for `finish`.
        data: as for `finish`.
        settings: as for `finish`.

    Raises:
        UnsupportedError: PEFT does not support the adapter.
        NonFiniteError: it is not finite.
        OSError: something cannot be written.
    """
    adapters, config = start.exported(outcome.adapters)
    save_peft(folder, adapters, config, model=start.base.model)
    if settings.model is not None:
        write_origin(folder, settings.model)
    if hasattr(start.base.tokenizer, "save_pretrained"):
        start.base.tokenizer.save_pretrained(str(folder))
    if start.base.classes:
        _write(folder / CLASSES_FILE, classes_text(start.base.classes, PROBLEM_TYPES[start.base.problem]))
    _write_pooling(start.base, folder, settings)
    _write(folder / CARD, card(start, outcome, data, settings))


def _write_pooling(base: Base, folder: Path, settings: Settings) -> None:
    """Say how embeddings are made, as sentence-transformers reads it."""
    if isinstance(base, EmbeddingBase):
        model: Any = base.model
        context = settings.context if base.limit is None else min(settings.context, base.limit)
        write_pooling(folder, base.pooling, model.config.get_text_config().hidden_size, context)


def card(start: Start, outcome: Outcome, data: Data, settings: Settings) -> str:
    """The model card: the base, the data and settings of the training, and how to load the adapter."""
    base = start.base
    head = ["---"]
    if settings.model is not None:
        head.append(f"base_model: {json.dumps(str(settings.model))}")
    head += [
        "library_name: peft",
        f"pipeline_tag: {PIPELINES[settings.task]}",
        f"tags: [{settings.method}, funclora]",
        "---",
    ]
    trained = summary(base.params, start.adapters)
    facts = {
        "base": base.name + (f", quantised to {settings.quantize}" if settings.quantize != "none" else ""),
        "task": settings.task,
        "data": f"{', '.join(map(str, settings.data))}: {_examples(data.train)}",
        "validation": f"{settings.validation or 'held out'}: {_examples(data.validation)}"
        if data.validation
        else "none",
        **_meaning(base),
        "trained": f"{trained.trainable:,} of {trained.total:,} values ({trained.percent:.2f} %)",
        **({"started from": str(settings.adapter)} if settings.adapter is not None else {}),
        "steps": f"{outcome.taken:,} ({outcome.stopped})",
        "adapter": outcome.chosen(),
        **_pooled(base),
        **_losses(outcome, settings, "" if base.problem == REGRESSION else " (nats)"),
    }
    sections = [
        "\n".join(head),
        f"# {'DoRA' if settings.method == 'dora' else 'LoRA'} adapter of {base.name}",
        "Trained by `funclora train`.",
        _table(facts),
        "## How to load it",
        _usage(base, settings),
    ]
    if settings.quantize != "none":
        sections.append(
            "It was trained on quantised weights. With the dense weights, outputs differ slightly."
            if start.config.decomposition != "loftq"
            else "It compensates for the quantisation error, so load it on weights that are quantised in the same way: "
            f"{settings.quantize}, blocks of 64."
        )
    if data.notes:
        sections += ["## Data", "\n".join(f"- {note}" for note in data.notes)]
    sections += ["## Settings", f"```toml\n{as_toml(settings).partition('# Output')[0].strip()}\n```"]
    return "\n\n".join(sections) + "\n"


def _examples(rows: Sequence[Example]) -> str:
    n = len(rows.examples) if isinstance(rows, Packed) else len(rows)
    return f"{n:,} example{'s' * (n != 1)}"


def _losses(outcome: Outcome, settings: Settings, unit: str) -> dict[str, str]:
    found = {}
    train, validation = outcome.losses["train"], outcome.losses["validation"]
    if train:
        found["training loss"] = f"{train[0][1]:.4f} at step {train[0][0]}, {train[-1][1]:.4f} at step {train[-1][0]}"
    if validation:
        found["validation loss"] = f"{validation[-1][1]:.4f} at step {validation[-1][0]}"
    if outcome.best is not None:
        found[f"best validation {settings.metric}"] = f"{outcome.best[1]:.4f} at step {outcome.best[0]}"
    return {key: f"{value}{unit}" if key.endswith("loss") else value for key, value in found.items()}


def _usage(base: Base, settings: Settings) -> str:
    if settings.model is None:
        code = [
            "import funclora as fl",
            "from funclora.demo.model import load_base",
            "",
            "model = load_base()",
            'adapters, config = fl.load_peft("adapter", model)',
            "bound = fl.bind(model, fl.base_params(model), adapters)",
        ]
    else:
        # The adapter's head replaces a head of another size in the folder.
        mismatched = ", ignore_mismatched_sizes=True" if base.new else ""
        labels = f", num_labels={len(base.classes)}{mismatched}" if base.classes else ""
        if base.problem != SINGLE:
            labels += f', problem_type="{PROBLEM_TYPES[base.problem]}"'
        code = [
            "from peft import PeftModel",
            f"from transformers import {CLASSES[settings.task]}, AutoTokenizer",
            "",
            f"base = {CLASSES[settings.task]}.from_pretrained({json.dumps(str(settings.model))}{labels})",
            'model = PeftModel.from_pretrained(base, "adapter").eval()',
            'tokenizer = AutoTokenizer.from_pretrained("adapter")',
        ]
        if isinstance(base, EmbeddingBase):
            code = _sentence_code(base, settings)
        if settings.task == SEQUENCE:  # decoders classify by the last token that is not padding
            code += ["model.config.get_text_config().pad_token_id = tokenizer.pad_token_id"]
        if base.classes and base.problem != REGRESSION:
            code = ["import json", "from pathlib import Path", "", *code]
            names = '["classes"]' if base.problem == MULTI else ""
            code += [f'classes = json.loads(Path("adapter", "{CLASSES_FILE}").read_text()){names}']
    return "\n".join(["```python", *code, "```"])


def _pooled(base: Base) -> dict[str, str]:
    if not isinstance(base, EmbeddingBase):
        return {}
    return {"pooling": f"{base.pooling.tokens}, {'' if base.pooling.normalize else 'not '}normalised"}


def _sentence_code(base: EmbeddingBase, settings: Settings) -> list[str]:
    """How sentence-transformers uses the adapter."""
    normal = ", Normalize()" if base.pooling.normalize else ""
    names = "Normalize, Pooling, Transformer" if normal else "Pooling, Transformer"
    return [
        "from peft import PeftModel",
        "from sentence_transformers import SentenceTransformer",
        f"from sentence_transformers.sentence_transformer.modules import {names}",
        "",
        f"body = Transformer({json.dumps(str(settings.model))})",
        'body.model = PeftModel.from_pretrained(body.model, "adapter").eval()',
        f'pooling = Pooling(body.get_embedding_dimension(), "{POOLINGS[base.pooling.tokens][1]}")',
        f"model = SentenceTransformer(modules=[body, pooling{normal}])",
    ]


def _meaning(base: Base) -> dict[str, str]:
    """What the outputs of the head are, if there is one."""
    if not base.classes:
        return {}
    if base.problem == REGRESSION:
        return {"outputs": f"{len(base.classes)} (regression)"}
    several = " (a text has several of them)" if base.problem == MULTI else ""
    return {"classes": ", ".join(base.classes) + several}


def _table(rows: Mapping[str, str]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {cell(value)} |" for key, value in rows.items())])


def _merge(start: Start, adapters: Mapping[str, Rule], settings: Settings, out: Path) -> None:
    """The merged model, as a folder for `from_pretrained`; for the demo's base, as a file."""
    base = start.base
    packed = start.config.decomposition == "loftq"  # the adapter belongs to the quantised weights
    if settings.model is None:
        from dataclasses import asdict

        from safetensors.torch import save_file

        from funclora.demo.model import load_base

        model: Any = load_base()
        weights = merge(dequantize(base.params) if packed else base_params(model), adapters)
        with staged_folder(out, replace=True) as draft:
            metadata = {"config": json.dumps(asdict(model.config))}
            save_file({name: _own(tensor) for name, tensor in weights.items()}, draft / "model.safetensors", metadata)
        return
    config: Any = base.model.config
    if _fits_folder(start):
        with staged_folder(out, replace=True) as draft:
            merge_checkpoint(settings.model, settings.out / ADAPTER, draft)
            _write_pooling(base, draft, settings)
        return
    # The folder does not have this model: its head is new, or of another kind.
    model, _ = load_model(settings.model, settings.task, classes=base.classes, problem=base.problem, seed=settings.seed)
    weights = merge(dequantize(base.params) if packed else base_params(model), adapters)
    model.load_state_dict(weights)
    if not positions_after_padding(model):  # of which it would move the positions
        model.config.pad_token_id = config.pad_token_id
    with staged_folder(out, replace=True) as draft, quiet(transformers()):
        model.save_pretrained(str(draft))
        base.tokenizer.save_pretrained(str(draft))
        _write_pooling(base, draft, settings)


def _fits_folder(start: Start) -> bool:
    """Whether the merged model is the folder's model with other values, so that it need not be in memory."""
    model: Any = start.base.model
    same = (model.config.architectures or ["?"])[0] == type(model).__name__
    return same and not start.base.new and start.config.decomposition != "loftq"


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
