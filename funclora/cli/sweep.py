"""`funclora sweep`: a search over hyperparameters whose candidates are trained together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._base import Device
from funclora.cli._output import AsJson, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from funclora._apps.sweep.search import Search, Status
    from funclora._apps.sweep.settings import SearchSettings
    from funclora._apps.sweep.space import Member
    from funclora._apps.sweep.task import Task

SHOWN = 10
OPTIONS = ("lr", "rank", "alpha", "targets", "method", "init", "seed")


def sweep(
    out: Annotated[Path, typer.Option(help="Folder of the search; the same command continues it.")] = Path(
        "funclora-sweep"
    ),
    lr: Annotated[Sequence[str], typer.Option(help="Peak learning rates, or a range 1e-4:1e-2.")] = (
        "1e-3",
        "3e-3",
        "1e-2",
        "3e-2",
    ),
    rank: Annotated[Sequence[str], typer.Option(help="Ranks, or a range.")] = ("4", "16"),
    alpha: Annotated[
        Sequence[str], typer.Option(help="Alphas: numbers, multiples of the rank such as 2r, or a range.")
    ] = ("2r",),
    targets: Annotated[Sequence[str], typer.Option(help="Target modules: names joined by +, or all-linear.")] = (
        "all-linear",
        "q_proj+v_proj",
    ),
    method: Annotated[Sequence[str], typer.Option(help="Methods: lora, dora.")] = ("lora", "dora"),
    init: Annotated[Sequence[str], typer.Option(help="Initialisers: true, false, gaussian, orthogonal.")] = ("true",),
    seeds: Annotated[Sequence[str], typer.Option(help="Seeds of initial values and data order.")] = ("0",),
    random: Annotated[int, typer.Option(min=0, help="Number of random members, instead of the whole grid.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of --random.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a member that is never dropped.")] = 81,
    batch: Annotated[int, typer.Option(min=1, help="Windows in each step of a member.")] = 2,
    context: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 32,
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations; each is a checkpoint.")] = 9,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows in an evaluation.")] = 32,
    halving: Annotated[int, typer.Option(min=0, help="Keep the best 1/N at each rung; 0 keeps all.")] = 3,
    rungs: Annotated[int, typer.Option(min=1, help="Number of rungs, including the end.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Warm-up steps of the cosine schedule.")] = 4,
    clip: Annotated[float, typer.Option(min=1e-9, help="Maximum norm of a member's gradient.")] = 1.0,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Weight decay of AdamW.")] = 0.0,
    memory: Annotated[
        str | None, typer.Option(help="Memory budget, such as 2GiB.", show_default="most of the free memory")
    ] = None,
    population: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of members trained together.", show_default="as many as fit"),
    ] = None,
    save: Annotated[int, typer.Option(min=0, help="Number of the best members to write as PEFT folders.")] = 3,
    domain: Annotated[str, typer.Option(help="The demo's domain to train on, without --model.")] = "asyncio",
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a transformers causal language model.", show_default="the demo's model"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="JSONL file with a text in every line, for --model.", show_default=False)
    ] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Search for learning rate, rank, alpha, targets, method and seed, training all candidates together.

    Without options, 32 members are trained on a part of the demo's texts. This takes a minute or two on two cores, and
    nothing is downloaded. If the search is killed, the same command continues it and ends with the same result.

    Examples:
        funclora sweep --out search
        funclora sweep --model model --data texts.jsonl --lr 1e-4:1e-2 --rank 4,16 --random 32 --steps 300
    """
    from funclora.errors import ConfigError

    if (model is None) != (data is None):
        raise ConfigError("--model and --data must be given together. Give both, or neither for the demo's model.")
    from funclora._apps.sweep.space import Space

    lists = {"lr": lr, "rank": rank, "alpha": alpha, "targets": targets, "method": method, "init": init, "seeds": seeds}
    space = Space(**{name: ",".join(values) for name, values in lists.items()})
    members = space.draws(random, seed) if random else space.grid()
    from funclora._apps.sweep.memory import parse_size
    from funclora._apps.sweep.settings import SearchSettings
    from funclora._apps.sweep.store import claimed
    from funclora._apps.sweep.task import demo_task, folder_task
    from funclora._apps.train.device import device_of

    settings = SearchSettings(
        steps, batch, every, halving, rungs, warmup, clip, weight_decay, parse_size(memory) if memory else None,
        population,
    )  # fmt: skip
    sizes: dict[str, Any] = {"context": context, "windows": windows, "device": str(device_of(device))}
    with claimed(out):
        if model is not None and data is not None:
            task = folder_task(model, data, **sizes)
        else:
            task = demo_task(domain, **sizes)
        _run(out, task, members, settings, {"source": task.name, **sizes}, save, json)


