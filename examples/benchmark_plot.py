"""The results of benchmark.py as a page: tables, the numbers to reach, a plot, and the raw seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

METHODS = ("LoRA", "DoRA")
HEADLINE = 16  # the rank that the numbers to reach are about
SHORT = (16, 64)  # the tokens of train steps on one short row
DEVICES = ("cpu", "cuda")
WORKS = {"forward": "forward", "single": "one token", "train": "train step"}


Tick = Callable[[str], object]


class Ratio(NamedTuple):
    """The median of the ratios within each round, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclasses.dataclass
class Row:
    """Seconds per round of contenders that took turns."""

    model: str
    r: int
    work: str
    seconds: dict[str, list[float]]
    first_call: dict[str, float] = dataclasses.field(default_factory=dict)  # of compiled functions
    skipped: str = ""

    @property
    def key(self) -> str:
        return f"{self.model} r={self.r} {self.work}" if self.model else self.work

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> Ratio:
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclasses.dataclass
class Result:
    """One run on one device."""

    device: str = "cpu"
    machine: str = ""
    cores: int = 1
    threads: int = 1
    load: float = 0.0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    date: str = ""
    command: str = ""
    quick: bool = False
    seconds: float = 0.0
    models: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    agreement: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])  # of outputs, of gradients
    memory: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # contender -> work -> peak bytes
    rows: list[Row] = dataclasses.field(default_factory=list)

    @classmethod
    def begin(cls, device: str, command: str, quick: bool) -> Result:
        """An empty result that knows the machine."""
        modules = ("torch", "transformers", "peft", "numpy")
        return cls(
            device, machine(device), os.cpu_count() or 1, torch.get_num_threads(), os.getloadavg()[0],
            {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in modules},
            f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", command, quick,
        )  # fmt: skip

    @classmethod
    def load_json(cls, value: dict[str, Any]) -> Result:
        return cls(**value | {"rows": [Row(**row) for row in value["rows"]]})

    def row(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.key == key and row.seconds), None)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Target(NamedTuple):
    """A number to reach: a ratio of two contenders of one row, or seconds where there is nothing to compare with."""

    what: str
    reach: float
    key: str
    name: str
    to: str = ""
    against: str = ""

    def line(self, result: Result) -> str:
        row = result.row(self.key)
        against = self.against or NAMES.get(self.to, self.to) or "–"
        limit = f"≤ {self.reach:.2f}" if self.to else f"≤ {self.reach:.2f} s"
        if row is None:
            return table_row(self.what, against, limit, "not measured", "–")
        value = row.ratio(self.name, self.to).median if self.to else row.median(self.name)
        shown = str(row.ratio(self.name, self.to)) if self.to else f"{value:.2f} s"
        return table_row(self.what, against, limit, shown, "yes" if value <= self.reach else "**no**")


NAMES = {"base": "base model", "apply LoRA": "own LoRA, `apply`", "bound LoRA": "own LoRA, `bound(x)`",
         "train_step LoRA": "own LoRA"}  # fmt: skip


def targets() -> Iterator[Target]:
    for model, title in (("llama", "Llama"), ("gpt2", "GPT-2")):
        forward, single, train = (f"{model} r={HEADLINE} {work}" for work in WORKS)
        calls = {"apply": "`apply`", "bound": "`bound(x)`"}
        few, some = (f"{model} r={HEADLINE} train on {tokens} tokens" for tokens in SHORT)
        for (call, how), reach in zip(calls.items(), (1.12, 1.08), strict=True):
            yield Target(f"{title}: forward, LoRA, {how}", 1.08, forward, f"{call} LoRA", "base")
            yield Target(f"{title}: one token, LoRA, {how}", reach, single, f"{call} LoRA", "base")
        yield Target(f"{title}: forward, DoRA, `apply`", 1.15, forward, "apply DoRA", "base")
        yield Target(f"{title}: one token, DoRA, `bound(x)`", 0.10, single, "bound DoRA", "PEFT DoRA")
        yield Target(f"{title}: train step, LoRA", 0.94, train, "train_step LoRA", "PEFT LoRA")
        yield Target(f"{title}: train step, 1 × 16 tokens, LoRA", 1.0, few, "train_step LoRA", "PEFT LoRA")
        yield Target(
            f"{title}: train step, DoRA", {"llama": 1.1}.get(model, 1.15), train, "train_step DoRA", "train_step LoRA"
        )
        yield Target(f"{title}: train step, 1 × 64 tokens, DoRA", 1.2, some, "train_step DoRA", "train_step LoRA")
    compiled = f"llama r={HEADLINE} compiled train"
    yield Target(
        "Llama: train step, LoRA, compiled", 1.0, compiled, "train_step LoRA compiled", "train_step LoRA", "eager"
    )
    yield Target("`import funclora` beyond `import torch`", 0.15, "start", "import funclora")
    yield Target("`funclora --help`, the whole process", 0.40, "start", "funclora --help")


