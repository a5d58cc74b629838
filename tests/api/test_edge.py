"""Arguments that are of the wrong type: an error of funclora that names them, never a raw one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funclora as fl
from funclora.errors import ArgumentError, FuncloraError

MODEL = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
PARAMS = fl.base_params(MODEL)
CONFIG = fl.LoraConfig(r=2, target_modules=["0"])
ADAPTERS = fl.init(MODEL, dataclasses.replace(CONFIG, init_lora_weights="gaussian"))
STACK = fl.stack([ADAPTERS, ADAPTERS])
PISSA = CONFIG.replace(init_lora_weights="pissa")
EVA = CONFIG.replace(init_lora_weights="eva")
X = torch.ones(5, 4)
SGD = fl.optim.sgd(0.1)
EACH = fl.optim.per_member(fl.optim.sgd, lr=[0.1, 0.2])

anything: Any = fl  # calls that no type checker would let pass


def loss(bound: Any, x: Any) -> Any:
    return bound(x).square().mean()


def metric(bound: Any, x: Any) -> Any:
    return bound(x)[:, 0]


def trained(model: Any, loss_fn: Any, optimizer: Any, params: Any, adapters: Any, state: Any, seed: Any) -> Any:
    return fl.train_step(model, loss_fn, optimizer)(params, adapters, state, X, seed=seed)


def trained_together(
    model: Any, loss_fn: Any, optimizer: Any, params: Any, stack: Any, state: Any, batch: Any, seeds: Any
) -> Any:
    return fl.population_step(model, loss_fn, optimizer)(params, stack, state, batch, seeds=seeds)


# The misuses that people report, each with what the error says about it.
ORDER = "The order of the arguments is model, params, adapters"
REPORTED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: anything.apply(MODEL, PARAMS, STACK, X),
        r"adapters: expected one adapter.* got a Stack\. .*stack\[i\].*route",
    ),
    (lambda: anything.merge(PARAMS, STACK), r"adapters: .* got a Stack\. Take one member, stack\[i\].* unstack"),
    (lambda: anything.summary(PARAMS, STACK), r"adapters: .* got a Stack\. .* route, vmap or unstack"),
    (lambda: anything.trace_targets(MODEL, PARAMS, STACK, X), r"adapters: .* got a Stack"),
    (lambda: anything.as_module(MODEL, PARAMS, STACK), r"adapters: .* got a Stack\. Take one member, stack\[i\]"),
    (lambda: anything.apply(MODEL, PARAMS, None, X), r"adapters: .* got None\. For the base model, pass {}"),
    (lambda: anything.bind(MODEL, None, {}), r"params: .* got None\. Take base_params\(model\)"),
    (lambda: anything.bind(MODEL, MODEL.parameters(), {}), r"params: .* got a generator\. Take base_params\(model\)"),
    (lambda: anything.bind(MODEL, MODEL, {}), r"params: .* got a Sequential\. Take base_params\(model\)"),
    (lambda: anything.apply(MODEL, ADAPTERS, PARAMS, X), rf"params\['0.weight'\]: .* got a LoRA\. .*swapped\? {ORDER}"),
    (lambda: anything.merge(ADAPTERS, PARAMS), r"params\['0.weight'\]: expected a tensor, got a LoRA\. .*swapped"),
    (
        lambda: anything.apply(MODEL, PARAMS, PARAMS, X),
        r"adapters\['0.weight'\]: expected a rule.* got a tensor .*swapped",
    ),
    (
        lambda: anything.apply(MODEL, PARAMS, {"0.weight": (X, X)}, X),
        r"adapters\['0.weight'\]: .* got a tuple of tensors",
    ),
    (
        lambda: anything.apply(MODEL, PARAMS, (ADAPTERS, CONFIG), X),
        r"adapters: .* got a tuple .*load_peft returns a pair",
    ),
    (lambda: anything.apply(MODEL, PARAMS, CONFIG, X), r"adapters: .* got a LoraConfig\. init and load_peft make one"),
    (
        lambda: anything.apply(PARAMS, ADAPTERS, X),
        rf"model: .* got a dict of tensors\. Was the model left out\? {ORDER}",
    ),
    (lambda: anything.apply(nn.Linear, PARAMS, {}, X), r"model: .* got the class Linear\. Make one: call the class"),
    (lambda: anything.base_params(PARAMS), r"model: expected a model \(an nn.Module\), got a dict of tensors"),
    (
        lambda: anything.value_and_grad(loss)(PARAMS, ADAPTERS, X),
        r"model: .* got a dict of tensors\. Was the model left",
    ),
    (lambda: anything.per_example_value_and_grad(loss)(PARAMS, ADAPTERS, X, X), "model: .* Was the model left out"),
    (lambda: anything.value_and_grad(loss)(MODEL, PARAMS, STACK, X), r"adapters: .* got a Stack"),
    (
        lambda: trained(MODEL, loss, SGD, PARAMS, [ADAPTERS], None, None),
        r"adapters: .* got a list of dict\. For several",
    ),
    (lambda: trained(PARAMS, loss, SGD, PARAMS, ADAPTERS, None, None), r"model: .* got a dict of tensors"),
    (
        lambda: trained(MODEL, X, SGD, PARAMS, ADAPTERS, None, None),
        r"loss_fn: .* loss_fn\(bound, batch\), got a tensor",
    ),
    (
        lambda: trained(MODEL, loss, torch.optim.SGD(MODEL.parameters(), lr=0.1), PARAMS, ADAPTERS, None, None),
        r"optimizer: expected a pair .* got a SGD\. Optimizers of torch.optim write to their own",
    ),
    (lambda: trained(MODEL, loss, fl.optim.adamw, PARAMS, ADAPTERS, None, None), r"optimizer: .* Call the factory"),
    (lambda: trained(MODEL, loss, SGD, PARAMS, ADAPTERS, None, None), r"state: .* got None\. It is of type SgdState"),
    (lambda: trained(MODEL, loss, SGD, PARAMS, ADAPTERS, SGD.init(ADAPTERS), "0"), "seed: expected an int, got '0'"),
    (
        lambda: trained_together(MODEL, loss, EACH, PARAMS, ADAPTERS, None, X, None),
        r"stack: expected a stack of adapters, got a dict of LoRA\. Make one: stack\(\[adapters\]\)",
    ),
    (lambda: trained_together(MODEL, loss, EACH, PARAMS, [ADAPTERS], None, X, None), r"stack: .* stack\(adapters\)"),
    (
        lambda: trained_together(MODEL, loss, EACH, PARAMS, STACK, STACK, torch.ones(2, 5, 4), None),
        r"state: expected what per_member\(...\).init, or update before, returned, got a Stack",
    ),
    (lambda: anything.evaluate(MODEL, PARAMS, ADAPTERS, [X], metric), r"stack: .* Make one: stack\(\[adapters\]\)"),
    (
        lambda: anything.evaluate(MODEL, PARAMS, STACK, X, metric),
        r"data: expected batches .* Put a single batch into a",
    ),
    (lambda: anything.vmap(loss)(ADAPTERS, X), r"stack: .* got a dict of LoRA\. Make one: stack\(\[adapters\]\)"),
    (
        lambda: anything.vmap(STACK, X),
        r"function: expected a function, called as function\(adapters, \*args\), got a St",
    ),
    (lambda: anything.route(ADAPTERS, [0]), r"stack: expected a stack of adapters, got a dict of LoRA"),
    (lambda: anything.unstack(ADAPTERS), r"stack: expected a stack of adapters, got a dict of LoRA"),
    (lambda: anything.stack(ADAPTERS), r"members: .* One adapter becomes a stack of one: stack\(\[adapters\]\)"),
    (
        lambda: anything.stack([ADAPTERS, CONFIG]),
        r"members\[1\]: the member itself: expected a tensor, got a LoraConfig",
    ),
    (
        lambda: anything.init(MODEL, {"r": 2}),
        r"config: expected a LoraConfig, got a dict of int\. .*LoraConfig\(\*\*fiel",
    ),
    (lambda: anything.init(MODEL, "all-linear"), r"config: .*of its fields: LoraConfig\(target_modules='all-linear'\)"),
    (lambda: anything.init(PARAMS, CONFIG), "model: expected a model .* got a dict of tensors"),
    (
        lambda: anything.init(MODEL, CONFIG, generator=0),
        r"generator: .* got 0\. .*torch.Generator\(\).manual_seed\(seed\)",
    ),
    (lambda: anything.init(MODEL, CONFIG, dtype="bfloat16"), "dtype: expected a torch.dtype or None, got 'bfloat16'"),
    (lambda: anything.decompose(MODEL, {"r": 2}), "config: expected a LoraConfig"),
    (lambda: anything.decompose(MODEL, PISSA, params=MODEL), r"params: .* Take base_params\(model\)"),
    (lambda: anything.init_eva(MODEL, EVA, X), "batches: expected batches"),
    (lambda: anything.init_eva(MODEL, [X], EVA), "config: expected a LoraConfig, got a list of tensors"),
    (lambda: anything.relative_to_original(PISSA, ADAPTERS, ADAPTERS), "adapters: .* got a LoraConfig"),
    (lambda: anything.quantize(MODEL, ["0"]), r"params: .* got a Sequential\. Take base_params\(model\)"),
    (lambda: anything.quantize(PARAMS, 0), "targets: expected names of parameters or modules.* got 0"),
    (lambda: anything.dequantize(ADAPTERS), r"params\['0.weight'\]: expected a tensor, got a LoRA"),
    (lambda: anything.save_peft(ADAPTERS, "folder", CONFIG), "path: .* got a dict .* is path, adapters, config"),
    (lambda: anything.save_peft("folder", CONFIG, ADAPTERS), "adapters: expected one adapter.* got a LoraConfig"),
    (lambda: anything.save_peft("folder", STACK, CONFIG), r"adapters: .* got a Stack\. Take one member"),
    (lambda: anything.save_peft("folder", ADAPTERS, {"r": 2}), "config: expected a LoraConfig, got a dict of int"),
    (lambda: anything.load_peft(MODEL, "folder"), "path: .* got a Sequential.* is path, model"),
    (lambda: anything.load_peft("folder", PARAMS), "model: expected a model"),
    (lambda: anything.save_gguf(ADAPTERS, "file", MODEL), "path: .* got a dict .* is path, adapters, model"),
    (lambda: anything.save_gguf("file", STACK, MODEL), "adapters: .* got a Stack"),
    (lambda: anything.load_gguf(MODEL, "file"), "path: .* got a Sequential.* is path, model"),
    (lambda: anything.combine_peft("folder", "out"), "paths: expected a list of paths, got 'folder'"),
    (lambda: anything.combine_peft(["a", MODEL], "out"), r"paths\[1\]: expected a path"),
    (lambda: anything.merge_checkpoint(MODEL, "adapter", "out"), "base_dir: expected a path .* got a Sequential"),
    (lambda: anything.merge_checkpoint("base", ADAPTERS, "out"), "adapter_dirs: expected a list of paths, got a dict"),
    (lambda: anything.extract_adapter("base", MODEL, "out", r=1), "tuned_dir: expected a path .* got a Sequential"),
    (lambda: anything.AdapterCache("folder", MODEL, 1), "model: expected a model .* got 'folder'"),
    (lambda: anything.algebra.scale(STACK, 2.0), r"adapters: .* got a Stack\. Take one member, stack\[i\]"),
    (lambda: anything.algebra.scale(ADAPTERS, 1.0, params=MODEL), r"params: .* got a Sequential"),
    (lambda: anything.algebra.add(STACK), r"adapters: expected a list .* got a Stack\. .*list\(stack\)"),
    (lambda: anything.algebra.combine(ADAPTERS), r"adapters: expected a list .* Put a single adapter into a list: \[a"),
    (lambda: anything.algebra.ties([ADAPTERS, STACK], density=0.5), r"adapters\[1\]: .* got a Stack"),
    (lambda: anything.algebra.task_arithmetic([ADAPTERS], 2.0), "weights: expected a list of numbers, got 2.0"),
    (lambda: anything.algebra.dare([ADAPTERS], density=0.5, generator=0), "generator: expected a torch.Generator"),
    (lambda: anything.analysis.spectra(STACK), r"tuned: expected an adapter .* got a Stack\. .*stack\[i\]"),
    (
        lambda: anything.analysis.spectra(ADAPTERS, params=ADAPTERS),
        r"params\['0.weight'\]: expected a tensor, got a LoRA",
    ),
    (lambda: anything.analysis.spectra(ADAPTERS, model=PARAMS), "model: expected a model"),
    (lambda: anything.analysis.magnitude_direction(ADAPTERS, params=None), r"params: .* got None\. Take base_params"),
    (lambda: anything.analysis.compare(ADAPTERS, CONFIG), "second: expected an adapter .* got a LoraConfig"),
    (lambda: anything.analysis.subspace_similarity(None, ADAPTERS), "first: expected an adapter .* got None"),
    (
        lambda: anything.analysis.effective_rank([1.0]),
        r"singular_values: expected a floating-point tensor \[\*, k\], got",
    ),
    (lambda: anything.analysis.phi(X, 3), r"second: expected a floating-point tensor \[\*lead, dim, n\], got 3"),
    (lambda: anything.optim.per_member(0.1, lr=[0.1]), "build: expected a function"),
    (lambda: EACH.init([ADAPTERS, ADAPTERS]), r"members: expected a stack of adapters, got a list of dict"),
    (lambda: anything.optim.lora_plus(0.1, base=SGD), r"base: expected a function, called as base\(lr, \*\*kwargs\)"),
    (lambda: anything.optim.global_norm({"w": [1.0]}), r"tree at \('w', 0\): expected a tree of tensors, got 1.0"),
    (lambda: anything.optim.apply_updates(CONFIG, CONFIG), "params: expected a tree of tensors, got a LoraConfig"),
    (lambda: SGD.update(ADAPTERS, None), "state: expected what init, or update before, returned, got None"),
]


@pytest.mark.parametrize(("call", "match"), REPORTED, ids=[match[:60] for _, match in REPORTED])
def test_reported_misuse_is_named(call: Callable[[], Any], match: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=match) as caught:
        call()
    assert isinstance(caught.value, TypeError)
    assert not list(tmp_path.iterdir())  # nothing was written


def calls(folder: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A call of every public function that is right, by its name."""
    fl.save_peft(f"{folder}/a", ADAPTERS, CONFIG)
    init = {"model": MODEL, "generator": None, "params": None, "dtype": None}
    bound = {"model": MODEL, "params": PARAMS, "adapters": ADAPTERS}
    several: dict[str, Any] = {"adapters": [ADAPTERS] * 2, "weights": None, "params": None}
    moved, moved_start = fl.decompose(MODEL, PISSA)[1], fl.decompose(MODEL, PISSA)[1]

    def gradient(loss_fn: Any, model: Any, params: Any, adapters: Any) -> Any:
        return fl.value_and_grad(loss_fn)(model, params, adapters, X)

    def gradients(loss_fn: Any, model: Any, params: Any, adapters: Any, batch: Any) -> Any:
        return fl.per_example_value_and_grad(loss_fn)(model, params, adapters, batch)

    def chained(one: Any) -> Any:
        return fl.optim.chain(one)

    def started(params: Any) -> Any:
        return SGD.init(params)

    def by_member(build: Any, members: Any, lr: Any) -> Any:
        return fl.optim.per_member(build, lr=lr).init(members)

    return {
        "apply": (lambda model, params, adapters: fl.apply(model, params, adapters, X), bound),
        "trace_targets": (lambda model, params, adapters: fl.trace_targets(model, params, adapters, X), bound),
        "bind": (fl.bind, bound),
        "merge": (fl.merge, {"params": PARAMS, "adapters": ADAPTERS}),
        "summary": (fl.summary, {"params": PARAMS, "adapters": ADAPTERS}),
        "base_params": (fl.base_params, {"model": MODEL}),
        "init": (fl.init, {**init, "config": CONFIG}),
        "decompose": (fl.decompose, {**init, "config": PISSA, "quantize": None}),
        "init_eva": (fl.init_eva, {**init, "config": EVA, "batches": [torch.randn(32, 4)], "forward": None}),
        "relative_to_original": (
            fl.relative_to_original, {"adapters": moved, "initial": moved_start, "config": PISSA}
        ),
        "route": (fl.route, {"stack": STACK, "ids": [0, 1], "weights": None}),
        "stack": (fl.stack, {"members": [ADAPTERS]}),
        "unstack": (fl.unstack, {"stack": STACK}),
        "vmap": (fl.vmap(lambda a: a["0.weight"].a), {"stack": STACK}),
        "dequantize": (fl.dequantize, {"params": PARAMS, "dtype": None}),
        "evaluate": (
            fl.evaluate, {"model": MODEL, "params": PARAMS, "stack": STACK, "data": [X], "metric": metric}
        ),
        "as_module": (fl.as_module, {**bound, "config": None}),
        "value_and_grad": (gradient, {"loss_fn": loss, **bound}),
        "per_example_value_and_grad": (gradients, {"loss_fn": loss, **bound, "batch": X}),
        "train_step": (
            trained, {"loss_fn": loss, "optimizer": SGD, **bound, "state": SGD.init(ADAPTERS), "seed": None}
        ),
        "population_step": (
            trained_together,
            {"model": MODEL, "loss_fn": loss, "optimizer": EACH, "params": PARAMS, "stack": STACK,
             "state": EACH.init(STACK), "batch": torch.ones(2, 5, 4), "seeds": None},
        ),
        "save_peft": (fl.save_peft, {"path": f"{folder}/b", "adapters": ADAPTERS, "config": CONFIG}),
        "load_peft": (fl.load_peft, {"path": f"{folder}/a", "model": MODEL}),
        "combine_peft": (
            fl.combine_peft,
            {"paths": [f"{folder}/a"] * 2, "out": f"{folder}/c", "weights": None, "model": None, "dtype": torch.float32,
             "generator": None},
        ),
        "AdapterCache": (fl.AdapterCache, {"model": MODEL, "source": folder, "memory": 2**20}),
        "scale": (fl.algebra.scale, {"adapters": ADAPTERS, "factor": 2.0, "params": None}),
        "negate": (fl.algebra.negate, {"adapters": ADAPTERS, "params": None}),
        "add": (fl.algebra.add, {"adapters": [ADAPTERS] * 2, "params": None}),
        "interpolate": (fl.algebra.interpolate, {"start": ADAPTERS, "end": ADAPTERS, "t": 0.5, "params": None}),
        "task_arithmetic": (fl.algebra.task_arithmetic, {**several, "weights": [1, 2]}),
        "recompress": (fl.algebra.recompress, {"adapters": ADAPTERS, "rank": 1}),
        "ties": (fl.algebra.ties, {**several, "density": 0.5, "rank": None}),
        "dare": (fl.algebra.dare, {**several, "density": 0.5, "rank": None, "generator": None}),
        "magnitude_prune": (fl.algebra.magnitude_prune, {**several, "density": 0.5, "rank": None}),
        "combine": (fl.algebra.combine, {**several, "combination_type": "svd", "svd_rank": None}),
        "spectra": (fl.analysis.spectra, {"tuned": ADAPTERS, "params": PARAMS, "model": None}),
        "magnitude_direction": (
            fl.analysis.magnitude_direction, {"tuned": ADAPTERS, "params": PARAMS, "model": None}
        ),
        "compare": (
            fl.analysis.compare, {"first": ADAPTERS, "second": ADAPTERS, "params": PARAMS, "model": None}
        ),
        "subspace_similarity": (
            fl.analysis.subspace_similarity, {"first": ADAPTERS, "second": ADAPTERS, "params": None, "model": None}
        ),
        "effective_rank": (fl.analysis.effective_rank, {"singular_values": torch.ones(3)}),
        "stable_rank": (fl.analysis.stable_rank, {"singular_values": torch.ones(3)}),
        "phi": (fl.analysis.phi, {"first": torch.eye(3), "second": torch.eye(3)}),
        "adamw": (fl.optim.adamw, {"lr": 0.1, "b1": 0.9, "b2": 0.9, "eps": 1e-8, "weight_decay": 0.1}),
        "sgd": (fl.optim.sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1}),
        "lora_plus": (fl.optim.lora_plus, {"lr": 0.1, "ratio": 2.0, "base": fl.optim.sgd}),
        "per_member": (by_member, {"build": fl.optim.sgd, "members": STACK, "lr": [0.1, 0.2]}),
        "chain": (chained, {"one": SGD}),
        "clip_by_global_norm": (fl.optim.clip_by_global_norm, {"max_norm": 1.0}),
        "global_norm": (fl.optim.global_norm, {"tree": ADAPTERS}),
        "apply_updates": (fl.optim.apply_updates, {"params": ADAPTERS, "updates": ADAPTERS}),
        "constant": (fl.optim.constant, {"lr": 0.1}),
        "warmup_linear": (fl.optim.warmup_linear, {"lr": 0.1, "warmup_steps": 1, "total_steps": 5}),
        "warmup_cosine": (fl.optim.warmup_cosine, {"lr": 0.1, "warmup_steps": 1, "total_steps": 5}),
        "warmup_cosine_restarts": (
            fl.optim.warmup_cosine_restarts, {"lr": 0.1, "warmup_steps": 1, "total_steps": 5, "cycles": 2, "end": 0.0}
        ),
        "warmup_polynomial": (
            fl.optim.warmup_polynomial, {"lr": 0.1, "warmup_steps": 1, "total_steps": 5, "power": 2.0}
        ),
        "warmup_stable_decay": (
            fl.optim.warmup_stable_decay, {"lr": 0.1, "warmup_steps": 1, "total_steps": 5, "decay_steps": 2}
        ),
        "adafactor": (
            fl.optim.adafactor, {"lr": 0.1, "decay": 0.8, "clip": 1.0, "eps": 1e-30, "weight_decay": 0.1}
        ),
        "sgd, init": (started, {"params": ADAPTERS}),
        "sgd, update": (SGD.update, {"grads": ADAPTERS, "state": SGD.init(ADAPTERS), "params": ADAPTERS}),
    }  # fmt: skip