def _run(
    out: Path,
    task: Task,
    members: list[Member],
    settings: SearchSettings,
    source: dict[str, Any],
    save: int,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from rich.live import Live

    from funclora._apps.sweep.report import write
    from funclora._apps.sweep.search import Search
    from funclora._apps.sweep.store import NOT_FINITE, Store
    from funclora._apps.train.console import Console
    from funclora._apps.train.quiet import QUIET

    trained = {k: v for k, v in asdict(settings).items() if k not in ("budget", "population")}
    config = {**source, **trained, "members": [asdict(member) for member in members], **task.digests()}
    store = Store(out, config, len(members))
    console = Console(stderr=as_json, quiet=as_json)
    live = Live(console=console, auto_refresh=False, transient=True)

    drawn = 0.0

    def observe(status: Status) -> None:
        nonlocal drawn
        # Drawing the table takes longer than a small step, and in a log nobody looks at it.
        if console.is_terminal and not QUIET.get() and time.monotonic() > drawn + 0.25:
            live.update(_table(status, search), refresh=True)
            drawn = time.monotonic()

    search = Search(task, members, settings, store, observe)
    resumed = sum(p.step for p in search.progress.values())
    if not store.state.done:
        with live:
            search.run()
            search.status.doing = "writing"
            write(search, save)
    if all(p.status == NOT_FINITE for p in search.progress.values()):
        from funclora.errors import NonFiniteError

        raise NonFiniteError("No member has a finite loss. Lower --lr, or check the data.")
    _report(search, resumed, console, as_json)


def _table(status: Status, search: Search) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    left = f", about {_clock(status.left)} left" if status.left is not None and status.done < status.total else ""
    head = Text(
        f"{search.task.name}: {status.doing}, {len(search.live)} of {len(search.members)} members in the race, "
        f"{status.size or '?'} together, step {status.step} of {search.settings.steps}{left}"
    )
    bar = ProgressBar(total=max(status.total, 1), completed=status.done, width=60)
    return Group(head, bar, _ranking(status.ranking, SHOWN), Text("\n".join(status.notes[-4:]), style="dim"))


def _ranking(board: list[dict[str, Any]], shown: int) -> RenderableType:
    from rich.table import Table

    table = Table(title=f"The best {min(shown, len(board))} of {len(board)}" if board else None)
    # Options that are equal for all members would make the table too wide.
    varied = [name for name in OPTIONS if len({row[name] for row in board}) > 1]
    columns = {"member": "member", "heldout_loss": "held-out", "step": "step"} | {name: name for name in varied}
    for name, title in (columns | {"status": "status"}).items():
        words = name in ("method", "targets", "init", "status")
        table.add_column(title, justify="left" if words else "right", overflow="fold")
    for row in board[:shown]:
        loss = row["heldout_loss"]
        cells = [row[name] for name in varied]
        table.add_row(
            str(row["member"]),
            "" if loss is None else f"{loss:.4f}",
            str(row["step"]),
            *(cell if isinstance(cell, str) else f"{cell:g}" for cell in cells),
            row["status"],
        )
    return table


def _report(search: Search, resumed: int, console: Any, as_json: bool) -> None:
    board, status, out = search.leaderboard(), search.status, search.store.folder
    adapters = sorted(str(folder) for folder in (out / "adapters").glob("*"))
    if as_json:
        outcome = {
            "out": str(out),
            "resumed_member_steps": resumed,
            "leaderboard": board,
            "notes": status.notes,
            "adapters": adapters,
        }
        print_json(outcome)
        return
    for note in status.notes:
        console.print(note, style="dim", highlight=False)
    console.print(_ranking(board, SHOWN))
    if status.fresh:
        console.print(f"{status.fresh} member-steps in {_clock(status.seconds)}.", highlight=False)
    console.print(
        f"Everything is in [bold]{out}[/]: results.jsonl, leaderboard.json, learning_curves.png, "
        f"parallel_coordinates.png, and {len(adapters)} PEFT folders under adapters/."
    )


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