# --- the page --------------------------------------------------------------------------------------------------

INTRODUCTION = """# Benchmarks

This page compares funclora, [PEFT](https://github.com/huggingface/peft) and the base model without adapters. They
alternate in one process, in changing order, so that a slower phase of the machine affects all of them. Times are
medians over the rounds. A ratio is the median of the ratios within each round, with the lowest and the highest in
brackets.

- Base weights are random and in float32. B is not zero, and α = 2r.
- Before any timing, PEFT and funclora get the same A, B and m, and must agree in their outputs and in every gradient.
- Forward passes run in evaluation mode under `torch.no_grad()` and without a KV cache. `apply` is
  `fl.apply(model, params, adapters, x)`. For `bound(x)`, `bound = fl.bind(model, params, adapters)` is called once
  before, as in serving, so DoRA's norms are also computed only once.
- A training step is forward, backward and an AdamW update of the adapter: `fl.train_step` with `fl.optim.adamw`, and
  `torch.optim.AdamW` for PEFT.
- By default PEFT caches nothing between calls. "PEFT cached" is its `DoraCaching`, which keeps a second dense weight
  per layer.
- The time for one token (one image) is measured in a call that follows another call of the same contender.

[benchmarks.json](benchmarks.json) has the seconds of every round. The training loop of `funclora train` has
[its own page](benchmarks-train.md).
"""


def write(out: Path, result: Result) -> Path:
    """Put a result into the page in that folder; the sections of other devices stay.

    Args:
        out: the folder.
        result: replaces what is there for its device.

    Returns:
        The page.
    """
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "benchmarks.json"
    known = json.loads(raw.read_text()) if raw.exists() else {}
    known[result.device] = dataclasses.asdict(result)
    results = [Result.load_json(known[device]) for device in DEVICES if device in known]
    draw(out / image(result), result)
    replace(raw, json.dumps(known, indent=1).encode() + b"\n")
    page = out / "benchmarks.md"
    parts = [INTRODUCTION, *("\n".join(section(r, (out / image(r)).exists())) for r in results)]
    text = "\n".join(parts) + "\n"
    replace(page, "\n".join(line.rstrip() for line in text.splitlines()).encode() + b"\n")
    return page


