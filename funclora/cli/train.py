"""`funclora train`: trains an adapter for a model on data."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora._apps.train.reading import option, read
from funclora._apps.train.settings import RUN_FILE, Settings
from funclora.cli._output import AsJson, print_json
from funclora.cli._report import short, size, weights
from funclora.cli._settings import with_options
from funclora.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from funclora._apps.train.console import Console
    from funclora._apps.train.plan import Plan
    from funclora._apps.train.run import Result
    from funclora._bind.summary import SummaryRow


def train(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML or YAML file of settings; options take precedence.", show_default=False),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="YAML file of axolotl, LLaMA-Factory or transformers' Trainer; with --dry-run it is only translated.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(help="Show what would be trained, on which data, with how much memory, and write nothing."),
    ] = False,
    json: AsJson = False,
    **options: Any,
) -> None:
    """Train a LoRA or DoRA adapter for the model in a folder, and write it as a PEFT folder.

    Without arguments, the demo's model is trained on a package of Python's standard library, in less than a minute. The
    fields of the data determine their use: `text`, `prompt` and `completion`, chat `messages`, or a text or words
    with labels. If a run is killed, the same command with --resume continues it and ends with the same weights.

    Examples:
        funclora train
        funclora train --model llama --data chat.jsonl --out tuned
        funclora train run.toml --lr 1e-4 --dry-run
        funclora train --model llama --data chat.jsonl --quantize nf4 --method dora --merge
        funclora train --model bert --task sequence-classification --data reviews.csv --eval-every 50 --patience 3
        funclora train --model llama --task preference --data pairs.jsonl --adapter tuned/adapter --out preferred
        funclora train --from axolotl.yml --dry-run
        funclora train --out tuned --resume
    """
    given = {key: value for key, value in options.items() if value is not None and value != []}
    if from_ is not None:
        settings = _translated(from_, config, given, dry_run=dry_run, as_json=json)
        if settings is None:
            return
    else:
        settings = read(_file(config, given), given)
    if dry_run:
        _plan(settings, as_json=json)
        return
    from funclora._apps.train.run import run

    result = run(settings, quiet=json)
    if json:
        print_json(_facts(settings, result))
    else:
        _print(settings, result)


train.__signature__ = with_options(train)  # type: ignore[attr-defined]


def _file(config: Path | None, given: dict[str, Any]) -> Path | None:
    """The file of settings; a run that is resumed has its own, which is used if no other is given."""
    if config is None and given.get("resume"):
        own = Path(given.setdefault("out", Settings.out)) / RUN_FILE  # and not where the file says: it may have moved
        return own if own.is_file() else None
    return config


def _translated(
    file: Path, config: Path | None, given: dict[str, Any], *, dry_run: bool, as_json: bool
) -> Settings | None:
    """The settings in a file of another trainer; with `dry_run` they are printed instead.

    Raises:
        ConfigError: a key has no counterpart, and this is not a dry run.
    """
    from funclora._apps.train.reading import combined
    from funclora._apps.train.translation import translate
    from funclora.errors import ConfigError

    if config is not None:
        raise ConfigError(f"--from: {config} is given too, and a run has one file of settings. Give one of them.")
    made = translate(file)
    if dry_run and given:
        raise ConfigError(
            f"{option(next(iter(given)))}: --from with --dry-run only translates. Give it with the translated file."
        )
    if dry_run:
        if as_json:
            print_json(asdict(made))
        else:
            typer.echo(printable(made.as_toml()), nl=False)
        return None
    if made.left:
        raise ConfigError(
            f"--from: {file} has keys without a counterpart: {', '.join(made.left)}. Type: funclora train --from "
            f"{file} --dry-run > run.toml, which says why, and train with that file."
        )
    return combined(made.given, f"{file}: ", given)


def _facts(settings: Settings, result: Result) -> dict[str, Any]:
    outcome = result.outcome
    return {
        "out": str(settings.out),
        **{folder.name: str(folder) for folder in result.folders},
        "step": outcome.step,
        "steps": outcome.taken,
        "stopped": outcome.stopped,
        "best": None
        if outcome.best is None
        else {"step": outcome.best[0], f"validation_{settings.metric}": outcome.best[1]},
        "losses": {
            name: [{"step": step, "loss": loss} for step, loss in pairs] for name, pairs in outcome.losses.items()
        },
        "notes": result.notes,
    }


def _print(settings: Settings, result: Result) -> None:
    from rich.markup import escape

    from funclora._apps.train.console import Console

    console, outcome = Console(), result.outcome
    train, validation = outcome.losses["train"], outcome.losses["validation"]
    lines = []
    if train:
        (first, before), (last, after) = train[0], train[-1]
        lines.append(f"training loss {before:.4f} at step {first}, {after:.4f} at step {last}")
    if validation:
        lines.append(f"validation loss {validation[-1][1]:.4f} at step {validation[-1][0]}")
    if outcome.best is not None and outcome.best[0] != validation[-1][0]:
        lines.append(f"best validation {settings.metric} {outcome.best[1]:.4f} at step {outcome.best[0]}")
    if outcome.step != outcome.taken:
        lines.append(f"the adapter is that {outcome.chosen()}")
    lines += [f"wrote {folder}" for folder in result.folders]
    console.print("\n".join(map(escape, lines)), highlight=False, soft_wrap=True)


def _plan(settings: Settings, *, as_json: bool) -> None:
    import tempfile

    from funclora._apps.train.finish import rehearse
    from funclora._apps.train.plan import plan
    from funclora._apps.train.run import check_processes
    from funclora._apps.train.setup import ready

    check_processes(settings)
    with tempfile.TemporaryDirectory() as folder:
        prepared = ready(settings, Path(folder))
        rehearse(prepared.start, prepared.settings)
        made = plan(prepared)
    if as_json:
        print_json(asdict(made) | {"memory": asdict(made.memory) | {"total": made.memory.total}})
        return
    from funclora._apps.train.console import Console

    _print_plan(made, Console())


def _alike(rows: Iterable[SummaryRow]) -> Iterator[tuple[str, SummaryRow]]:
    """The rows; rows that differ only in the first number of their names become one: `layers.{0-31}.up_proj.weight`."""
    found: dict[tuple[str, str, SummaryRow], list[int]] = {}
    for row in rows:
        before, number, after = re.fullmatch(r"(.*?)(?:(?<=\.)(\d+)(?=\.)(.*))?", row.name).groups()  # type: ignore[union-attr]
        members = found.setdefault((before, after or "", replace(row, name="")), [])
        if number is not None:
            members.append(int(number))
    for (before, after, row), numbers in found.items():
        whole = numbers == list(range(numbers[0], numbers[-1] + 1)) if numbers else False
        which = f"{numbers[0]}-{numbers[-1]}" if whole and len(numbers) > 2 else ",".join(map(str, numbers))
        yield before + (f"{{{which}}}" if len(numbers) > 1 else which) + after, row


def _print_plan(plan: Plan, console: Console) -> None:
    from rich.text import Text

    table = weights()
    table.add_column("rule")
    for column in ("shape", "rank", "values of each"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in _alike(plan.summary.rows):
        rank = "" if row.r is None else str(row.r)
        table.add_row(Text(short(name)), row.rule, size(row.shape), rank, f"{row.trainable:,}")
    console.print(table)
    total, memory = plan.summary, plan.memory
    train, validation = plan.rows
    base, adapters, step, used = (
        f"{n / 2**20:,.1f}" for n in (memory.base, memory.adapters, memory.step, memory.total)
    )
    steps = f"{plan.steps:,} step{'s' * (plan.steps != 1)}"
    lines = [
        f"{total.trainable:,} of {total.total:,} values are trained ({total.percent:.2f} %)",
        f"{train:,} training and {validation:,} validation rows, {plan.longest:,} tokens at most; {steps}",
        f"{used} MiB of memory, estimated: frozen weights {base}, adapters and optimizer {adapters}, a step {step}",
        *plan.notes,
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for example in plan.examples:
        console.print(f"\n{example.source}, with loss on what is between ⟦ and ⟧:", markup=False, highlight=False)
        text = Text()
        for part, loss in example.parts:
            text.append(f"⟦{part}⟧" if loss else part, style="bold green" if loss else "dim")
        if example.answer:
            text.append(f"\n⟦{example.answer}⟧", style="bold green")
        console.print(text, soft_wrap=True)
    console.print("\nNothing was written.", highlight=False)
