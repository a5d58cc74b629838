"""The loop: the losses and weights of transformers' Trainer, the settings one by one, what stops it."""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import snapshot
from tiny_runs import Rows, byte_base, close, data, fresh, llama_base, lora_config, rows, run, same, settings
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments, get_scheduler

import funclora as fl
from funclora._apps.train.base import Base
from funclora._apps.train.batches import Batches, collate
from funclora._apps.train.checkpoint import CHECKPOINTS
from funclora._apps.train.loop import PATIENCE
from funclora._apps.train.optimizer import Vectors, schedule, total_steps, warmup_steps
from funclora._apps.train.settings import CAUSAL, Settings
from funclora.errors import ConfigError, NonFiniteError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- transformers' Trainer -------------------------------------------------------------------------------------


class InOurOrder(Trainer):
    """A Trainer that reads the rows of each epoch in the order that `Batches` has."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return OurOrder(self.batches)


class OurOrder(torch.utils.data.Sampler[int]):
    def __init__(self, batches: Batches) -> None:
        self.batches, self.epoch = batches, 0

    def __len__(self) -> int:
        return len(self.batches._examples)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.batches.steps_per_epoch
        self.epoch += 1
        for k in range(first, first + self.batches.steps_per_epoch):
            yield from (int(source.split(":")[1]) - 1 for source in self.batches.sources(k))


def trainers_run(
    base: Base, settings: Settings, rows: Rows, folder: Path, arguments: Mapping[str, Any] = {}, **options: Any
) -> tuple[Any, Any]:
    """History and adapters of PEFT's model in transformers' Trainer, from where the loop starts."""
    adapters = fresh(base, settings, **options)
    fl.save_peft(folder / "begin", adapters, lora_config(settings, **options))
    model = copy.deepcopy(base.model)
    model = peft.PeftModel.from_pretrained(model, str(folder / "begin"), is_trainable=True)
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=settings.batch, max_steps=settings.steps,
        gradient_accumulation_steps=settings.accumulation, learning_rate=settings.lr,
        warmup_steps=settings.warmup, weight_decay=settings.weight_decay, max_grad_norm=settings.clip, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        remove_unused_columns=False, **{"lr_scheduler_type": "cosine"} | {**arguments},
    )  # fmt: skip
    trainer = InOurOrder(
        model=model, args=args, train_dataset=rows.train,
        data_collator=lambda examples: collate(examples, pad=0, task=CAUSAL),
    )  # fmt: skip
    trainer.batches = Batches(
        rows.train, batch=settings.batch, accumulation=settings.accumulation, seed=settings.seed, pad=0, task=CAUSAL
    )
    trainer.train()
    model.save_pretrained(str(folder / "end"))
    return trainer.state.log_history, fl.load_peft(folder / "end", base.model)[0]


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (
            {"optimizer": "adafactor", "schedule": "cosine-restarts", "cycles": 3},
            {
                "optim": "adafactor",
                "lr_scheduler_type": "cosine_with_restarts",
                "lr_scheduler_kwargs": {"num_cycles": 3},
            },
        ),
        (
            {"optimizer": "sgd", "momentum": 0.9, "schedule": "polynomial", "power": 1.5, "lr_end": 0.1},
            {
                "optim": "sgd",
                "optim_args": "momentum=0.9",
                "lr_scheduler_type": "polynomial",
                "lr_scheduler_kwargs": {"power": 1.5, "lr_end": 5e-4},
            },
        ),
        (
            {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "schedule": "wsd", "decay": 4},
            {
                "adam_beta1": 0.8,
                "adam_beta2": 0.95,
                "adam_epsilon": 1e-6,
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 4},
            },
        ),
    ],
    ids=["adafactor, restarts", "sgd, polynomial", "adamw, wsd"],
)
def test_other_optimizers_and_schedules_are_the_trainers(options: Any, arguments: Any, tmp_path: Path) -> None:
    base, whole = llama_base(torch.float64), data(17)
    given = settings(tmp_path / "run", steps=20, lr=5e-3, warmup=3, weight_decay=0.2, dropout=0.0, **options)
    history, want = trainers_run(base, given, whole, tmp_path, arguments, init_lora_weights=False)
    outcome, _ = run(given, base, whole, fresh(base, given, init_lora_weights=False))
    lines = [line for line in metrics(given.out) if "loss" in line]
    logged = [entry for entry in history if "loss" in entry]
    for ours, theirs in (("loss", "loss"), ("lr", "learning_rate")):
        got, expected = torch.tensor([x[ours] for x in lines]), torch.tensor([x[theirs] for x in logged])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    close(outcome.adapters, want, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {}), ("dora", {}), ("lora", {"modules_to_save": ["lm_head", "model.norm"]})],
    ids=["lora", "dora", "whole modules"],
)
def test_twenty_steps_are_those_of_peft_in_transformers_trainer(
    method: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    base, whole = llama_base(dtype), data(17)
    options = options | {"init_lora_weights": False}
    given = settings(
        tmp_path / "run", method=method, steps=20, lr=5e-3, warmup=3, clip=0.5, weight_decay=0.2, dropout=0.0
    )
    history, want = trainers_run(base, given, whole, tmp_path, **options)
    check = snapshot(base.model, base.params)
    outcome, _ = run(given, base, whole, fresh(base, given, **options))
    check()
    lines = [line for line in metrics(given.out) if "loss" in line]
    logged = [entry for entry in history if "loss" in entry]
    assert len(lines) == len(logged) == outcome.step == 20
    tolerance = 1e-5 if dtype == torch.float64 else 2e-4
    assert max(entry["grad_norm"] for entry in logged) > given.clip, "clipping acts"
    for key in ("loss", "grad_norm"):
        got, expected = ([entry[key] for entry in run] for run in (lines, logged))
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    rates = [line["lr"] for line in lines]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([entry["learning_rate"] for entry in logged]))
    close(outcome.adapters, want, 20 * tolerance)
    for name, rule in fresh(base, given, **options).items():
        for leaf in rule.leaf_names:
            assert not torch.equal(getattr(rule, leaf), getattr(outcome.adapters[name], leaf)), "trained"


@given(
    total=st.integers(1, 40), warmup=st.one_of(st.floats(0, 0.9), st.integers(1, 39).map(float)),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
)  # fmt: skip
def test_rates_are_those_of_transformers(total: int, warmup: float, kind: str) -> None:
    given = Settings(lr=3e-3, warmup=warmup, schedule=kind)
    if warmup >= total and warmup >= 1:
        with pytest.raises(ConfigError, match=r"warmup: expected less than the \d+ steps"):
            warmup_steps(given, total)
        return
    steps = warmup_steps(given, total)
    assert steps < total, "some step is at the full rate"
    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=given.lr)
    oracle = get_scheduler(name, optimizer, num_warmup_steps=steps, num_training_steps=total)
    rate, want = schedule(given, total), []
    for _ in range(total):
        want.append(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()
    got = rate(torch.arange(total))
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-8)


def test_a_warmup_is_a_share_or_whole_steps() -> None:
    with pytest.raises(ConfigError, match=r"warmup: expected a share below 1 or a whole number of steps, got 1.5"):
        warmup_steps(Settings(warmup=1.5), 10)


@given(st.data())
def test_vectors_hold_every_leaf_once(draw: Any) -> None:
    names = draw.draw(st.lists(st.sampled_from("uvwxyz"), min_size=1, unique=True))
    kinds = draw.draw(st.lists(st.sampled_from(["lora", "dora", "full", "bias", "half"]), min_size=len(names)))
    make: dict[str, Any] = {
        "lora": lambda: fl.LoRA(torch.randn(2, 3), torch.randn(4, 2)),
        "dora": lambda: fl.DoRA(torch.randn(2, 3), torch.randn(4, 2), torch.randn(4)),
        "full": lambda: fl.Full(torch.randn(4, 3)),
        "bias": lambda: fl.Full(torch.randn(4)),
        "half": lambda: fl.LoRA(torch.randn(2, 3).bfloat16(), torch.randn(4, 2).bfloat16()),
    }
    adapters = {name: make[kind]() for name, kind in zip(names, kinds, strict=False)}
    vectors = Vectors(adapters)
    values = vectors.of(adapters)
    same(vectors.tree(values), adapters)
    undecayed = sum(v.numel() for dtypes in [values.get("undecayed", {})] for d in dtypes.values() for v in d.values())
    assert undecayed == 4 * sum(isinstance(r, fl.Full) and r.value.dim() == 1 for r in adapters.values())
    b = sum(d["b"].numel() for dtypes in values.values() for d in dtypes.values() if "b" in d)
    assert b == 8 * sum(not isinstance(r, fl.Full) for r in adapters.values())


# --- settings --------------------------------------------------------------------------------------------------


def test_accumulation_is_exact(tmp_path: Path) -> None:
    """Four rows at once or in micro-batches of one, three or four: the same sums."""
    base, whole = llama_base(torch.float64), data(17)
    ends = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        given = settings(tmp_path / f"{batch}", batch=batch, accumulation=accumulation, dropout=0.0)
        ends.append(run(given, base, whole)[0])
    for other in ends[1:]:
        assert [step for step, _ in other.losses["train"]] == list(range(1, 9))
        torch.testing.assert_close(*(torch.tensor(end.losses["train"]) for end in (ends[0], other)), rtol=1e-6, atol=0)
        close(other.adapters, ends[0].adapters, 1e-5)


def test_lora_plus_is_a_higher_rate_for_b(tmp_path: Path) -> None:
    """One step of Adam moves every number by its rate."""
    base = llama_base(torch.float64)
    for ratio in (1.0, 4.0):
        given = settings(tmp_path / f"{ratio}", steps=1, warmup=0, lora_plus=ratio, clip=0, dropout=0, lr=1e-3)
        before: Any = fresh(base, given, init_lora_weights=False)
        after = run(given, base, data(17), before)[0].adapters
        for name, rule in before.items():
            assert (after[name].a - rule.a).abs().max().item() == pytest.approx(1e-3, rel=1e-3)
            assert (after[name].b - rule.b).abs().max().item() == pytest.approx(ratio * 1e-3, rel=1e-3)


def test_checkpointing_changes_no_bit_and_runs_every_layer_twice(tmp_path: Path) -> None:
    base: Any = llama_base()
    calls: list[int] = []
    base.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, _ = run(settings(tmp_path / "plain", steps=2, warmup=0), base, data(17))
    once = len(calls)
    check = snapshot(base.model, base.params)
    saved, _ = run(settings(tmp_path / "saved", steps=2, warmup=0, checkpointing=True), base, data(17))
    check()
    same(saved.adapters, plain.adapters)
    evaluations = 3  # of five rows by two
    assert len(calls) - once - evaluations == 2 * (once - evaluations)
    assert not base.model.is_gradient_checkpointing
    with pytest.raises(UnsupportedError, match=r"checkpointing: tiny \(ByteLM\) cannot recompute"):
        run(settings(tmp_path / "bytes", checkpointing=True))
    with pytest.raises(ConfigError, match="checkpointing and compile"):
        run(settings(tmp_path / "both", checkpointing=True, compile=True), base, data(17))


def test_bf16_is_autocast(tmp_path: Path) -> None:
    base: Any = llama_base()
    seen = set()
    base.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, _i, y: seen.add(y.dtype))
    half, _ = run(settings(tmp_path / "half", bf16=True, dropout=0.0), base, data(17))
    assert seen == {torch.bfloat16}
    plain, _ = run(settings(tmp_path / "plain", dropout=0.0), base, data(17))
    got, want = (torch.tensor(end.losses["train"]) for end in (half, plain))
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    assert not torch.equal(got, want)
    assert all(leaf.dtype == torch.float32 for rule in half.adapters.values() for leaf in (rule.a, rule.b))


@pytest.mark.slow
def test_compiled_steps_are_those_of_eager_mode_in_one_graph_for_all_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    whole = data(n=12)  # no micro-batch of one row, which would be a graph of its own
    options: dict[str, Any] = {"method": "dora", "rank": 3}
    plain, _ = run(settings(tmp_path / "plain", **options), rows=whole)
    assert counter.frame_count == 0
    compiled, _ = run(settings(tmp_path / "compiled", compile=True, **options), rows=whole)
    assert counter.frame_count == 1
    got, want = (torch.tensor(end.losses["train"]) for end in (compiled, plain))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    close(compiled.adapters, plain.adapters, 1e-4)
    torch._dynamo.reset()


def test_dropout_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    ends = []
    for name, disturbed in (("a", False), ("b", True)):
        if disturbed:
            torch.rand(7)  # the global generator does not matter, nor is it used
        before = torch.get_rng_state()
        ends.append(run(settings(tmp_path / name))[0])
        assert torch.equal(torch.get_rng_state(), before)
    same(*(end.adapters for end in ends))
    changes: tuple[dict[str, Any], ...] = ({"dropout": 0.0}, {"seed": 1})
    for changed in changes:
        given = settings(tmp_path / next(iter(changed)), **changed)
        other, _ = run(given, adapters=fresh(byte_base(), replace(given, seed=0)))
        assert other.losses != ends[0].losses


def test_each_step_drops_others(tmp_path: Path) -> None:
    """With one example and a rate of almost 0, only dropout makes the losses of steps differ."""
    one = Rows(rows(1, 256), [])
    adapters = fresh(byte_base(), settings(tmp_path, dropout=0.5), init_lora_weights=False)
    outcome, _ = run(settings(tmp_path, steps=4, lr=1e-30, batch=1, accumulation=1), rows=one, adapters=adapters)
    assert len({round(loss, 6) for _, loss in outcome.losses["train"]}) == 4


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 4), (2.5, 10), (0.1, 1)])
def test_epochs(epochs: float, steps: int) -> None:
    assert total_steps(Settings(epochs=epochs), 4) == steps
    assert total_steps(Settings(epochs=epochs, steps=7), 4) == 7


# --- evaluations -----------------------------------------------------------------------------------------------


def loss_of(base: Base, adapters: Any, examples: Any) -> float:
    bound = fl.bind(base.model, base.params, adapters)
    batches = [collate([row], pad=0, task=base.task) for row in examples]
    return sum(base.loss(bound, batch).item() for batch in batches) / sum(map(base.count, batches))


def test_evaluations_are_of_all_validation_rows(tmp_path: Path) -> None:
    base, whole = byte_base(), data()
    given = settings(tmp_path, eval_every=3, sample=("ab", "x"), sample_tokens=4)
    outcome, journal = run(given, base, whole)
    assert [step for step, _ in outcome.losses["validation"]] == [3, 6, 8]
    last = outcome.losses["validation"][-1][1]
    assert last == pytest.approx(loss_of(base, outcome.adapters, whole.validation), rel=1e-5)
    assert outcome.best == min(outcome.losses["validation"], key=lambda pair: pair[1])
    samples = [line for line in metrics(tmp_path) if "samples" in line]
    bound = fl.bind(base.model, base.params, outcome.adapters)
    assert [line["step"] for line in samples] == [3, 6, 8]
    wanted = [{"prompt": p, "continuation": base.generate(bound, p, 4)} for p in ("ab", "x")]
    assert samples[-1]["samples"] == wanted
    assert journal.losses == outcome.losses


def test_patience_ends_with_the_best_adapter(tmp_path: Path) -> None:
    """What is learnt by heart makes the validation loss worse sooner or later."""
    base, whole = byte_base(), data(n=4)
    given = settings(tmp_path, steps=200, lr=5e-2, eval_every=5, patience=2, dropout=0.0, keep=1)
    outcome, journal = run(given, base, whole)
    steps = [step for step, _ in outcome.losses["validation"]]
    assert outcome.stopped == PATIENCE
    assert outcome.best is not None
    assert outcome.best == min(outcome.losses["validation"], key=lambda pair: pair[1])
    assert outcome.step == outcome.best[0] == steps[-3] < steps[-1] < 200
    assert loss_of(base, outcome.adapters, whole.validation) == pytest.approx(outcome.best[1], rel=1e-5)
    assert any("2 evaluations without improvement" in note for note in journal.notes)
    files = sorted(int(file.stem) for file in (tmp_path / CHECKPOINTS).iterdir())
    assert files == [outcome.best[0], steps[-1]], "the last one, and the best"
    again, _ = run(replace(given, resume=True), base, whole)
    same(again.adapters, outcome.adapters)
    assert (again.step, again.stopped, again.losses) == (outcome.step, PATIENCE, outcome.losses)


def test_patience_without_evaluations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"patience=1: it counts evaluations, but there are none"):
        run(settings(tmp_path, patience=1))


def test_evaluations_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval_every=2: there is no data to evaluate on. Give --validation"):
        run(settings(tmp_path, eval_every=2), rows=data(validation=0))
    run(settings(tmp_path, eval_every=2, sample=("a",), sample_tokens=1), rows=data(validation=0))


def test_lines_are_means_of_the_steps_since_the_last(tmp_path: Path) -> None:
    each, _ = run(settings(tmp_path / "each", steps=7))
    some, _ = run(settings(tmp_path / "some", steps=7, log_every=3))
    losses = [loss for _, loss in each.losses["train"]]
    got = [pytest.approx(sum(losses[i:j]) / (j - i)) for i, j in ((0, 3), (3, 6), (6, 7))]
    assert some.losses["train"] == [(3, got[0]), (6, got[1]), (7, got[2])]


# --- what stops a run ------------------------------------------------------------------------------------------


class Broken(Base):
    """A model whose loss is not finite from a step on."""

    calls = 0
    value = float("nan")

    def loss(self, bound: Any, batch: Any) -> Any:
        type(self).calls += 1
        loss = super().loss(bound, batch)
        if type(self).calls <= 2 * 5:
            return loss
        return loss * self.value if self.value != 0 else torch.sqrt(loss - loss)  # a gradient of inf·0


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "the loss is nan"), (0, "the norm of the gradient is")])
def test_what_is_not_finite_stops_with_step_examples_and_checkpoint(value: float, said: str, tmp_path: Path) -> None:
    base, whole = byte_base(), data()
    broken = Broken(**vars(base))
    Broken.calls, Broken.value = 0, value
    given = settings(tmp_path, save_every=2, log_every=7)
    with pytest.raises(NonFiniteError, match=f"step 6 of 8: {said}") as caught:
        run(given, broken, whole)
    message = str(caught.value)
    sources = Batches(whole.train, batch=2, accumulation=2, seed=0, pad=0, task=CAUSAL).sources(5)
    assert ", ".join(sources) in message
    assert str(tmp_path / CHECKPOINTS / "00000004.safetensors") in message
    Broken.calls = -1000
    resumed, _ = run(replace(given, resume=True), broken, whole)
    whole_run, _ = run(replace(given, out=tmp_path / "whole"), base, whole)
    same(resumed.adapters, whole_run.adapters)


def test_a_validation_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    class NoScore(Base):
        def score(self, bound: Any, batch: Any) -> Any:
            return {key: value * float("inf") for key, value in super().score(bound, batch).items()}

    with pytest.raises(NonFiniteError, match=r"step 3 of 8: the validation loss is inf; there is no checkpoint yet"):
        run(settings(tmp_path, eval_every=3), NoScore(**vars(byte_base())))


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    blank = Rows([replace(row, labels=[-100] * len(row.ids)) for row in rows(3, 9)], [])
    with pytest.raises(ConfigError, match=r"data: no position of step 1 has a label. Its examples: train.jsonl:\d"):
        run(settings(tmp_path), rows=blank)
    with pytest.raises(ConfigError, match="data: there are no examples to train on"):
        run(settings(tmp_path / "empty"), rows=Rows([], []))


class Interrupted(Base):
    """A model in whose loss somebody presses Ctrl-C."""

    calls = 0
    at = 0

    def press(self) -> None:
        type(self).calls += 1
        if type(self).calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def loss(self, bound: Any, batch: Any) -> Any:
        self.press()
        return super().loss(bound, batch)

    def score(self, bound: Any, batch: Any) -> Any:
        self.press()
        return super().score(bound, batch)


@pytest.mark.parametrize(
    ("at", "step"), [(1, 1), (6, 3), (7, 4), (9, 4), (18, 8)],
    ids=["first step", "second half of a step", "before an evaluation", "in an evaluation", "last step"],
)  # fmt: skip
def test_ctrl_c_finishes_the_step_and_leaves_a_resumable_state(at: int, step: int, tmp_path: Path) -> None:
    base = byte_base()
    plain = settings(tmp_path / "whole", eval_every=4)
    whole, _ = run(plain, base)
    Interrupted.calls, Interrupted.at = 0, at
    handler = signal.getsignal(signal.SIGINT)
    given = replace(plain, out=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt, match=rf"Step {step} of 8 is done and saved. The same command with --resume"):
        run(given, Interrupted(**vars(base)))
    assert signal.getsignal(signal.SIGINT) is handler
    assert (given.out / CHECKPOINTS / f"{step:08d}.safetensors").exists()
    again, _ = run(replace(given, resume=True), base)
    same(again.adapters, whole.adapters)
    assert again.losses == whole.losses
    assert again.best == whole.best


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    class Hasty(Base):
        def loss(self, bound: Any, batch: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().loss(bound, batch)

    with pytest.raises(KeyboardInterrupt, match="continues from the last checkpoint"):
        run(settings(tmp_path), Hasty(**vars(byte_base())))
    assert not (tmp_path / CHECKPOINTS).exists()