# One of each kind of thing that a caller may have at hand.
THINGS: dict[str, Any] = {
    "None": None, "int": 3, "text": "x", "list": [], "dict": {}, "object": object(), "model": MODEL, "params": PARAMS,
    "adapters": ADAPTERS, "list of adapters": [ADAPTERS], "stack": STACK, "config": CONFIG, "tensor": X,
    "class": fl.LoRA, "pair": (ADAPTERS, CONFIG), "fields": {"r": 2}, "dict of None": {"0.weight": None},
    "optimizer": torch.optim.SGD(MODEL.parameters(), lr=0.1), "generator": torch.Generator(), "dtype": torch.int32,
}  # fmt: skip
# Only a call shows whether a function is the right one, and what it raises is its own.
CALLED = ("loss_fn", "metric", "build", "base", "forward", "quantize", "lr")
# What a model is run on is between the caller and the model.
FED = ("batch", "batches", "data")


def wrong(arguments: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name in arguments:
        for label, thing in THINGS.items():
            theirs = name in CALLED if callable(thing) else name in FED and isinstance(thing, (list, tuple, fl.Stack))
            if not theirs:
                yield name, label, thing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_raw_error_for_any_thing_in_any_place(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    raw = []
    count = 0
    for function, (call, arguments) in calls(str(tmp_path)).items():
        call(**arguments)
        for name, label, thing in wrong(arguments):
            count += 1
            try:
                call(**{**arguments, name: thing})
            except FuncloraError:
                continue
            except Exception as error:  # noqa: BLE001 -- which one is the question
                raw.append(f"{function}({name}={label}): {error!r:.200}")
    assert not raw, "\n".join(raw)
    assert count > 2000


def test_every_public_function_is_called(tmp_path: Path) -> None:
    elsewhere = {
        *("quantize", "adamw_8bit"),  # need bitsandbytes
        "strict",  # takes nothing
        *("save_gguf", "load_gguf", "merge_checkpoint", "extract_adapter"),  # read the folders of models
    }
    spaces = (fl, fl.optim, fl.algebra, fl.analysis)
    public = {name for space in spaces for name in space.__all__ if inspect.isfunction(getattr(space, name))}
    assert public == {name for name in calls(str(tmp_path)) if name.isidentifier() and name.islower()} | elsewhere
