"""The page of benchmark_many.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmark_tools import HOW, Goal, Result, compared, facts, head, mib, ms, table_of_goals, table_row

TITLES = {
    "forward": "Forward (ms)",
    "change": "Another adapter in one row (ms)",
    "train": "Train step of all members (ms)",
    "ranks": "Ranks in one stack (ms)",
}
FIRST, LAST = "train 1 × 1 × 16", "train 32 × 1 × 16"  # between them, the memory of the others is compared


# --- goals -----------------------------------------------------------------------------------------------------

DECODE = (
    "two small products in each layer for every row, and hundreds of calls through Python that say whose each row is"
)
DECODE_DORA = f"{DECODE}; one more pass over each output to scale it"
CHANGE = "`route` and `bind` of all weights; the copy of the new member is small"
POPULATION = "AdamW, which reads and writes the weights and states of all members, and their small products"
FEW = "AdamW, which also copies what the caller still holds, then the small products, `bind`, and following rows"
FUSED = "XLA fuses what follows a product and the whole of AdamW into single passes, and runs no Python between them"
KEPT = "the old weights and states stay in memory until the step has made the new ones: it is a pure function"


def goals(result: Result) -> Iterator[Goal]:
    for n, floor in ((16, 1.04), (64, 1.08)):
        row = result.find(f"forward {n} × 1 × 1")
        for dora, reach, missed in (("", 1.25, DECODE), (", DoRA", 1.3, DECODE_DORA)):
            work = f"{n} adapters decode a token each{dora or ', LoRA'}"
            yield compared(work, row, f"rows{dora}", "base", reach, missed, floor=floor)
    for n in (16, 64):
        row = result.find(f"change {n} × 1 × 1")
        for method in ("LoRA", "DoRA"):
            work = f"another adapter in a batch of {n}, {method}"
            yield compared(work, row, f"change, {method}", "base", 0.3, CHANGE, against="a decode step of the base")
    for size, reach, missed in (("32 × 1 × 16", 1.25, POPULATION), ("64 × 1 × 2", 1.5, FEW)):
        row = result.find(f"train {size}")
        work = f"train step, {size}"
        yield compared(work, row, "rows", "base", reach, missed, against="base, forward and backward", floor=1.0)
        yield compared(work, row, "rows", "JAX", 1.0, FUSED, against="JAX, `jit(vmap(grad))`")
    first, last = (result.find(name).peaks.get("rows") for name in (FIRST, LAST))
    found = None
    if first and last and "own_bytes" in result.about:
        found = last / (first + (members(LAST) - 1) * result.about["own_bytes"])
    peaks = last, first
    yield Goal("memory of a train step of 32", "one member and own needs of 31", 1.15, KEPT, found, 1.0, peaks)


def members(name: str) -> int:
    return int(name.split()[1])


# --- the page --------------------------------------------------------------------------------------------------


def page(result: Result) -> Iterator[str]:
    yield "# Benchmarks of many adapters\n"
    yield "One frozen Llama (6 layers, 512 wide, random weights, float32) and many adapters of rank "
    yield f"{result.about['rank']} on all its linear layers. Sizes are `members × rows of each × tokens of each row`."
    yield '"rows" is one batch with `fl.route`, bound once; a training step is `fl.population_step` with AdamW, and its'
    yield 'base is the model\'s own forward and backward pass over the same rows. "PEFT mixed" is its `adapter_names`,'
    yield '"one by one" a training step for each member, "merged models" a copy of the model for each.\n'
    yield HOW
    yield from facts(result)
    yield "\n## Numbers to reach\n"
    yield from table_of_goals(goals(result))
    yield "\n![Tokens per second by number of adapters](benchmarks-many.png)\n"
    for work, title in TITLES.items():
        yield from times(result, work, title)
    yield from compiled(result)
    yield from beside_jax(result)
    yield from memory(result)
    yield "\n## When it is faster\n"
    yield "Each row needs the base model's own arithmetic, whatever its adapter. With few tokens for each adapter, "
    yield "the gain is that the base weights are read once instead of once for each adapter. With many tokens for each"
    yield "adapter, the arithmetic dominates: mixing adapters then saves little more than the overhead of the calls."


def times(result: Result, work: str, title: str) -> Iterator[str]:
    some = result.named(f"{work} ")
    if not some:
        return
    yield f"\n## {title}\n"
    names = list(dict.fromkeys(name for row in some.values() for name in row.seconds))
    shown = {"change": "change, LoRA", "ranks": ""}.get(work, "rows")
    yield from head("size", *names, *([f"{shown} / base"] if shown else []))
    for size, row in some.items():
        cells = [ms(row.median(name)) if name in row.seconds else "" for name in names]
        ratio = row.ratio(shown, "base")
        yield table_row(size, *cells, *([f"{ratio.median:.2f}" if ratio else ""] if shown else []))


def compiled(result: Result) -> Iterator[str]:
    for size, row in result.named("compiled ").items():
        yield "\n## torch.compile\n"
        yield "`torch.compile(population_step, fullgraph=True)`, with the optimizer in it, on two layers of the model."
        yield "The first call traces and compiles.\n"
        yield from head("train step", "eager (ms)", "compiled (ms)", "compiled / eager", "first call (s)")
        both = "rows", "rows, compiled"
        ratio = row.ratio("rows, compiled", "rows")
        yield table_row(size, *(ms(row.median(name)) for name in both), ratio, f"{row.first_call[both[1]]:.0f}")


def beside_jax(result: Result) -> Iterator[str]:
    some = {size: row for size, row in result.named("train ").items() if "JAX" in row.seconds}
    if some:
        yield "\n## Beside JAX\n"
        yield "The same Llama written in JAX, with the same weights and losses: `jit(vmap(value_and_grad))` and optax's"
        yield "AdamW. What it takes to compile is not counted.\n"
        yield from head("train step", "rows / JAX", "JAX / base")
        for size, row in some.items():
            yield table_row(size, row.ratio("rows", "JAX"), row.ratio("JAX", "base"))


def memory(result: Result) -> Iterator[str]:
    peaks = {members(name): row.peaks["rows"] for name, row in result.rows.items()
             if name.startswith("train ") and name.endswith(" × 1 × 16") and "rows" in row.peaks}  # fmt: skip
    if len(peaks) < 2 or "own_bytes" not in result.about:
        return
    own = result.about["own_bytes"]
    (first, alone), *others = sorted(peaks.items())
    yield "\n## Memory of a train step\n"
    yield "Peak memory of the process, with one row of 16 tokens for each member. A member itself needs"
    yield f"{own / 2**20:.1f} MiB: its weights, its optimizer state, and the activations of its row. A step is"
    yield "a pure function: while it computes the new weights and state, the old ones are still in memory.\n"
    yield from head("members", "MiB", "MiB for each further member", "relative to one member plus own needs")
    yield table_row(first, mib(alone), "", "")
    for n, size in others:
        each, needed = (size - alone) / (n - first), alone + (n - first) * own
        yield table_row(n, mib(size), f"{each / 2**20:.1f}", f"{size / needed:.2f}")


# --- the picture -----------------------------------------------------------------------------------------------


def draw(result: Result) -> Any:
    """Tokens per second over the number of adapters, a panel for each kind of work."""
    from matplotlib.figure import Figure

    groups = [("forward", 1), ("forward", 16), ("train", 16)]
    figure, lines = Figure((4.5 * len(groups), 4.5), layout="constrained"), dict[str, Any]()
    for axis, (work, tokens) in zip(figure.subplots(1, len(groups)), groups, strict=True):
        some = {members(f"{work} {size}"): row for size, row in result.named(f"{work} ").items()
                if size.endswith(f" × 1 × {tokens}")}  # fmt: skip
        for name in dict.fromkeys(name for row in some.values() for name in row.seconds):
            points = {n: n * tokens / row.median(name) for n, row in some.items() if name in row.seconds}
            colour = lines[name].get_color() if name in lines else f"C{len(lines) % 10}"
            (lines[name],) = axis.plot([*points], [*points.values()], color=colour, marker="o", markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="adapters", ylabel="tokens per second")
        axis.set_title(f"{work}, 1 × {tokens} tokens each", fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=5, fontsize=8)
    return figure