def replace(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def image(result: Result) -> str:
    return "benchmarks.png" if result.device == "cpu" else f"benchmarks-{result.device}.png"


def section(result: Result, has_image: bool) -> Iterator[str]:
    if result.device == "cpu":
        where = f"{result.machine}, {result.cores} cores, {result.threads} threads (torch's default)"
    else:
        where = result.machine
    yield f"## {'CPU' if result.device == 'cpu' else 'GPU'}\n"
    if result.quick:
        yield '!!! warning "A quick run"\n    Tiny models and two rounds. These numbers mean nothing.\n'
    yield f"- {where}; load when it began: {result.load:.1f}"
    yield "- " + ", ".join(f"{name} {version}" for name, version in result.versions.items())
    yield f"- `{result.command}`, {result.date}, {result.seconds / 60:.0f} minutes"
    if any(result.agreement):
        output, gradient = result.agreement
        yield "- largest difference between PEFT and funclora, as a share of the largest value: "
        yield f"  {output:.0e} in outputs, {gradient:.0e} in gradients"
    yield "\n### Numbers to reach\n"
    yield f"With r = {HEADLINE}.\n"
    yield from head("work", "against", "reach", "measured", "reached")
    yield from (target.line(result) for target in targets())
    if has_image:
        yield f"\n![Time against PEFT, by model, work and rank]({image(result)})"
    for model, about in result.models.items():
        if any(row.model == model and row.work in WORKS for row in result.rows):
            yield f"\n### {about['title']}"
            yield from forwards(result, model, about)
            yield from trains(result, model, about)
    yield from compiled(result)
    yield from memory(result)
    yield from starts(result)


def forwards(result: Result, model: str, about: dict[str, str]) -> Iterator[str]:
    for work in ("forward", "single"):
        rows = rows_of(result, model, work)
        if not rows:
            continue
        yield f"\n**Forward, {about[work]}** (ms)\n"
        extra = ["PEFT cached"] if work == "single" else []
        yield from head("r", "", "base", "PEFT", *extra, "`apply`", "`bound(x)`", "`apply` / base",
                        "`bound(x)` / base", "`apply` / PEFT", "`bound(x)` / PEFT")  # fmt: skip
        for row in rows:
            for method in METHODS:
                names = [f"PEFT {method}", f"apply {method}", f"bound {method}"]
                times = [ms(row.median(name)) for name in ("base", *names)]
                if extra:
                    times.insert(2, ms(row.median("PEFT DoRA cached")) if method == "DoRA" else "")
                pairs = [(a, b) for b in ("base", names[0]) for a in names[1:]]
                yield table_row(row.r, method, *times, *(f"{row.ratio(a, b).median:.2f}" for a, b in pairs))


def trains(result: Result, model: str, about: dict[str, str]) -> Iterator[str]:
    rows = rows_of(result, model, "train")
    if not rows:
        return
    yield f"\n**Train step, {about['train']}** (ms)\n"
    yield from head("r", "", "base, forward alone", "PEFT", "`train_step`", "`train_step` / PEFT",
                    "`train_step` / base", "/ own LoRA")  # fmt: skip
    for row in rows:
        for method in METHODS:
            own, other = f"train_step {method}", f"PEFT {method}"
            times = [ms(row.median(name)) for name in ("base", other, own)]
            ratios = [f"{row.ratio(own, to).median:.2f}" for to in (other, "base", "train_step LoRA")]
            yield table_row(row.r, method, *times, *ratios)


def rows_of(result: Result, model: str, work: str) -> list[Row]:
    return sorted((row for row in result.rows if (row.model, row.work) == (model, work)), key=lambda row: row.r)


def compiled(result: Result) -> Iterator[str]:
    rows = [row for row in result.rows if row.work.startswith("compiled")]
    if not rows:
        return
    yield "\n### torch.compile\n"
    yield f"The Llama above with two layers only, LoRA, r = {HEADLINE}. funclora's functions are compiled with "
    yield "`fullgraph=True`, its train step with the optimizer in it; PEFT's train step is a compiled model and "
    yield "an eager optimizer. The first call compiles.\n"
    yield from head("work", "contender", "eager (ms)", "compiled (ms)", "compiled / eager", "first call (s)")
    for row in rows:
        work = WORKS[row.work.removeprefix("compiled ")]
        if row.skipped:
            yield table_row(work, row.skipped, "", "", "", "")
        for name, seconds in row.first_call.items():
            eager = name.removesuffix(" compiled")
            times = [ms(row.median(eager)), ms(row.median(name)), row.ratio(name, eager)]
            yield table_row(work, NAMES.get(name, eager), *times, f"{seconds:.0f}")


def memory(result: Result) -> Iterator[str]:
    if not result.memory:
        return
    about = result.models["llama"]
    yield "\n### Peak memory\n"
    yield f"MiB beyond the base model's own forward pass, each contender in a new process; Llama, r = {HEADLINE}. "
    yield "Forward passes are `apply`.\n"
    yield from head("contender", *(f"{WORKS[work]}, {about[work]}" for work in ("single", "forward", "train")))
    base = result.memory["base"]
    base = base | {"train": base["forward"]}
    for name, peaks in result.memory.items():
        if name != "base":
            yield table_row(name, *(f"{(value - base[work]) / 2**20:.0f}" for work, value in peaks.items()))
    yield f"\nThe base model itself: {base['single'] / 2**20:.0f}, {base['forward'] / 2**20:.0f} MiB in all."


def starts(result: Result) -> Iterator[str]:
    row = result.row("start")
    if row is None:
        return
    yield "\n### Start\n"
    yield from head("", "ms")
    yield from (table_row(f"`{name}`", ms(row.median(name))) for name in row.seconds)
    yield "\n`import funclora` is what comes on top of `import torch`, with `funclora.apply` used once."


@contextlib.contextmanager
def progress(total: int) -> Iterator[Tick]:
    """`tick("what")` says what comes now, `tick("")` that a round is done."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield lambda what: print(what) if what else None
        return
    columns = BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    # Nothing else may run while contenders are timed, so no thread redraws the bar.
    with Progress(*columns, TextColumn("{task.description}"), auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def tick(what: str) -> None:
            bar.update(task, advance=not what, description=what or None, refresh=True)

        yield tick


def head(*names: str) -> list[str]:
    return [table_row(*names), table_row(*("---" for _ in names))]


def table_row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1}f}"


# --- the plot --------------------------------------------------------------------------------------------------

LINES = {"apply": ("o", "-"), "bound": ("s", "--"), "train_step": ("o", "-")}  # contender: marker, style
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
COLOURS = {"LoRA": "tab:blue", "DoRA": "tab:orange"}


def draw(path: Path, result: Result) -> None:
    """Time as a share of PEFT's over the rank, one panel per work and model. Without matplotlib, nothing."""
    models = [model for model in result.models if any(rows_of(result, model, work) for work in WORKS)]
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    except ModuleNotFoundError:
        print("No plot: matplotlib is not installed")
        return
    if not models:
        return
    figure = Figure((3.4 * len(models), 7.5), layout="constrained")
    axes = figure.subplots(len(WORKS), len(models), sharex=True, sharey="row", squeeze=False)
    for line, work in zip(axes, WORKS, strict=True):
        for axis, model in zip(line, models, strict=True):
            plot(axis, rows_of(result, model, work))
            axis.set(xscale="log", yscale="log")
            axis.set_xlim(7, 290)
            for direction, ticks in ((axis.xaxis, (8, 16, 64, 256)), (axis.yaxis, SHARES)):
                direction.set_major_locator(FixedLocator(ticks))
                direction.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                direction.set_minor_locator(NullLocator())
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.grid(alpha=0.3)
            name = "train step" if work == "train" else "forward"
            axis.set_title(f"{model}: {name}, {result.models[model][work]}", fontsize=9)
        line[0].set_ylabel("time / PEFT's")
    for axis in axes[-1]:
        axis.set_xlabel("rank")
    shown = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=4, fontsize=8)
    new = path.with_name(f".{path.name}.new")
    figure.savefig(new, format="png", dpi=120)
    new.replace(path)


def plot(axis: Any, rows: list[Row]) -> None:
    for method in METHODS:
        for call, (marker, style) in LINES.items():
            points = [(row.r, row.ratio(f"{call} {method}", f"PEFT {method}")) for row in rows
                      if f"{call} {method}" in row.seconds]  # fmt: skip
            if points:
                ranks, ratios = [r for r, _ in points], [ratio.median for _, ratio in points]
                axis.plot(ranks, ratios, style, marker=marker, markersize=4, color=COLOURS[method],
                          label=f"{method}, {'bound(x)' if call == 'bound' else 'apply or train_step'}")  # fmt: skip
