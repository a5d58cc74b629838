"""What the benchmarks share: contenders that take turns, memory in processes of their own, goals, progress, and pages.

A benchmark measures rows and stores them in docs/NAME.json. Its page and its picture are made from that file alone, so
that `--page-only` makes them again after a change of a text, without a new measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import funclora as fl

DOCS = Path(__file__).resolve().parents[1] / "docs"
Run = Callable[[], object]
Peaks = dict[str, dict[str, int]]  # row -> contender -> bytes

HOW = """Contenders take turns in one process, in changing order, so that a slower phase of the machine affects all of
them. Times are medians over the rounds. A ratio is the median of the ratios within each round, with the lowest and the
highest in brackets. A floor is what a program without any overhead would reach. Peak memory is that of a process in
which this contender alone runs, with all that it imports and the base model.
"""


# --- what is measured ------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """The median of the ratios within each round, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclasses.dataclass
class Row:
    """Contenders that took turns.

    Attributes:
        seconds: of each round, by contender.
        peaks: bytes at the worst moment of a process of its own, by contender.
        first_call: seconds of the call that compiled, by contender.
        note: why nothing was measured.
    """

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)
    first_call: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> Ratio | None:
        """None where one of them was not measured."""
        if name not in self.seconds or to not in self.seconds:
            return None
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclasses.dataclass
class Result:
    """What one run of a benchmark gave.

    Attributes:
        about: the machine, the versions, the command, and facts that the page states.
        rows: by name.
    """

    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: dict[str, Row] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Result:
        if not file.exists():
            return cls()
        raw = json.loads(file.read_text(encoding="utf-8"))
        return cls(raw["about"], {name: Row(**row) for name, row in raw["rows"].items()})

    def write(self, file: Path) -> None:
        replace(file, json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n")

    def row(self, name: str) -> Row:
        """The row of that name, for what is measured; a new one if there is none."""
        return self.rows.setdefault(name, Row())

    def find(self, name: str) -> Row:
        """The row of that name, for the page; an empty one if nothing was measured."""
        return self.rows.get(name, Row())

    def named(self, start: str) -> dict[str, Row]:
        """The rows whose names begin so and that have times, by the rest of the name."""
        return {
            name.removeprefix(start): row
            for name, row in self.rows.items()
            if name.startswith(start) and (row.seconds or row.note)
        }


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the command line asked for."""

    quick: bool = False
    rounds: int = 5
    device: str = "cpu"

    def compile(self, function: Callable[..., Any], **options: Any) -> Any:
        return torch.compile(function, **options, backend="eager" if self.quick else "inductor")

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, run: Run) -> float:
        self.sync()
        start = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - start


def measure(
    bench: Bench, runs: Mapping[str, Run], *, rounds: int = 0, calls: int = 1, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    Args:
        bench: what was asked for.
        runs: the contenders.
        rounds: how many; by default as many as were asked for.
        calls: timed calls in one turn, whose median counts; if several, after one that does not.
        warm: whether everyone runs once before.
    """
    names, seconds = list(runs), {name: [] for name in runs}  # type: tuple[list[str], dict[str, list[float]]]
    gc.collect()
    if warm:
        for run in runs.values():
            run()
    for i in range(rounds or bench.rounds):
        k = i // 2 % len(names)
        order = names[k:] + names[:k]
        for name in order if i % 2 == 0 else reversed(order):  # everyone comes after everyone else
            if calls > 1:
                runs[name]()  # a short run depends on whose weights are in the processor's caches
            seconds[name].append(statistics.median(bench.timed(runs[name]) for _ in range(calls)))
    return seconds


def peak(run: Run) -> int:
    """The most bytes that this process holds during the second of two runs."""
    run()
    gc.collect()
    # A new process starts with its parent's peak in getrusage. Linux has one of its own, which can be reset.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    run()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def cold_compiler() -> Iterator[None]:
    """Compiled code is kept on disk: with an empty folder for it, the first call really compiles."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with folder as cache, unittest.mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        yield
    torch.compiler.reset()


def fresh(*command: str, **variables: str) -> str:
    """What a new process prints that finds the same funclora."""
    path = os.pathsep.join(filter(None, [str(Path(str(fl.__file__)).parents[1]), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


# --- goals -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Goal:
    """A number to reach.

    Attributes:
        work: what is done.
        against: what it is compared with.
        reach: the largest number, or the smallest.
        missed: what the time or the memory goes to; the page shows it only where the goal is missed.
        found: the number; None where it was not measured.
        floor: the smallest that is possible, where that is known.
        peaks: bytes of both.
        at_least: whether `reach` is the smallest number.
        unit: of the numbers; a ratio has none.
    """

    work: str
    against: str
    reach: float
    missed: str
    found: Ratio | float | None = None
    floor: float | None = None
    peaks: tuple[int | None, int | None] = (None, None)
    at_least: bool = False
    unit: str = ""

    @property
    def reached(self) -> bool | None:
        """Of the number as the page shows it, rounded; None where there is none."""
        if self.found is None:
            return None
        value = round(self.found.median if isinstance(self.found, Ratio) else self.found, 2)
        return value >= self.reach if self.at_least else value <= self.reach

    def line(self) -> str:
        found = f"{self.found:.2f}" if isinstance(self.found, float) else self.found
        verdict = {None: "not measured", True: "reached", False: f"**missed**: {self.missed}"}[self.reached]
        reach = f"{'≥' if self.at_least else '≤'} {self.reach:.2f}{self.unit}"
        floor = "–" if self.floor is None else f"{self.floor:.2f}"
        measured = "–" if found is None else f"{found}{self.unit}"
        peaks = " / ".join("–" if each is None else mib(each) for each in self.peaks)
        return table_row(self.work, self.against, measured, reach, floor, peaks, verdict)


def compared(
    work: str, row: Row, name: str, to: str, reach: float, missed: str, *, against: str = "", **options: Any
) -> Goal:
    """A goal for the time of one contender as a share of another's."""
    peaks = row.peaks.get(name), row.peaks.get(to)
    return Goal(work, against or to, reach, missed, row.ratio(name, to), peaks=peaks, **options)


def table_of_goals(goals: Iterable[Goal]) -> Iterator[str]:
    yield from head("work", "against", "measured", "goal", "floor", "peak MiB of both", "")
    yield from (goal.line() for goal in goals)


# --- progress --------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    name: str
    run: Callable[[], object]


def remaining(names: Sequence[str], took: Mapping[str, float], before: Mapping[str, float]) -> float:
    """Seconds that jobs will take, by those that are done and by an earlier run; NaN where nothing is known.

    Args:
        names: the jobs to come.
        took: seconds of those that are done.
        before: seconds of jobs in the earlier run.
    """
    both = [name for name in took if name in before]
    speed = sum(took[name] for name in both) / sum(before[name] for name in both) if both else 1.0
    typical = statistics.mean(took.values()) if took else math.nan
    return sum(speed * before[name] if name in before else typical for name in names)


def run_all(jobs: Sequence[Job], before: Mapping[str, float] = MappingProxyType({})) -> dict[str, float]:
    """Runs jobs one after the other and says what comes, and how long it still takes.

    Returns:
        The seconds of each.
    """
    took: dict[str, float] = {}
    for i, (name, run) in enumerate(jobs):
        left = remaining([job.name for job in jobs[i:]], took, before)
        to_go = f", about {minutes(left)} to go" if left == left else ""
        print(f"{i + 1}/{len(jobs)} {name}: {minutes(sum(took.values()))} so far{to_go}", flush=True)
        start = time.perf_counter()
        run()
        took[name] = time.perf_counter() - start
    return took


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


# --- the command -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A script that measures, and its page.

    Attributes:
        name: of its files in docs, without their endings.
        script: its own path.
        packages: those whose versions the page states, besides torch.
        jobs: what is measured, in the order of running; they write to the result.
        page: the lines of the page.
        draw: draws the picture of the page.
        apart: the contenders whose memory is measured, each in a process of its own.
        memory_of: the peaks of one of them in this process.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    jobs: Callable[[Bench, Result], Iterable[Job]]
    page: Callable[[Result], Iterator[str]]
    draw: Callable[[Result], Any] | None = None
    apart: Callable[[Bench], Iterable[str]] = lambda bench: ()
    memory_of: Callable[[Bench, str], Peaks] = lambda bench, name: {}

    def main(self, argv: Sequence[str] | None = None) -> Result:
        parser = argparse.ArgumentParser(description=f"Writes {self.name}.json, and the page that is made of it.")
        parser.add_argument("--rounds", type=int, default=5, help="in which the contenders take turns [default: 5]")
        parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: shows that it runs")
        parser.add_argument("--only", default="", metavar="SUBSTRING", help="run what has this in its name")
        parser.add_argument("--out", type=Path, help="folder [default: docs, or a new one for part of a run]")
        parser.add_argument("--threads", type=int, help="of torch [default: as many as it takes]")
        parser.add_argument("--page-only", action="store_true", help="make the page again from the .json")
        parser.add_argument("--memory-of", help=argparse.SUPPRESS)
        options = parser.parse_args(argv)
        if options.page_only:
            return self.publish(options.out or DOCS)
        if options.threads:
            torch.set_num_threads(options.threads)
        bench = Bench(options.quick, 2 if options.quick else max(2, options.rounds))
        if options.memory_of:
            peaks = self.memory_of(bench, options.memory_of)
            print(json.dumps(peaks))
            return Result(rows={name: Row(peaks=found) for name, found in peaks.items()})
        words = ["python", f"examples/{Path(self.script).name}", *(sys.argv[1:] if argv is None else argv)]
        result = Result(about_this_run(bench, shlex.join(words), self.packages))
        every = [*self.jobs(bench, result), *self._apart(bench, result, options.threads)]
        chosen = [job for job in every if options.only in job.name]
        if not chosen:
            print(f"{self.name}: nothing is called {options.only!r}, only {', '.join(job.name for job in every)}")
            return result
        known = Result() if bench.quick else Result.read(DOCS / f"{self.name}.json")
        share = bench.rounds / known.about.get("rounds", bench.rounds)
        before = {name: share * seconds for name, seconds in known.about.get("seconds", {}).items()}
        busy = computed()
        result.about["seconds"] = run_all(chosen, before)
        if busy is not None and (now := computed()) is not None:
            result.about["others"] = max(0.0, now - busy) / sum(result.about["seconds"].values())
        partial = bench.quick or options.only
        out = options.out or (Path(tempfile.mkdtemp(prefix="benchmark-")) if partial else DOCS)
        out.mkdir(parents=True, exist_ok=True)
        result.write(out / f"{self.name}.json")
        return self.publish(out)

    def _apart(self, bench: Bench, result: Result, threads: int | None) -> Iterator[Job]:
        options = ["--quick"] * bench.quick + [f"--threads={threads}"] * bool(threads)

        def measured(name: str) -> None:
            # glibc is told to give back what is freed.
            glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            printed = fresh(sys.executable, self.script, "--memory-of", name, *options, **glibc)
            for row, peaks in json.loads(printed.splitlines()[-1]).items():
                result.row(row).peaks |= peaks

        for name in self.apart(bench):
            yield Job(f"memory of {name}", functools.partial(measured, name))

    def publish(self, folder: Path) -> Result:
        """Makes the page and the picture of the .json in that folder."""
        result = Result.read(folder / f"{self.name}.json")
        if not result.about:
            raise SystemExit(f"There is no {folder / self.name}.json: run python {self.script} first")
        picture(folder / f"{self.name}.png", result, self.draw)
        replace(folder / f"{self.name}.md", self.text(result).encode())
        print(f"Written: {folder / self.name}.md")
        return result

    def text(self, result: Result) -> str:
        lines = "\n".join(self.page(result)).splitlines()
        return "\n".join(line.rstrip() for line in lines) + "\n"


def about_this_run(bench: Bench, command: str, packages: Sequence[str]) -> dict[str, Any]:
    versions = {"Python": platform.python_version()}
    return {
        "machine": machine(bench.device), "cores": os.cpu_count() or 1, "threads": torch.get_num_threads(),
        "versions": versions | {name: importlib.metadata.version(name) for name in ("torch", *packages)},
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "command": command,
        "rounds": bench.rounds, "quick": bench.quick,
    }  # fmt: skip


def computed() -> float | None:
    """Seconds for which other programs have kept processors busy; None where the system does not say."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
        user, nice, system, _, _, irq, softirq = map(int, line.split()[1:8])
    except (OSError, ValueError):
        return None
    own = sum(os.times()[:4])  # children included
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- the page --------------------------------------------------------------------------------------------------


def facts(result: Result) -> Iterator[str]:
    """What was measured where: the list that each page begins with."""
    about = result.about
    if about["quick"]:
        yield '!!! warning "A quick run"\n    Tiny sizes and two rounds. These numbers mean nothing.\n'
    elif about.get("others", 0.0) > 0.2:
        yield '!!! warning "A busy machine"\n    Other programs were running. Ratios vary more than otherwise.\n'
    others = f"; other programs kept {about['others']:.2f} cores busy" if "others" in about else ""
    yield f"- {about['machine']}, {about['cores']} cores, {about['threads']} threads{others}"
    yield "- " + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    took = minutes(sum(about["seconds"].values()))
    rounds = f"{about['rounds']} rounds, " if "rounds" in about else ""
    yield f"- `{about['command']}`, {rounds}{about['date']}, {took}"


def head(*names: str) -> list[str]:
    return [table_row(*names), table_row(*("---" for _ in names))]


def table_row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1}f}"


def mib(size: float) -> str:
    return f"{size / 2**20:.0f}"


def replace(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def picture(path: Path, result: Result, draw: Callable[[Result], Any] | None) -> None:
    """Draws a figure to a file; without matplotlib, only says so."""
    if draw is None:
        return
    try:
        figure = draw(result)
    except ModuleNotFoundError:
        print("No picture: matplotlib is not installed")
        return
    if figure is not None:
        new = path.with_name(f".{path.name}.new")
        figure.savefig(new, format="png", dpi=120)
        new.replace(path)
