"""`funclora sweep`: a search over hyperparameters whose candidates are trained together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._output import AsJson, print_json
from funclora.cli._settings import with_options
from funclora.distributed import _ranks as ranks

if TYPE_CHECKING:
    from rich.console import RenderableType

    from funclora._apps.sweep.search import Search, Status
    from funclora._apps.sweep.settings import SearchSettings
    from funclora._apps.sweep.space import Member, Space
    from funclora._apps.sweep.task import Task
    from funclora._apps.train.settings import Settings

SHOWN = 10
# Besides the loss, and how they are written.
METRICS = {
    **dict.fromkeys(("accuracy", "recall_at_1", "micro_f1", "macro_f1", "span_f1", "rewards/accuracies"), "{:.1%}"),
    **dict.fromkeys(("pearson", "spearman", "rewards/margins"), "{:.3f}"),
}
OPTIONS = ("lr", "rank", "alpha", "targets", "method", "init", "dropout", "beta", "seed")
# Keys of a run that are searched, and those that a search does not use.
SEARCHED = ("lr", "rank", "alpha", "targets", "method", "init", "dropout", "beta", "seed")
UNUSED = (
    "adapter", "chunk", "compile", "shard", "sample", "sample_tokens", "out", "resume", "save_every", "keep", "merge",
    "log_every", "tensorboard", "wandb", "mlflow",
)  # fmt: skip
NO_EFFECT = ("adapter", "chunk", "compile", "shard", "sample", "merge", "tensorboard", "wandb", "mlflow", "resume")
DEMO_DOMAIN = "asyncio"
# A search of the demo's base and data, which takes a minute or two.
DEMO: dict[str, Any] = {"steps": 81, "batch": 2, "context": 32, "warmup": 4.0, "eval_every": 9}
DEMO_ROWS = 32
EVALUATIONS = 9  # unless set otherwise

Lists = Sequence[str] | None


def sweep(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML or YAML file of settings; options take precedence.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the search; the same command continues it.")] = Path(
        "funclora-sweep"
    ),
    lr: Annotated[
        Lists, typer.Option(help="Peak learning rates, or a range 1e-4:1e-2.", show_default="1e-3,3e-3,1e-2,3e-2")
    ] = None,
    rank: Annotated[Lists, typer.Option(help="Ranks, or a range.", show_default="4,16")] = None,
    alpha: Annotated[
        Lists,
        typer.Option(help="Alphas: numbers, multiples of the rank such as 2r, or a range.", show_default="2r"),
    ] = None,
    targets: Annotated[
        Lists,
        typer.Option(help="Target modules: names joined by +, or all-linear.", show_default="all-linear,q_proj+v_proj"),
    ] = None,
    method: Annotated[Lists, typer.Option(help="Methods: lora, dora.", show_default="lora,dora")] = None,
    init: Annotated[
        Lists, typer.Option(help="Initialisers: true, false, gaussian, orthogonal.", show_default="true")
    ] = None,
    dropout: Annotated[
        Lists, typer.Option(help="Dropout probabilities on the inputs of the adapters.", show_default="0")
    ] = None,
    beta: Annotated[
        Lists, typer.Option(help="Betas of the loss of preferences, or a range.", show_default="that of the loss")
    ] = None,
    seeds: Annotated[
        Lists, typer.Option(help="Seeds of initial values, dropout and data order.", show_default="0")
    ] = None,
    random: Annotated[int, typer.Option(min=0, help="Number of random members, instead of the whole grid.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of --random.")] = 0,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of held-out rows in an evaluation.", show_default="all")
    ] = None,
    halving: Annotated[int, typer.Option(min=0, help="Keep the best 1/N at each rung; 0 keeps all.")] = 3,
    rungs: Annotated[int, typer.Option(min=1, help="Number of rungs, including the end.")] = 3,
    memory: Annotated[
        str | None, typer.Option(help="Memory budget, such as 2GiB.", show_default="most of the free memory")
    ] = None,
    population: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of members trained together.", show_default="as many as fit"),
    ] = None,
    save: Annotated[int, typer.Option(min=0, help="Number of the best members to write as PEFT folders.")] = 3,
    domain: Annotated[
        str | None, typer.Option(help="The demo's domain to train on, without --data.", show_default=DEMO_DOMAIN)
    ] = None,
    compare: Annotated[
        Sequence[Path] | None,
        typer.Option(help="Two folders of finished searches to compare; nothing is trained.", show_default=False),
    ] = None,
    json: AsJson = False,
    **options: Any,
) -> None:
    """Search for learning rate, rank, alpha, targets, method, dropout and seed, training all candidates together.

    A member is what funclora train would train with its options, on any task and data. Without a model and data, 32
    members are trained on a part of the demo's texts. This takes a minute or two on two cores, and nothing is
    downloaded. If the search is killed, the same command continues it and ends with the same result.

    Examples:
        funclora sweep --out search
        funclora sweep --model model --data chats.jsonl --lr 1e-4:1e-2 --rank 4,16 --random 32 --steps 300
        funclora sweep run.toml --lr 1e-4,3e-4,1e-3 --dropout 0,0.1 --eval-every 50 --patience 3
        funclora sweep --compare search,other
    """
    if compare is not None:
        _compare(compare, as_json=json)
        return
    lists = {
        "lr": lr, "rank": rank, "alpha": alpha, "targets": targets, "method": method, "init": init, "dropout": dropout,
        "beta": beta, "seeds": seeds,
    }  # fmt: skip
    settings, space = _read(config, {k: v for k, v in options.items() if v is not None and v != []}, lists, domain)
    members = space.draws(random, seed) if random else space.grid()
    from dataclasses import replace

    from funclora._apps.sweep.memory import parse_size
    from funclora._apps.sweep.settings import SearchSettings
    from funclora._apps.sweep.store import claimed
    from funclora._apps.sweep.task import load_task
    from funclora._apps.train.setup import demo_data

    budget = parse_size(memory) if memory else None
    with claimed(out):
        if not settings.data:
            with ranks.first_alone():
                settings = replace(settings, data=(demo_data(out, domain or DEMO_DOMAIN),))
            rows = rows or DEMO_ROWS
        task = load_task(replace(settings, seed=members[0].seed), out, rows)
        every = settings.eval_every or -(-task.steps // EVALUATIONS)
        searched = SearchSettings(
            task.steps, every, halving, rungs, settings.patience, settings.final == "best", budget, population
        )
        _run(out, task, members, searched, rows, save, as_json=json)


sweep.__signature__ = with_options(sweep, (*SEARCHED, *UNUSED))  # type: ignore[attr-defined]


def _read(
    config: Path | None, given: dict[str, Any], lists: dict[str, Lists], domain: str | None
) -> tuple[Settings, Space]:
    """The settings of all members, and the space of those that differ."""
    from dataclasses import fields

    from funclora._apps.sweep.space import Space
    from funclora._apps.train.reading import read
    from funclora._apps.train.settings import PREFERENCE
    from funclora.errors import ConfigError, near

    settings = read(config, given)
    demo = not settings.data
    if domain is not None:
        from funclora.demo.corpus import DOMAINS

        if not demo:
            raise ConfigError("--domain: names a part of the demo's data, but --data is given. Give one of them.")
        if domain not in DOMAINS:
            known = ", ".join(DOMAINS)
            raise ConfigError(f"--domain: expected one of {known}, got {domain!r}.{near(domain, DOMAINS, 1)}")
    for f in fields(settings):
        if f.name in NO_EFFECT and f.default != getattr(settings, f.name):
            raise ConfigError(f"{config}: {f.name} has no effect in a search. Leave it out.")
    if settings.optimizer == "adamw-8bit":
        raise ConfigError("optimizer: adamw-8bit cannot update several members at once. Set another one.")
    if lists["beta"] is not None and settings.task != PREFERENCE:
        raise ConfigError(f"--beta: only {PREFERENCE} uses it, and the task is {settings.task}. Leave it out.")
    own: dict[str, str] = {}
    if config is not None:  # what is not searched is as in the file
        alone = {name: getattr(settings, name) for name in SEARCHED}
        own = {
            name: "auto" if value is None else str(value)
            for name, value in alone.items()
            if name not in ("targets", "seed")
        }
        own |= {"targets": "+".join(settings.targets), "seeds": str(settings.seed)}
    elif demo:
        settings = read(None, {**DEMO, **given})
    space = Space(**own | {name: ",".join(values) for name, values in lists.items() if values is not None})
    return settings, space


def _run(
    out: Path,
    task: Task,
    members: list[Member],
    settings: SearchSettings,
    rows: int | None,
    save: int,
    *,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from rich.live import Live

    from funclora._apps.sweep.report import write
    from funclora._apps.sweep.search import Search
    from funclora._apps.sweep.store import NOT_FINITE, opened
    from funclora._apps.train.checkpoint import plain
    from funclora._apps.train.console import Console
    from funclora._apps.train.quiet import QUIET

    trained = {key: value for key, value in plain(task.settings).items() if key not in (*SEARCHED, *UNUSED)}
    searched = {k: v for k, v in asdict(settings).items() if k not in ("budget", "population")}
    data = trained.pop("data")  # the files may move, but not change
    given = {**trained, **searched, "rows": rows, "members": [asdict(member) for member in members]}
    digests = task.digests()
    ranks.check_equal(digests)
    store = opened(out, {**given, **digests, "source": data}, len(members))
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
        for note in task.data.notes:
            console.print(note, style="dim", markup=False, highlight=False)
        with live:
            search.run()
            search.status.doing = "writing"
            if ranks.is_first():
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
    metrics = [name for name in METRICS if any(name in row for row in board)]
    columns = {"member": "member", "heldout_loss": "held-out"} | {name: name.replace("_", " ") for name in metrics}
    for name, title in (columns | {"step": "step"} | {name: name for name in varied} | {"status": "status"}).items():
        words = name in ("method", "targets", "init", "status")
        table.add_column(title, justify="left" if words else "right", overflow="fold")
    for row in board[:shown]:
        loss = row["heldout_loss"]
        cells = [row[name] for name in varied]
        table.add_row(
            str(row["member"]),
            "" if loss is None else f"{loss:.4f}",
            *(METRICS[name].format(row[name]) if name in row else "" for name in metrics),
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
        f"Everything is in [bold]{out}[/]: results.jsonl, leaderboard.json, learning_curves.png, learning_rates.png, "
        f"parallel_coordinates.png, and {len(adapters)} PEFT folders under adapters/, each with its run.toml."
    )


def _compare(folders: Sequence[Path], *, as_json: bool) -> None:
    from rich.table import Table

    from funclora._apps.sweep.compare import compared
    from funclora._apps.train.console import Console

    found = compared(folders)
    if as_json:
        print_json(found.tree())
        return
    console = Console()
    table = Table()
    for title in ("", "members", "best member", "held-out", "options of the best"):
        table.add_column(title, justify="left" if title in ("", "options of the best") else "right", overflow="fold")
    for side in found.sides:
        said = ", ".join(f"{name} {value}" for name, value in side.best_options.items())
        loss = "" if side.best_loss is None else f"{side.best_loss:.4f}"
        table.add_row(side.folder, str(side.members), str(side.best_member), loss, said)
    console.print(table)
    for line in found.words():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
