"""`funclora convert`: adapters from and to the formats of other programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from funclora.cli._output import AsJson, print_json


class Format(str, Enum):
    """The formats other than PEFT's folders."""

    gguf = "gguf"


class Dtype(str, Enum):
    """The dtype of the written factors."""

    float32 = "float32"
    float16 = "float16"


def convert(
    adapter: Annotated[Path, typer.Argument(help="PEFT folder; with --from, a file.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="New file; with --from, a new PEFT folder.", show_default=False)
    ],
    base: Annotated[Path, typer.Option(help="Folder of the base model.", show_default=False)],
    to: Annotated[Format | None, typer.Option("--to", help="Write this format.", show_default=False)] = None,
    from_: Annotated[Format | None, typer.Option("--from", help="Read this format.", show_default=False)] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the factors in a new file.", show_default="float32")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing adapter in --out.")] = False,
    json: AsJson = False,
) -> None:
    """Convert a PEFT folder to a GGUF file that llama.cpp loads with --lora, or such a file to a PEFT folder.

    Only the structure of the base model is read. Its weights are read only if the adapter's folder contains base
    weights, to compare them.

    Examples:
        funclora convert adapter --to gguf --base model -o adapter.gguf
        funclora convert adapter.gguf --from gguf --base model -o adapter
    """
    from funclora.errors import ConfigError

    if (to is None) == (from_ is None):
        raise ConfigError("Give either --to gguf or --from gguf.")
    if from_ is not None and dtype is not None:
        raise ConfigError("--dtype can only be used with --to gguf. Leave it out.")
    if to is not None:
        facts = _to_gguf(adapter, out, base, (dtype or Dtype.float32).value, overwrite=overwrite)
        words = "{out}: {updates} updates in {dtype}, {bytes:,} bytes"
    else:
        facts = _from_gguf(adapter, out, base, overwrite=overwrite)
        words = "{out}: {updates} updates, r={r}, lora_alpha={lora_alpha:g}"
    if json:
        print_json(facts)
    else:
        typer.echo(words.format(**facts))


def _to_gguf(folder: Path, out: Path, base: Path, dtype: str, *, overwrite: bool) -> dict[str, Any]:
    import torch

    from funclora.cli._base import base_model
    from funclora.cli._output import claimed_out
    from funclora.io.gguf.adapter import save_gguf
    from funclora.io.hf.origin import check_origin
    from funclora.io.peft.files import AdapterFiles
    from funclora.io.peft.folder import load_files
    from funclora.io.peft.tensors import StoredTensors

    with claimed_out(out, overwrite=overwrite):
        # PEFT stores the weights of adapted embeddings next to the adapter; they must be compared with the model's.
        files = AdapterFiles(folder)
        weights = any(".base_layer." in key for key in StoredTensors(files).shapes())
        model = base_model(base, weights=weights)
        adapters, _ = load_files(files, model)
        check_origin([folder], base)
        save_gguf(out, adapters, model, dtype=getattr(torch, dtype))
    return {"out": out, "updates": len(adapters), "dtype": dtype, "bytes": out.stat().st_size}


def _from_gguf(file: Path, out: Path, base: Path, *, overwrite: bool) -> dict[str, Any]:
    from funclora.cli._adapters import adapter_out
    from funclora.cli._base import base_model
    from funclora.io.gguf.adapter import load_gguf
    from funclora.io.peft.folder import save_peft

    with adapter_out(out, overwrite=overwrite):
        adapters, config = load_gguf(file, base_model(base, weights=False))
        save_peft(out, adapters, config.replace(base_model_name_or_path=str(base)))
    return {"out": out, "updates": len(adapters), "r": config.r, "lora_alpha": config.lora_alpha}
