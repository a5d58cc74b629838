"""Do LoRA, DoRA and full fine-tuning move magnitude and direction alike? Section 3.2 of the DoRA paper, on the demo.

    python examples/lora_vs_dora.py             writes docs/lora-vs-dora.json and .png, prints the tables of the page
    python examples/lora_vs_dora.py --quick     two runs of a few steps each, writes nothing

The demo's base model learns one text with each method, at several learning rates and from several seeds. All methods
change the same weights and see the same batches. At some steps ΔM and ΔD are taken of every weight. The learning rate
that is looked at is, for each method, the one that ends nearest to a held-out loss that all methods reach.

What geometry alone gives is a fourth method, "random": every weight moves as far as under LoRA, in a random direction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import funclora as fl
from funclora.analysis import Movement, Movements, Trend, magnitude_direction
from funclora.demo import corpus
from funclora.demo.model import ByteLM, load_base, next_byte_loss

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LRS = {"LoRA": (1e-3, 3e-3), "DoRA": (1e-3, 3e-3), "full": (3e-4, 1e-3)}
RANDOM = "random"
PERS: tuple[Literal["output", "input"], ...] = ("output", "input")


@dataclass(frozen=True)
class Settings:
    """How long and how large."""

    domain: str = "pydoc_data"
    seeds: int = 3
    steps: tuple[int, ...] = (20, 40, 80, 160)
    batch: int = 4
    context: int = 64
    r: int = 8
    windows: int = 48
    lrs: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict(LRS))


@dataclass
class Run:
    """One training: held-out losses by step, and how the weights moved, by the units of the vectors."""

    method: str
    lr: float
    seed: int
    losses: dict[int, float]
    moved: dict[str, Movements]


@dataclass
class Result:
    """All runs. `chosen` has the learning rate of each method whose runs are compared."""

    settings: Settings
    base_loss: float
    target_loss: float
    chosen: dict[str, float]
    runs: list[Run]
    seconds: float

    @property
    def methods(self) -> list[str]:
        return [*self.settings.lrs, RANDOM]

    def matched(self, method: str) -> list[Run]:
        """The runs of a method at its chosen learning rate, one for each seed."""
        lr = self.chosen["LoRA" if method == RANDOM else method]
        return [run for run in self.runs if run.method == method and run.lr == lr]


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Magnitude and direction of LoRA, DoRA and full fine-tuning.")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed, one learning rate each")
    parser.add_argument("--out", type=Path, help="folder for lora-vs-dora.json and .png; docs, or none with --quick")
    options = parser.parse_args(argv)
    settings = Settings()
    if options.quick:
        settings = Settings(seeds=1, steps=(4, 8), batch=2, context=64, windows=4,
                            lrs={"LoRA": (1e-2,), "DoRA": (1e-2,), "full": (1e-3,)})  # fmt: skip
    result = measure(settings, print)
    print(tables(as_json(result)))
    out = options.out or (None if options.quick else Path("docs"))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "lora-vs-dora.json").write_text(json.dumps(as_json(result)) + "\n", encoding="utf-8")
        first = [result.matched(method)[0].moved["output"] for method in result.methods]
        sum(first[1:], first[0]).plot(out / "lora-vs-dora.png")  # of seed 0
        print(f"wrote {out / 'lora-vs-dora.json'} and {out / 'lora-vs-dora.png'}")
    return result


def measure(settings: Settings, say: Callable[[str], None]) -> Result:
    """All runs, and which of them to compare."""
    started = time.perf_counter()
    model = load_base()
    params = fl.base_params(model)
    text, heldout = corpus.split(settings.domain)
    windows = corpus.windows(heldout, count=settings.windows, context=settings.context)
    with torch.no_grad():
        base_loss = float(next_byte_loss(model, windows))
    runs = []
    for method, lrs in settings.lrs.items():
        for lr in lrs:
            for seed in range(settings.seeds):
                run = train(model, params, text, windows, method, lr, seed, settings)
                runs.append(run)
                say(f"{method} lr {lr:g} seed {seed}: held-out loss {run.losses[settings.steps[-1]]:.4f}")
    target, chosen = choose(runs, settings)
    lora = [run for run in runs if run.method == "LoRA" and run.lr == chosen["LoRA"]]
    runs += [randomised(run, params) for run in lora]
    return Result(settings, base_loss, target, chosen, runs, time.perf_counter() - started)


def train(model: ByteLM, params: dict[str, Tensor], text: bytes, windows: Tensor, method: str, lr: float, seed: int,
          settings: Settings) -> Run:  # fmt: skip
    """One method at one learning rate from one seed, looked at on the way."""
    generator = torch.Generator().manual_seed(seed)
    config = fl.LoraConfig(
        r=settings.r, lora_alpha=2 * settings.r, target_modules=list(KINDS), use_dora=method == "DoRA"
    )
    adapters: Any = fl.init(model, config, generator=generator)
    if method == "full":
        adapters = {name: fl.Full(params[name].clone()) for name in adapters}
    # A generator of its own, so that all methods see the same batches.
    batches = corpus.batches(
        text, batch=settings.batch, context=settings.context, generator=torch.Generator().manual_seed(1000 + seed)
    )
    schedule = fl.optim.warmup_linear(lr, max(1, settings.steps[0] // 2), 10**9)  # constant after the warm-up
    optimizer = fl.optim.chain(fl.optim.clip_by_global_norm(1.0), fl.optim.adamw(schedule, weight_decay=0.0))
    step = fl.train_step(model, next_byte_loss, optimizer)
    state = optimizer.init(adapters)
    run = Run(method, lr, seed, {}, {})
    for i in range(1, settings.steps[-1] + 1):
        adapters, state, _ = step(params, adapters, state, next(batches))
        if i in settings.steps:
            with torch.no_grad():
                run.losses[i] = float(next_byte_loss(fl.bind(model, params, adapters), windows))
            add(run, params, adapters, i)
    return run


def add(run: Run, params: dict[str, Tensor], tuned: Any, step: int) -> None:
    """Look at the weights."""
    for per in PERS:
        moved = magnitude_direction(tuned, params=params, per=per, label=run.method, step=step)
        run.moved[per] = run.moved[per] + moved if per in run.moved else moved


def randomised(run: Run, params: dict[str, Tensor]) -> Run:
    """Weights that moved as far as in that run, each in a direction of Gaussian noise, the same at all steps."""
    generator = torch.Generator().manual_seed(run.seed)
    names = dict.fromkeys(row.name for row in run.moved["output"].rows)
    noise = {name: torch.randn(params[name].shape, generator=generator, dtype=torch.float64) for name in names}
    found = Run(RANDOM, run.lr, run.seed, {}, {})
    for step in run.losses:
        tuned = {}
        for row in run.moved["output"].rows:
            if row.step == step:
                tuned[row.name] = params[row.name] + noise[row.name] * (distance(row) / noise[row.name].norm())
        add(found, params, tuned, step)
    return found


def distance(row: Movement) -> float:
    """About ‖ΔW‖: |v − w|² = (|v| − |w|)² + 2|v||w|(1 − cos), with the means over units in the places of the units."""
    squares = row.delta_m**2 + 2 * row.magnitude**2 * row.delta_d
    return float((row.units * squares) ** 0.5)


def choose(runs: Sequence[Run], settings: Settings) -> tuple[float, dict[str, float]]:
    """A held-out loss that every method reaches at the last step, and the learning rate that ends nearest to it."""
    last = settings.steps[-1]
    ends = {
        method: {lr: statistics.mean(r.losses[last] for r in runs if (r.method, r.lr) == (method, lr)) for lr in lrs}
        for method, lrs in settings.lrs.items()
    }
    target = max(min(by_lr.values()) for by_lr in ends.values())
    chosen = {method: min(by_lr, key=lambda lr: abs(by_lr[lr] - target)) for method, by_lr in ends.items()}
    return target, chosen


# --- what comes out ---------------------------------------------------------------------------------------------


ALL = "all weights, all steps"
FAR = "layers.3.mlp.down_proj"  # moves furthest under LoRA and DoRA, and weighs most in every straight line


def selections(last: int) -> dict[str, tuple[Callable[[Movement], bool], bool]]:
    """Which points a trend is taken of, and whether of ΔM / magnitude."""
    found: dict[str, tuple[Callable[[Movement], bool], bool]] = {
        ALL: (lambda row: True, False),
        f"{ALL}, ΔM / magnitude": (lambda row: True, True),
        f"all weights, step {last}": (lambda row: row.step == last, False),
        f"all weights, step {last}, ΔM / magnitude": (lambda row: row.step == last, True),
    }
    return found | {f"{kind}, all steps": ((lambda row, kind=kind: kind in row.name), False) for kind in KINDS}


def trends(run: Run, last: int) -> dict[str, dict[str, Trend]]:
    """Trends by units and selection."""
    return {
        per: {
            name: Movements(tuple(row for row in moved.rows if keep(row)), moved.per).trend(relative=relative)
            for name, (keep, relative) in selections(last).items()
        }
        for per, moved in run.moved.items()
    }


def as_json(result: Result) -> dict[str, Any]:
    """All numbers; the movements of the runs that are compared."""
    last = result.settings.steps[-1]
    return {
        "command": "python examples/lora_vs_dora.py",
        "torch": torch.__version__,
        "settings": asdict(result.settings),
        "seconds": round(result.seconds, 1),
        "base_loss": result.base_loss,
        "target_loss": result.target_loss,
        "chosen": result.chosen,
        "runs": [
            {
                "method": run.method,
                "lr": run.lr,
                "seed": run.seed,
                "losses": {str(step): loss for step, loss in run.losses.items()},
                "trends": {
                    per: {name: asdict(trend) for name, trend in by_name.items()}
                    for per, by_name in trends(run, last).items()
                },
                "movements": [
                    [per, row.name, row.step, *(float(f"{x:.6g}") for x in (row.delta_d, row.delta_m, row.magnitude))]
                    for per, moved in run.moved.items()
                    for row in moved.rows
                ]
                if run in result.matched(run.method)
                else [],
            }
            for run in result.runs
        ],
        "movements_are": ["per", "weight", "step", "delta_d", "delta_m", "magnitude"],
    }


def tables(found: dict[str, Any]) -> str:
    """The tables of the page, from what is in the file."""
    settings, chosen = found["settings"], found["chosen"]
    last = str(settings["steps"][-1])
    lines = [f"| method | learning rate | held-out loss at step {last} | |", "|---|---|---|---|"]
    lines.append(f"| base | | {found['base_loss']:.4f} | |")
    for method, lrs in settings["lrs"].items():
        for lr in lrs:
            ends = [r["losses"][last] for r in found["runs"] if (r["method"], r["lr"]) == (method, lr)]
            mark = "compared" if lr == chosen[method] else ""
            lines.append(f"| {method} | {lr:g} | {spread(ends, '.4f')} | {mark} |")
    methods = [*settings["lrs"], RANDOM]
    compared = {
        method: [
            r
            for r in found["runs"]
            if r["method"] == method and r["lr"] == chosen["LoRA" if method == RANDOM else method]
        ]
        for method in methods
    }
    for per in PERS:
        lines += [
            "",
            f"| correlation of ΔM and ΔD, per {per} | {' | '.join(methods)} |",
            "|---" * (len(methods) + 1) + "|",
        ]
        for name in compared["LoRA"][0]["trends"][per]:
            cells = [spread([r["trends"][per][name]["correlation"] for r in compared[m]], "+.2f") for m in methods]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        slopes = [spread([r["trends"][per][ALL]["slope"] for r in compared[m]], "+.2f") for m in methods]
        lines.append(f"| slope of ΔM over ΔD, {ALL} | {' | '.join(slopes)} |")
    lines += [
        "",
        f"| per output, step {last}, mean over weights | {' | '.join(methods)} |",
        "|---" * (len(methods) + 1) + "|",
    ]
    for name, value in (
        ("ΔD", lambda row: row[3]),
        ("ΔM / magnitude", lambda row: row[4] / row[5]),
        ("ΔM / (magnitude · ΔD)", lambda row: row[4] / row[5] / row[3]),
    ):
        cells = []
        for method in methods:
            of_runs = [
                [value(row) for row in run["movements"] if row[0] == "output" and str(row[2]) == last]
                for run in compared[method]
            ]
            cells.append(f"{statistics.mean(map(statistics.mean, of_runs)):.2g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head = f"| correlation, per output, step {last}, without {FAR} | {' | '.join(methods)} |"
    lines += ["", head, "|---" * (len(methods) + 1) + "|"]
    for name, relative in (("ΔM", False), ("ΔM / magnitude", True)):
        cells = []
        for method in methods:
            found_there: list[float | None] = []
            for run in compared[method]:
                rows = [r for r in run["movements"] if r[0] == "output" and str(r[2]) == last and FAR not in r[1]]
                heights = [row[4] / (row[5] if relative else 1) for row in rows]
                found_there.append(statistics.correlation([row[3] for row in rows], heights))
            cells.append(spread(found_there, "+.2f"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], form: str) -> str:
    """The mean, and the least and largest where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = format(statistics.mean(known), form)
    return mean if len(known) < 2 else f"{mean} ({min(known):{form}} to {max(known):{form}})"


if __name__ == "__main__":
    main()
