"""`funclora combine`: PEFT folders into one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._output import AsJson, print_json

if TYPE_CHECKING:
    from funclora.io.peft.combine import CombinedFolders


class Type(str, Enum):
    """The types of `funclora.algebra.combine`, where torch is not needed to list them."""

    svd = "svd"
    linear = "linear"
    cat = "cat"
    ties = "ties"
    ties_svd = "ties_svd"
    dare_ties = "dare_ties"
    dare_linear = "dare_linear"
    dare_ties_svd = "dare_ties_svd"
    dare_linear_svd = "dare_linear_svd"
    magnitude_prune = "magnitude_prune"
    magnitude_prune_svd = "magnitude_prune_svd"


class Signs(str, Enum):
    """How TIES chooses signs."""

    total = "total"
    frequency = "frequency"


class Dtype(str, Enum):
    """The dtype of the written factors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def combine(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new PEFT folder.", show_default=False)],
    type_: Annotated[Type, typer.Option("--type", help="Combination type, as in PEFT.")] = Type.svd,
    weights: Annotated[
        Sequence[float] | None, typer.Option(help="One weight for each adapter.", show_default="1 for each")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", "--svd-rank", help="Rank of an _svd type.", show_default="the adapters' largest rank"),
    ] = None,
    svd_clamp: Annotated[float | None, typer.Option(help="Clamp decomposed factors to this quantile.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the entries that pruning keeps.")] = None,
    majority_sign_method: Annotated[Signs, typer.Option(help="How TIES chooses signs.")] = Signs.total,
    seed: Annotated[int | None, typer.Option(help="Seed of DARE's random numbers.", show_default="0")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the base model; needed for DoRA, experts, biases and modules_to_save.", show_default=False
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the written factors.")] = Dtype.float32,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing adapter in --out.")] = False,
    json: AsJson = False,
) -> None:
    """Combine saved adapters into one, as PEFT's add_weighted_adapter does, without loading a model.

    cat is the exact weighted sum; its rank is the sum of the ranks. svd is its best approximation with a given rank.
    The types that end in _svd combine the changes of the weights, as in their papers. The same types without _svd
    combine the factors A and B, which is a different operation.

    Examples:
        funclora combine code prose -o both --weights 0.7,0.3 --rank 8
        funclora combine code prose -o both --type ties_svd --density 0.5
    """
    found = _combined(
        adapters,
        out,
        weights,
        type_.value,
        base=base,
        dtype=dtype.value,
        overwrite=overwrite,
        seed=seed,
        svd_rank=rank,
        svd_clamp=svd_clamp,
        density=density,
        majority_sign_method=majority_sign_method.value,
    )
    report = _report(found, adapters, weights or [1.0] * len(adapters), type_.value, out)
    if json:
        print_json(report)
    else:
        _print(report)


def _combined(
    adapters: list[Path],
    out: Path,
    weights: Sequence[float] | None,
    kind: str,
    *,
    base: Path | None,
    dtype: str,
    overwrite: bool,
    seed: int | None,
    **options: Any,
) -> CombinedFolders:
    import torch

    from funclora.cli._adapters import adapter_out
    from funclora.cli._base import base_model
    from funclora.errors import ConfigError
    from funclora.io.peft.combine import combine_peft

    generator = None
    if "dare" in kind:
        generator = torch.Generator().manual_seed(seed or 0)
    elif seed is not None:
        raise ConfigError(f"--seed: --type {kind} uses no random numbers. Leave it out.")
    with adapter_out(out, overwrite=overwrite):
        model = None if base is None else base_model(base)
        return combine_peft(
            adapters, out, weights, kind, model=model, dtype=getattr(torch, dtype), generator=generator, **options
        )


def _report(
    found: CombinedFolders, adapters: list[Path], weights: Sequence[float], kind: str, out: Path
) -> dict[str, Any]:
    from funclora.rules.base import Adapters

    def facts(rules: Adapters) -> dict[str, Any]:
        return {
            "targets": len(rules),
            "ranks": sorted({rule.r for rule in rules.values() if rule.r is not None}),
            "parameters": sum(getattr(rule, leaf).numel() for rule in rules.values() for leaf in rule.leaf_names),
        }

    sources = [
        {"adapter": str(path), "weight": weight, **facts(rules)}
        for path, weight, rules in zip(adapters, weights, found.sources, strict=True)
    ]
    result = {"adapter": str(out), **facts(found.adapters), "r": found.config.r, "lora_alpha": found.config.lora_alpha}
    return {"combination_type": kind, "sources": sources, "result": result}


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from funclora._apps.train.console import Console

    table = Table(title=f"Combined by {report['combination_type']}")
    table.add_column("adapter")
    for column in ("weight", "targets", "rank", "parameters"):
        table.add_column(column, justify="right")
    for row in (*report["sources"], report["result"]):
        ranks = row["ranks"]
        rank = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
        weight = f"{row['weight']:g}" if "weight" in row else ""
        cells = (escape(row["adapter"]), weight, f"{row['targets']:,}", rank, f"{row['parameters']:,}")
        table.add_row(*cells, style=None if "weight" in row else "bold")
    Console().print(table)
