"""The page of benchmark.py: tables, the numbers to reach, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmark_tools import HOW, Goal, Result, Row, compared, facts, head, ms, table_of_goals, table_row

METHODS = ("LoRA", "DoRA")
HEADLINE = 16  # the rank that the numbers to reach are about
SHORT = (16, 64)  # the tokens of train steps on one short row
WORKS = {"forward": "forward", "single": "one token", "train": "train step"}
NAMES = {"base": "base model", "PEFT LoRA": "PEFT", "train_step LoRA": "own LoRA"}
CALLS = {"apply": "`apply`", "bound": "`bound(x)`"}


# --- goals -----------------------------------------------------------------------------------------------------

PASSES = """the two small products of a layer are 3 to 4 % of its arithmetic; the rest is one more pass over its input
and its output"""
CALL = "`bind` copies the module objects in each call; the rest is two small products in each layer and their dispatch"
PRODUCTS = "two small products in each layer, which are short for their dispatch through Python"
NORMS = "the norms of all rows, and one more pass over each layer's output to scale it"
STEP = "the same two passes of the base and the same products in both; what can be saved is one copy of an output"
FEW = "`bind`, and an optimizer that writes new weights and states, which do not depend on the tokens"
IMPORT = "more than half of it is one garbage collection of all that torch has made, which happens to fall into it"
HELP = "the start of Python, and the import of the library that reads options"
SCALED = "one more pass over each layer's output in forward and two in backward, and the norms"


def goals(result: Result) -> Iterator[Goal]:
    """What design asks for, by model."""

    def goal(work: str, row: Row, name: str, to: str, reach: float, missed: str, floor: float | None = None) -> Goal:
        return compared(work, row, name, to, reach, " ".join(missed.split()), against=NAMES[to], floor=floor)

    for model, title in (("llama", "Llama"), ("gpt2", "GPT-2")):
        named = f"{model} r={HEADLINE}"
        forward, single, train = (result.find(f"{named} {work}") for work in WORKS)
        few, some = (result.find(f"{named} train on {tokens} tokens") for tokens in SHORT)
        for (call, how), reach, missed in zip(CALLS.items(), (1.12, 1.08), (CALL, PRODUCTS), strict=True):
            yield goal(f"{title}: forward, LoRA, {how}", forward, f"{call} LoRA", "base", 1.08, PASSES)
            yield goal(f"{title}: one token, LoRA, {how}", single, f"{call} LoRA", "base", reach, missed, 1.06)
        yield goal(f"{title}: forward, DoRA, `apply`", forward, "apply DoRA", "base", 1.15, NORMS)
        for what, row, reach, missed in (("", train, 0.94, STEP), (f", 1 × {SHORT[0]} tokens", few, 1.0, FEW)):
            passes = row.ratio("base", "PEFT LoRA")
            floor = 2 * passes.median if passes else None  # forward and backward of the base alone
            yield goal(f"{title}: train step{what}, LoRA", row, "train_step LoRA", "PEFT LoRA", reach, missed, floor)
        long = 1.1 if model == "llama" else 1.15
        for what, row, reach in (("", train, long), (f", 1 × {SHORT[1]} tokens", some, 1.2)):
            work = f"{title}: train step{what}, DoRA"
            yield goal(work, row, "train_step DoRA", "train_step LoRA", reach, SCALED, 1.0)
    start = result.find("start")
    for work, name, reach, missed in (
        ("`import funclora` beyond `import torch`", "import funclora", 0.15, IMPORT),
        ("`funclora --help`, the whole process", "funclora --help", 0.4, HELP),
    ):
        found = start.median(name) if name in start.seconds else None
        yield Goal(work, "–", reach, missed, found, unit=" s")


# --- the page --------------------------------------------------------------------------------------------------

INTRODUCTION = f"""# Benchmarks

