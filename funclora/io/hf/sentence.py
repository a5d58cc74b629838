"""How sentence-transformers' folders say what is made of the tokens of a text: modules.json and the pooling's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from funclora._files.atomic import read_json
from funclora.errors import FormatError

MODULES_FILE, POOLING_FILE = "modules.json", "1_Pooling/config.json"
# Ours -> the key of the older files, which all versions read, and the name in those of version 6.
POOLINGS = {
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "first": ("pooling_mode_cls_token", "cls"),
    "last": ("pooling_mode_lasttoken", "lasttoken"),
}


class Pooling(NamedTuple):
    """How embeddings are made.

    Attributes:
        tokens: those that are read: "mean", "first" or "last".
        normalize: whether embeddings have the length 1.
    """

    tokens: str
    normalize: bool


def write_pooling(folder: Path, pooling: Pooling, size: int, context: int) -> None:
    """Write the files by which sentence-transformers loads a folder.

    Args:
        folder: of an adapter or a model.
        pooling: how embeddings are made.
        size: of an embedding.
        context: maximum length of a text in tokens.

    Raises:
        OSError: a file cannot be written.
    """
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] * pooling.normalize)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    modes = {old: name == pooling.tokens for name, (old, _) in POOLINGS.items()}
    files: dict[str, Any] = {
        MODULES_FILE: modules,
        POOLING_FILE: {"word_embedding_dimension": size, **modes},
        "sentence_bert_config.json": {"max_seq_length": context, "do_lower_case": False},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if pooling.normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)


def read_pooling(folder: Path) -> Pooling | None:
    """How the embeddings of a folder are made; None if it does not say so.

    Raises:
        FormatError: a file cannot be read, or says something that is not known here.
    """
    if not (folder / MODULES_FILE).exists():
        return None
    modules = read_modules(folder / MODULES_FILE)
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise FormatError(
            f"{folder / MODULES_FILE}: expected a Transformer, a Pooling and perhaps a Normalize, got {kinds}. Other "
            "modules are not known here."
        )
    file = folder / str(modules[1].get("path")) / "config.json"
    config = read_json(file)
    found = [
        name for name, (old, new) in POOLINGS.items() if config.get(old) is True or config.get("pooling_mode") == new
    ]
    others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(found) != 1 or len(others) > 1:
        raise FormatError(f"{file}: expected one pooling of mean, cls and lasttoken, got {others or found}.")
    return Pooling(found[0], "Normalize" in kinds)


def read_modules(file: Path) -> list[dict[str, Any]]:
    """The contents of `modules.json`.

    Raises:
        FormatError: it is no list of objects.
    """
    try:
        modules = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{file}: this is not JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise FormatError(f"{file}: expected a list of modules.")
    return modules
