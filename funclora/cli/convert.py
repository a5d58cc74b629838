"""`funclora convert`: adapters from and to the formats of other programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from funclora.cli._output import AsJson, print_json


class Format(str, Enum):
    """The formats other than PEFT's folders."""

    gguf = "gguf"
    mlx = "mlx"
    diffusers = "diffusers"


class Dtype(str, Enum):
    """The dtype of the written factors."""

    float32 = "float32"
    float16 = "float16"


def convert(
    adapter: Annotated[Path, typer.Argument(help="PEFT folder; with --from, what is read.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="New file or folder; with --from, a new PEFT folder.", show_default=False),
    ],
    base: Annotated[
        Path, typer.Option(help="Folder of the base model; for diffusers, of the pipeline.", show_default=False)
    ],
    to: Annotated[Format | None, typer.Option("--to", help="Write this format.", show_default=False)] = None,
    from_: Annotated[Format | None, typer.Option("--from", help="Read this format.", show_default=False)] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the factors in a GGUF file.", show_default="float32")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing adapter in --out.")] = False,
    json: AsJson = False,
) -> None:
    """Convert a PEFT folder to the format of another program, or such a format to a PEFT folder.

    gguf: a file that llama.cpp loads with --lora. mlx: a folder of mlx-lm. diffusers: a LoRA file of an image model, of
    diffusers or kohya's scripts; the PEFT folders of its components, such as unet and text_encoder, are inside of one
    folder. Only the structure of the base is read. Its weights are read only if the adapter's folder contains base
    weights, to compare them.

    Examples:
        funclora convert adapter --to gguf --base model -o adapter.gguf
        funclora convert adapter.gguf --from gguf --base model -o adapter
        funclora convert adapter --to mlx --base model -o adapter-mlx
        funclora convert style.safetensors --from diffusers --base pipeline -o style
    """
    from funclora.errors import ConfigError

    if (to is None) == (from_ is None):
        raise ConfigError("Give either --to or --from, with gguf, mlx or diffusers.")
    if dtype is not None and to is not Format.gguf:
        raise ConfigError("--dtype can only be used with --to gguf. Leave it out.")

    import torch

    from funclora.cli import _convert

    if to is Format.gguf:
        dense = getattr(torch, (dtype or Dtype.float32).value)
        facts = _convert.to_gguf(adapter, out, base, dense, overwrite=overwrite)
        words = "{out}: {updates} updates in {dtype}, {bytes:,} bytes"
    elif to is not None:
        write = {Format.mlx: _convert.to_mlx, Format.diffusers: _convert.to_diffusers}[to]
        facts, words = write(adapter, out, base, overwrite=overwrite), "{out}: {updates} updates"
    elif from_ is Format.diffusers:
        facts = _convert.from_diffusers(adapter, out, base, overwrite=overwrite)
        words = "{out}: {updates} updates"
    else:
        read = _convert.from_gguf if from_ is Format.gguf else _convert.from_mlx
        facts = read(adapter, out, base, overwrite=overwrite)
        words = "{out}: {updates} updates, r={r}, lora_alpha={lora_alpha:g}"
    if json:
        print_json(facts)
    else:
        text = words.format(**facts)
        typer.echo(f"{text} for {', '.join(facts['components'])}" if "components" in facts else text)