This page compares funclora, [PEFT](https://github.com/huggingface/peft) and the base model without adapters.

{HOW}
- Base weights are random and in float32. B is not zero, and α = 2r.
- Before any timing, PEFT and funclora get the same A, B and m, and must agree in their outputs and in every gradient.
- Forward passes run in evaluation mode under `torch.no_grad()` and without a KV cache. `apply` is
  `fl.apply(model, params, adapters, x)`. For `bound(x)`, `bound = fl.bind(model, params, adapters)` is called once
  before, as in serving, so DoRA's norms are also computed only once.
- A training step is forward, backward and an AdamW update of the adapter: `fl.train_step` with `fl.optim.adamw`, and
  `torch.optim.AdamW(fused=True)` for PEFT. Its floor is twice the base model's forward pass.
- By default PEFT caches nothing between calls. "PEFT cached" is its `DoraCaching`, which keeps a second dense weight
  per layer.
- The time for one token (one image) is measured in a call that follows another call of the same contender.

[benchmarks.json](benchmarks.json) has the seconds of every round. There are pages about [many
adapters](benchmarks-many.md), [training](benchmarks-train.md), [preferences](benchmarks-preference.md),
[embeddings](benchmarks-embeddings.md), [serving](benchmarks-serving.md), [GPUs](benchmarks-gpu.md) and
[growth](benchmarks-growth.md). `make bench` writes all but that of GPUs.
"""


def page(result: Result) -> Iterator[str]:
    yield INTRODUCTION
    yield from facts(result)
    output, gradient = result.about["agreement"]
    yield "- largest difference between PEFT and funclora, as a share of the largest value: "
    yield f"  {output:.0e} in outputs, {gradient:.0e} in gradients"
    yield "\n## Numbers to reach\n"
    yield f"With r = {HEADLINE}.\n"
    yield from table_of_goals(goals(result))
    yield "\n![Time against PEFT, by model, work and rank](benchmarks.png)"
    for model, about in result.about["models"].items():
        if any(ranks_of(result, model, work) for work in WORKS):
            yield f"\n## {about['title']}"
            yield from forwards(result, model, about)
            yield from trains(result, model, about)
    yield from compiled(result)
    yield from starts(result)


def forwards(result: Result, model: str, about: dict[str, str]) -> Iterator[str]:
    for work in ("forward", "single"):
        rows = ranks_of(result, model, work)
        if not rows:
            continue
        yield f"\n**Forward, {about[work]}** (ms)\n"
        extra = ["PEFT cached"] if work == "single" else []
        yield from head("r", "", "base", "PEFT", *extra, "`apply`", "`bound(x)`", "`apply` / base",
                        "`bound(x)` / base", "`apply` / PEFT", "`bound(x)` / PEFT")  # fmt: skip
        for r, row in rows.items():
            for method in METHODS:
                names = [f"PEFT {method}", f"apply {method}", f"bound {method}"]
                times = [ms(row.median(name)) for name in ("base", *names)]
                if extra:
                    times.insert(2, ms(row.median("PEFT DoRA cached")) if method == "DoRA" else "")
                pairs = [(a, b) for b in ("base", names[0]) for a in names[1:]]
                yield table_row(r, method, *times, *(short(row, a, b) for a, b in pairs))


def trains(result: Result, model: str, about: dict[str, str]) -> Iterator[str]:
    rows = ranks_of(result, model, "train")
    if not rows:
        return
    yield f"\n**Train step, {about['train']}** (ms)\n"
    yield from head("r", "", "base, forward alone", "PEFT", "`train_step`", "`train_step` / PEFT",
                    "`train_step` / base", "/ own LoRA")  # fmt: skip
    for r, row in rows.items():
        for method in METHODS:
            own, other = f"train_step {method}", f"PEFT {method}"
            times = [ms(row.median(name)) for name in ("base", other, own)]
            ratios = [short(row, own, to) for to in (other, "base", "train_step LoRA")]
            yield table_row(r, method, *times, *ratios)


def ranks_of(result: Result, model: str, work: str) -> dict[int, Row]:
    """The rows of a model and a work, by rank."""
    rows = (name.split(" ", 1) for name in result.named(f"{model} r="))
    return {int(r): result.find(f"{model} r={r} {work}") for r in sorted((r for r, w in rows if w == work), key=int)}


def short(row: Row, name: str, to: str) -> str:
    ratio = row.ratio(name, to)
    return f"{ratio.median:.2f}" if ratio else ""


def compiled(result: Result) -> Iterator[str]:
    rows = result.named("compiled ")
    if not rows:
        return
    yield "\n## torch.compile\n"
    yield f"The Llama above with two layers only, LoRA, r = {HEADLINE}. funclora's functions are compiled with "
    yield "`fullgraph=True`, its train step with the optimizer in it; PEFT's train step is a compiled model and "
    yield "an eager optimizer. The first call compiles.\n"
    yield from head("work", "contender", "eager (ms)", "compiled (ms)", "compiled / eager", "first call (s)")
    for work, row in rows.items():
        if row.note:
            yield table_row(WORKS[work], row.note, "", "", "", "")
        for name, seconds in row.first_call.items():
            eager = name.removesuffix(" compiled")
            times = [ms(row.median(eager)), ms(row.median(name)), row.ratio(name, eager)]
            yield table_row(WORKS[work], eager, *times, f"{seconds:.0f}")


def starts(result: Result) -> Iterator[str]:
    row = result.find("start")
    if row.seconds:
        yield "\n## Start\n"
        yield from head("", "ms")
        yield from (table_row(f"`{name}`", ms(row.median(name))) for name in row.seconds)
        yield "\n`import funclora` is what comes on top of `import torch`, with `funclora.apply` used once."


# --- the picture -----------------------------------------------------------------------------------------------

LINES = {"apply": ("o", "-"), "bound": ("s", "--"), "train_step": ("o", "-")}  # contender: marker, style
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
COLOURS = {"LoRA": "tab:blue", "DoRA": "tab:orange"}


def draw(result: Result) -> Any:
    """Time as a share of PEFT's over the rank, one panel per work and model."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    about = result.about["models"]
    models = [model for model in about if any(ranks_of(result, model, work) for work in WORKS)]
    if not models:
        return None
    figure = Figure((3.4 * len(models), 7.5), layout="constrained")
    axes = figure.subplots(len(WORKS), len(models), sharex=True, sharey="row", squeeze=False)
    for line, work in zip(axes, WORKS, strict=True):
        for axis, model in zip(line, models, strict=True):
            plot(axis, ranks_of(result, model, work))
            axis.set(xscale="log", yscale="log")
            axis.set_xlim(7, 290)
            for direction, ticks in ((axis.xaxis, (8, 16, 64, 256)), (axis.yaxis, SHARES)):
                direction.set_major_locator(FixedLocator(ticks))
                direction.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                direction.set_minor_locator(NullLocator())
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.grid(alpha=0.3)
            name = "train step" if work == "train" else "forward"
            axis.set_title(f"{model}: {name}, {about[model][work]}", fontsize=9)
        line[0].set_ylabel("time / PEFT's")
    for axis in axes[-1]:
        axis.set_xlabel("rank")
    shown = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def plot(axis: Any, rows: dict[int, Row]) -> None:
    for method in METHODS:
        for call, (marker, style) in LINES.items():
            ratios = {r: row.ratio(f"{call} {method}", f"PEFT {method}") for r, row in rows.items()}
            points = {r: ratio.median for r, ratio in ratios.items() if ratio}
            if points:
                axis.plot([*points], [*points.values()], style, marker=marker, markersize=4, color=COLOURS[method],
                          label=f"{method}, {'bound(x)' if call == 'bound' else 'apply or train_step'}")  # fmt: skip
