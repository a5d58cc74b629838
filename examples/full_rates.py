"""The learning rate of full fine-tuning, on the data and batches of a search.

Trains all linear weights of the demo's base in full, once for each rate, all of them together as one population. The
steps, rows and schedule are those of `funclora sweep` with the same options, so that the best rate can be compared with
LoRA's.

    python examples/full_rates.py --steps 60 --batch 4 --context 64
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import funclora as fl
from funclora._apps.sweep.space import Member
from funclora._apps.sweep.task import load_task
from funclora._apps.train.settings import Settings
from funclora._apps.train.setup import demo_data
from funclora.optim import per_member

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def main(argv: list[str] | None = None) -> dict[float, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data=(demo_data(Path(folder), "asyncio"),),
            context=options.context,
            batch=options.batch,
            steps=options.steps,
            warmup=float(min(4, options.steps - 1)),
        )
        task = load_task(settings, Path(folder), rows=options.rows)
    base = task.base
    names = [*task.start(Member(0, 1e-3, 1, 1.0, "all-linear", "lora", "true", 0)).adapters]
    optimizer = per_member(task.optimizer(), lr=options.rates)
    full: dict[str, fl.Rule] = {name: fl.Full(base.params[name].clone()) for name in names}
    members = fl.stack([full] * len(options.rates))
    state = optimizer.init(members)
    step = fl.population_step(task.model, task.loss, optimizer)
    for k in range(options.steps):
        members, state, _ = step(base.params, members, state, task.batch([settings.seed] * len(options.rates), k))
    before, *after = [score.values["loss"] for score in task.scores([{}, *members])]
    print(f"{len(names)} weights in full, {options.steps} steps; the base has a held-out loss of {before:.4f}")
    for rate, loss in zip(options.rates, after, strict=True):
        print(f"{rate:8.0e}  {loss:.4f}{'  best' if loss == min(after) else ''}")
    return dict(zip(options.rates, after, strict=True))


if __name__ == "__main__":
    main()
