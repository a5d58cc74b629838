"""What each process of a launch does: the checks that its command line names. Results are written as JSON.

A check returns numbers or texts, which the tests compare: between processes, and between launches of several sizes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import funclora as fl
from funclora._files import safetensors
from funclora._torch.memory import Peak

warnings.simplefilter("ignore", FutureWarning)  # transformers renames checkpointing, torch its collectives


SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, **options)).train()


def ids(rows: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (rows, 12), generator=torch.Generator().manual_seed(seed))


def loss_fn(bound: Any, batch: Tensor) -> Tensor:
    logits = bound(input_ids=batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def adapters(model: nn.Module, params: Any, seed: int = 1, **options: Any) -> dict[str, Any]:
    options = {"r": 3, "target_modules": ["q_proj", "down_proj", "embed_tokens"], **options}
    made: Any = fl.init(model, fl.LoraConfig(**options), params=params, generator=torch.Generator().manual_seed(seed))
    return optree.tree_map(lambda leaf: leaf + 0.01, made)  # type: ignore[return-value]


def digest(tree: Any) -> str:
    data = b"".join(leaf.detach().contiguous().numpy().tobytes() for leaf in optree.tree_leaves(tree))
    return hashlib.sha256(data).hexdigest()


def difference(first: Any, second: Any) -> float:
    pairs = zip(optree.tree_leaves(first), optree.tree_leaves(second), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def clipped(lr: float = 1e-2) -> Any:
    return fl.optim.chain(fl.optim.clip_by_global_norm(0.5), fl.optim.adamw(lr))


# Data parallel: one process's results for every number of processes that divides its micro-batches.
MICRO_BATCHES = 4


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def training(dora: bool, uneven: bool) -> str:
    model = llama()
    params = fl.base_params(model)
    tree = adapters(model, params, use_dora=dora, lora_dropout=0.1)
    optimizer = clipped()
    own = MICRO_BATCHES // world()

    def weighted(bound: Any, batch: Tensor) -> Tensor:  # the batch's last tokens are padding
        labels = batch[:, 1:].masked_fill(batch[:, 1:] == 0, -100) if uneven else batch[:, 1:]
        return F.cross_entropy(bound(input_ids=batch).logits[:, :-1].flatten(0, 1), labels.flatten())

    count = (lambda batch: (batch[:, 1:] != 0).sum()) if uneven else None
    step = fl.train_step(model, weighted, optimizer, accumulate=own, reduce=fl.distributed.mean(weight=count))
    state, found = optimizer.init(tree), []
    for seed in range(3):
        batch = ids(seed=seed)
        if uneven:
            batch = batch * (torch.arange(12) < torch.arange(3, 11)[:, None])
        tree, state, metrics = step(params, tree, state, batch.chunk(world())[rank()], seed=seed)
        found.append((metrics["loss"].item(), metrics["grad_norm"].item()))
    return f"{found} {digest(tree)} {digest(state)}"


def check_training() -> dict[str, str]:
    return {
        f"dora {dora} uneven {uneven}": training(dora, uneven) for dora in (False, True) for uneven in (False, True)
    }


def check_population() -> str:
    model = llama()
    params = fl.base_params(model)
    members = fl.stack([adapters(model, params, seed, r=2 + seed % 2, lora_dropout=0.1) for seed in range(3)])
    optimizer = fl.optim.per_member(clipped, lr=[1e-2, 3e-3, 1e-3])
    own = MICRO_BATCHES // world()
    step = fl.population_step(
        model, loss_fn, optimizer, accumulate=own, shared=True, reduce=fl.distributed.mean(weight=len)
    )
    state: Any = optimizer.init(members)
    metrics: dict[str, Any] = {}
    for seed in range(2):
        batch = ids(seed=seed).chunk(world())[rank()]
        members, state, metrics = step(params, members, state, batch, seeds=[seed, seed + 10, seed + 20])
    return f"{metrics['loss'].tolist()} {digest(members)}"


def check_weights_of_members() -> float:
    """Each member counts its own labels."""
    model = nn.Linear(4, 2, bias=False)
    params = {"weight": torch.zeros(2, 4)}
    members = fl.stack([{"weight": fl.LoRA(torch.full((r, 4), 0.1 * r), torch.ones(2, r))} for r in (1, 2)])
    counts = torch.tensor([[1.0, 3.0], [5.0, 0.0]])  # of each process, for each member
    batch = torch.arange(32.0).view(2, 2, 2, 4) / 10  # [processes, members, rows, features]
    optimizer = fl.optim.per_member(lambda: fl.optim.sgd(1.0))

    def square(bound: Any, x: Tensor) -> Tensor:
        return bound(x).square().mean()

    step = fl.population_step(model, square, optimizer, reduce=fl.distributed.mean(lambda _: counts[rank()]))
    after, _, metrics = step(params, members, optimizer.init(members), batch[rank()])
    errors = []
    for i in range(2):
        member: Any = members[i]
        found: Any = [fl.value_and_grad(square)(model, params, member, batch[k, i]) for k in range(2)]
        share = counts[:, i] / counts[:, i].sum()
        mean: Any = optree.tree_map(lambda a, b, s=share: s[0] * a + s[1] * b, found[0][1], found[1][1])
        wanted: Any = optree.tree_map(lambda x, g: x - g, member, mean)
        errors.append(difference(after[i], wanted))
        errors.append(abs(metrics["loss"][i].item() - (share[0] * found[0][0] + share[1] * found[1][0]).item()))
    return max(errors)


def check_a_process_without_rows() -> float:
    model = llama()
    params = fl.base_params(model)
    tree = adapters(model, params)
    sgd = fl.optim.sgd(0.1)
    alone, _, _ = fl.train_step(model, loss_fn, sgd)(params, tree, sgd.init(tree), ids(3))
    step = fl.train_step(model, loss_fn, sgd, reduce=fl.distributed.mean(weight=len))
    both, _, _ = step(params, tree, sgd.init(tree), ids(3) if rank() == 0 else None)
    return difference(alone, both)


def check_gradients() -> float:
    model = llama()
    params = fl.base_params(model)
    tree = adapters(model, params)
    found = fl.value_and_grad(loss_fn, reduce=fl.distributed.mean())(model, params, tree, ids().chunk(2)[rank()])
    return difference(found, fl.value_and_grad(loss_fn)(model, params, tree, ids()))


def check_other_adapters_are_refused() -> str:
    model = llama()
    params = fl.base_params(model)
    tree = adapters(model, params, seed=rank())
    sgd = fl.optim.sgd(0.1)
    try:
        fl.train_step(model, loss_fn, sgd, reduce=fl.distributed.mean())(params, tree, sgd.init(tree), ids())
    except fl.errors.ConfigError as error:
        return str(error)
    return "nothing"


# A divided base: by FSDP2, by `shard`.


def compared(whole: nn.Module, params: Any, model: nn.Module, divided: Any) -> Iterator[tuple[str, float]]:
    """How far results with a divided base are from those with the whole one."""
    batch = ids(4)
    config = fl.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    heads: Any = [fl.init(m, config, params=p)["lm_head.weight"] for m, p in ((whole, params), (model, divided))]
    is_divided = any(isinstance(leaf, fl.Quantized) for leaf in optree.tree_leaves(heads))
    yield "a whole module", difference(*heads) + is_divided
    for dora in (False, True):
        kind = "DoRA" if dora else "LoRA"
        tree = adapters(whole, params, use_dora=dora)
        yield f"{kind} init", difference(tree, adapters(model, divided, use_dora=dora))
        with torch.no_grad():
            first, second = fl.apply(whole, params, tree, batch), fl.apply(model, divided, tree, batch)
            yield f"{kind} apply", difference(first.logits, second.logits)
        for checkpointing in (False, True):
            for each in (whole, model):
                each.model.gradient_checkpointing = False  # type: ignore[union-attr]
                if checkpointing:
                    each.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
                else:
                    each.gradient_checkpointing_disable()  # type: ignore[operator]
            wanted = fl.value_and_grad(loss_fn)(whole, params, tree, batch)
            yield (
                f"{kind} gradients, checkpointing {checkpointing}",
                difference(wanted, fl.value_and_grad(loss_fn)(model, divided, tree, batch)),
            )
        for each in (whole, model):
            each.gradient_checkpointing_disable()  # type: ignore[operator]
        members = fl.stack([tree, adapters(whole, params, 2, use_dora=dora)])
        rows = fl.route(members, [1, 0, -1, 1])
        first, second = fl.apply(whole, params, rows, batch), fl.apply(model, divided, rows, batch)
        yield f"{kind} route", difference(first.logits, second.logits)
        optimizer = fl.optim.per_member(clipped)
        stepped = [
            fl.population_step(m, loss_fn, optimizer, shared=True)(p, members, optimizer.init(members), batch)[0]
            for m, p in ((whole, params), (model, divided))
        ]
        yield f"{kind} population", difference(*stepped)
        prompt = batch[:, :4]
        answers = []
        for m, p in ((whole, params), (model, divided)):
            m.eval()
            bound: Any = fl.bind(m, p, tree)
            answers.append(bound.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0))
            m.train()
        yield f"{kind} generate", difference(*answers)
        if params_are_dense(params):
            yield from merges(whole, params, model, divided, tree, kind)
        yield f"{kind} summary", float(fl.summary(params, tree).trainable != fl.summary(divided, tree).trainable)


def merges(
    whole: nn.Module, params: Any, model: nn.Module, divided: Any, tree: Any, kind: str
) -> Iterator[tuple[str, float]]:
    """How far merged weights, which stay divided, are from those of the whole base, and what is computed with them."""
    wanted, found = fl.merge(params, tree), fl.merge(divided, tree)
    yield f"{kind} merge", difference(wanted, gathered(found))
    sizes = [(x.to_local() if isinstance(x, DTensor) else x).nbytes for x in found.values()]
    yield f"{kind} merge, bytes", sum(sizes) / sum(x.nbytes for x in wanted.values())
    with torch.no_grad():
        first, second = fl.apply(whole, wanted, tree, ids(4)), fl.apply(model, found, tree, ids(4))
        yield f"{kind} apply after merge", difference(first.logits, second.logits)
    gradients = fl.value_and_grad(loss_fn)
    yield (
        f"{kind} gradients after merge",
        difference(gradients(whole, wanted, tree, ids(4)), gradients(model, found, tree, ids(4))),
    )
    yield f"{kind} merge again", difference(fl.merge(wanted, tree), gathered(fl.merge(found, tree)))


def gathered(params: Any) -> dict[str, Tensor]:
    """The whole weights."""
    return fl.dequantize({name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in params.items()})


class Wholes(Peak):
    """Counts the tensors that are as large as a whole weight."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes

    def _add(self, storage: torch.UntypedStorage) -> None:
        with contextlib.suppress(RuntimeError):  # a DTensor itself has no memory
            if storage.data_ptr() and storage.nbytes() >= self.nbytes:
                super()._add(storage)


def check_merge() -> dict[str, float]:
    """How many whole weights a merge holds at a time, and that the model itself takes what comes of it."""
    results: dict[str, float] = {}
    for kind in ("layers", "weights"):
        for dora in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16)))
            params = fl.base_params(model)
            tree = adapters(model, params, target_modules="all-linear", use_dora=dora)
            wanted = fl.merge(params, tree)
            if kind == "layers":
                for layer in model:
                    fully_shard(layer)
                fully_shard(model)
                divided = fl.base_params(model)
            else:
                divided = fl.distributed.shard(params)
            with Wholes(64 * 64 * 4) as memory:
                found = fl.merge(divided, tree)
            results[f"{kind} {dora}: whole weights"] = memory.peak / (64 * 64 * 4)
            results[f"{kind} {dora}: difference"] = difference(wanted, gathered(found))
            if kind == "layers":
                model.load_state_dict(found)
                results[f"{kind} {dora}: loaded"] = difference(wanted, gathered(fl.base_params(model)))
    return results


def check_tied_merge() -> list[str]:
    """What merging an adapter of one of two tied weights warns of."""
    whole = llama(tie_word_embeddings=True)
    params = fl.base_params(whole)
    tree = adapters(whole, params, target_modules=["embed_tokens"])
    model = fully_sharded(whole)
    said = []
    for divided in (params, fl.base_params(model), fl.distributed.shard(params)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", fl.errors.TiedWeightsWarning)
            fl.merge(divided, tree)
        said.append(", ".join(str(each.message) for each in caught))
    return said


def params_are_dense(params: Any) -> bool:
    return not any(isinstance(weight, fl.Quantized) for weight in params.values())


def fully_sharded(whole: LlamaForCausalLM) -> LlamaForCausalLM:
    model = copy.deepcopy(whole)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def check_fsdp() -> dict[str, float]:
    whole = llama()
    model = fully_sharded(whole)
    params, divided = fl.base_params(whole), fl.base_params(model)
    local = sum(p.to_local().nbytes for p in model.parameters())
    results = dict(compared(whole, params, model, divided))
    results["bytes"] = local / sum(p.nbytes for p in whole.parameters())
    again = fl.base_params(model)  # the root's own weights are whole after a call
    results["base_params after a call"] = float(list(map(repr, divided.values())) != list(map(repr, again.values())))
    return results


def check_module_over_fsdp() -> dict[str, Any]:
    whole = llama()
    model = fully_sharded(whole)
    tree = adapters(whole, fl.base_params(whole))
    alone = fl.as_module(whole, fl.base_params(whole), tree)
    wrapped = nn.parallel.DistributedDataParallel(fl.as_module(model, fl.base_params(model), tree))
    for module, batch in ((alone, ids()), (wrapped, ids().chunk(2)[rank()])):
        loss_fn(module, batch).backward()
    results: dict[str, Any] = {
        "gradients": max(
            (a.grad - b.grad).abs().max().item()  # type: ignore[operator]
            for a, b in zip(alone.parameters(), wrapped.parameters(), strict=True)
        )
    }
    divided = fl.as_module(llama(), fl.base_params(llama()), tree)
    fully_shard(divided)
    try:
        divided(ids())
    except fl.errors.UnsupportedError as error:
        results["refused"] = str(error)
    return results


def check_shards() -> dict[str, float]:
    model = llama()
    results: dict[str, float] = {}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    dense = fl.base_params(model)
    bases = {
        "dense": dense,
        "float64": {name: weight.double() for name, weight in dense.items()},
        "nf4": fl.quantize(dense, linear, "nf4"),
        "nf4, double": fl.quantize(dense, linear, "nf4", double_quant=True),
        "int8": fl.quantize(dense, linear, "int8"),
    }
    for kind, params in bases.items():
        divided = fl.distributed.shard(params)
        results |= {f"{kind}: {name}": value for name, value in compared(model, params, model, divided)}
        if kind in ("dense", "nf4"):
            fresh, tree = llama(), adapters(model, params)  # without the hooks that checkpointing leaves
            gradients = [
                torch.func.grad(lambda a, p=p, m=fresh: loss_fn(fl.bind(m, p, a), ids(2)))(tree)
                for p in (params, divided)
            ]
            results[f"{kind}: torch.func.grad"] = difference(*gradients)
        results[f"{kind}: bytes"] = sum(w.nbytes for w in divided.values()) / sum(w.nbytes for w in params.values())
    return results


def check_compiled() -> dict[str, float]:
    """A graph over a base that is divided by weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    params = fl.base_params(model)
    tree: Any = adapters(model, params, target_modules="all-linear")

    def loss(params: Any, tree: Any) -> Tensor:
        return fl.bind(model, params, tree)(torch.ones(2, 64)).square().mean()

    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for function, weights in ((loss, params), (graph, fl.distributed.shard(params))):
        leaves = optree.tree_map(lambda x: x.detach().requires_grad_(), tree)
        function(weights, leaves).backward()
        found.append([leaf.grad for leaf in optree.tree_leaves(leaves)])
    return {"gradients": difference(*found)}


def check_prefetch() -> dict[str, Any]:
    """Which weights were on their way when they were used, and that nobody gets another one's values."""
    model = llama()
    params = fl.base_params(model)
    tree = adapters(model, params)
    divided = fl.distributed.shard(params)
    weight: Any = divided["lm_head.weight"]
    gatherer = weight.source.packing.gatherer
    gradients = fl.value_and_grad(loss_fn)
    wanted = gradients(model, params, tree, ids())
    shares, differences = [], []
    for _ in range(3):
        uses, ready = gatherer.uses, gatherer.ready
        differences.append(difference(wanted, gradients(model, divided, tree, ids())))
        shares.append((gatherer.ready - ready) / (gatherer.uses - uses))
    results: dict[str, Any] = {"on their way": shares, "gradients": max(differences)}
    with torch.inference_mode():
        fl.apply(model, divided, tree, ids(1))
    results["after inference mode"] = difference(wanted, gradients(model, divided, tree, ids()))
    for step in (1, -1, 1, 2):
        pairs = [(params[name], whole(divided, name)) for name in [*divided][::step]]
        results[f"in steps of {step}"] = difference(*zip(*pairs, strict=True))
    with Peak() as memory, torch.no_grad():
        fl.apply(model, divided, {}, ids(1)[:, :1])
    results["weights held"] = memory.peak / max(weight.nbytes for weight in params.values())
    first, second = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    for name in (first, second, first, second, first):
        whole(divided, name)
    pieces: Any = divided[second]
    pieces.parts[0].mul_(2)  # while it is on its way
    results["written to"] = difference(whole(divided, second), 2 * params[second])
    return results | {"threads": in_threads(model, params, tree)}


def whole(params: dict[str, Tensor], name: str) -> Tensor:
    return fl.dequantize({name: params[name]})[name]


def in_threads(model: nn.Module, params: dict[str, Tensor], tree: Any) -> float:
    """How far two threads are from one, each with a group of its own."""
    groups = [dist.new_group() for _ in range(2)]
    wanted = fl.value_and_grad(loss_fn)(model, params, tree, ids())

    def run(group: Any) -> float:
        divided = fl.distributed.shard(params, group=group)
        return max(difference(wanted, fl.value_and_grad(loss_fn)(model, divided, tree, ids())) for _ in range(4))

    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(run, groups))


# Tensor parallelism.


def parallel(plan: str, kind: str = "llama") -> Any:
    """A model over a mesh of all processes: by transformers, or by torch."""
    folder = saved(kind)
    cls: Any = type(MODELS[kind]())
    if plan == "transformers":
        return cls.from_pretrained(folder, tp_plan="auto").train()
    model = cls.from_pretrained(folder).train()
    mesh = init_device_mesh("cpu", (world(),))
    parts: dict[str, Any] = {
        "q_proj": 0,
        "k_proj": 0,
        "v_proj": 0,
        "gate_proj": 0,
        "up_proj": 0,
        "o_proj": 1,
        "down_proj": 1,
    }
    styles: dict[str, Any] = {
        name: (RowwiseParallel if parts[last] else ColwiseParallel)()
        for name, _ in model.named_modules()
        if (last := name.rpartition(".")[2]) in parts
    }
    styles |= {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    styles |= {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(model, mesh, styles)


def check_tensor_parallel() -> dict[str, Any]:
    results: dict[str, Any] = {}
    whole = MODELS["llama"]()
    params = fl.base_params(whole)
    for plan in ("transformers", "torch"):
        model = parallel(plan)
        divided = fl.base_params(model)
        local = sum(w.to_local().nbytes if isinstance(w, DTensor) else w.nbytes for w in divided.values())
        results[f"{plan}: bytes"] = local / sum(w.nbytes for w in params.values())
        for name, value in on_mesh(whole, params, model, divided):
            results[f"{plan}: {name}"] = value
    results["experts merge"] = merge_of_experts()
    return results


def merge_of_experts() -> float:
    """How far merged weights of experts on a mesh, which cannot be used with an adapter, are from whole ones."""
    model: Any = parallel("transformers", "mixtral")
    whole = type(model).from_pretrained(saved("mixtral"))
    params, divided = fl.base_params(whole), fl.base_params(model)
    tree = adapters(whole, params, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    found = fl.merge(divided, tree)
    assert [type(w) for w in found.values()] == [type(w) for w in divided.values()]
    wanted = fl.merge(params, tree)
    return difference([wanted[name] for name in tree], [*gathered({name: found[name] for name in tree}).values()])


BY_TOKEN = torch.arange(48).view(4, 12) % 3 - 1  # of two members and the base


def on_mesh(whole: Any, params: Any, model: Any, divided: Any) -> Iterator[tuple[str, float]]:
    """How far results on a mesh are from those of one process."""
    batch = ids(4)
    targets = ["q_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
    for dora in (False, True):
        kind = "DoRA" if dora else "LoRA"
        tree = adapters(whole, params, use_dora=dora, target_modules=targets)
        torch.manual_seed(rank())  # the first process decides
        config = fl.LoraConfig(r=2, target_modules=targets, use_dora=dora)
        fresh = fl.init(model, config, params=divided)
        torch.manual_seed(0)
        yield f"{kind} init", difference(fresh, fl.init(whole, config, params=params))
        wanted = fl.value_and_grad(loss_fn)(whole, params, tree, batch)
        found = fl.value_and_grad(loss_fn)(model, divided, tree, batch)
        yield f"{kind} gradients", difference(wanted, found)
        digests: list[Any] = [None] * world()
        dist.all_gather_object(digests, digest(found))
        yield f"{kind} gradients, other processes", float(len({*digests}) > 1)
        optimizer = fl.optim.sgd(0.1)
        stepped = [
            fl.train_step(m, loss_fn, optimizer, accumulate=2)(p, tree, optimizer.init(tree), batch)[0]
            for m, p in ((whole, params), (model, divided))
        ]
        yield f"{kind} step", difference(*stepped)
        modules = [fl.as_module(m, p, tree) for m, p in ((whole, params), (model, divided))]
        for module in modules:
            loss_fn(module, batch).backward()
        yield f"{kind} as_module", difference(*([x.grad for x in module.parameters()] for module in modules))
        members = fl.stack([tree, adapters(whole, params, 2, r=2, use_dora=dora, target_modules=targets)])
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                first, second = fl.apply(whole, params, tree, batch), fl.apply(model, divided, tree, batch)
                yield f"{kind} apply, gradients {grad}", difference(first.logits, second.logits)
                rows = fl.route(members, [1, 0, -1, 1])
                first, second = fl.apply(whole, params, rows, batch), fl.apply(model, divided, rows, batch)
                yield f"{kind} route, gradients {grad}", difference(first.logits, second.logits)
                rows = fl.route(members, BY_TOKEN)
                first, second = fl.apply(whole, params, rows, batch), fl.apply(model, divided, rows, batch)
                yield f"{kind} route by token, gradients {grad}", difference(first.logits, second.logits)
        each = fl.optim.per_member(fl.optim.sgd, lr=[0.1, 0.2])
        trained = [
            fl.population_step(m, loss_fn, each, shared=True)(p, members, each.init(members), batch)[0]
            for m, p in ((whole, params), (model, divided))
        ]
        yield f"{kind} population", difference(*trained)
        answers = []
        for m, p in ((whole, params), (model, divided)):
            bound: Any = fl.bind(m.eval(), p, tree)
            answers.append(bound.generate(batch[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0))
            m.train()
        yield f"{kind} generate", difference(*answers)
        merged: Any = fl.merge(divided, tree)
        full = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in merged.items()}
        assert [type(w) for w in merged.values()] == [type(w) for w in divided.values()]
        yield f"{kind} merge", difference(fl.merge(params, tree), full)
        yield f"{kind} summary", float(fl.summary(params, tree).trainable != fl.summary(divided, tree).trainable)


def check_tensor_parallel_refuses() -> dict[str, str]:
    model = parallel("transformers")
    params = fl.base_params(model)
    name = "model.layers.0.self_attn.o_proj.weight"
    tree = {name: adapters(model, params, target_modules=["o_proj"])[name]}
    plain = {"weight": params[name]}
    rule: Any = tree[name]
    there: Any = {name: replace(rule, a=params[name], b=params[name])}
    qwen, mixtral = parallel("transformers", "qwen3"), parallel("transformers", "mixtral")
    norms = fl.init(qwen, fl.LoraConfig(target_modules=["q_proj"], modules_to_save=["q_norm"]))
    experts = fl.LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"])
    layer = nn.Linear(64, 64, bias=False)
    by_layers = fl.base_params(fully_sharded(llama()))
    tied = parallel("transformers", "llama, tied")
    head = adapters(tied, fl.base_params(tied), target_modules=["embed_tokens"], ensure_weight_tying=True)
    eva = fl.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="eva")
    calls: dict[str, Callable[[], Any]] = {
        "quantised": lambda: fl.quantize(params, [name]),
        "quantised by layers": lambda: fl.quantize(by_layers, [name]),
        "shard": lambda: fl.distributed.shard(params),
        "torch.func": lambda: torch.func.grad(lambda a: loss_fn(fl.bind(model, params, a), ids(2)))(tree),
        "adapters on the mesh": lambda: fl.bind(model, params, there),
        "not parallelised": lambda: fl.apply(layer, plain, {"weight": tree[name]}, torch.ones(2, 64)),
        "a share of the gradient": lambda: fl.bind(qwen, fl.base_params(qwen), norms),
        "experts": lambda: fl.apply(mixtral, fl.base_params(mixtral), fl.init(mixtral, experts), ids(2)),
        "tied": lambda: fl.apply(tied, fl.base_params(tied), head, ids(2)),
        "eva": lambda: fl.init_eva(model, eva, [ids(2)], params=params),
        "pissa": lambda: fl.decompose(
            model, fl.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="pissa"), params=params
        ),
    }
    results = {name: said(call) for name, call in calls.items()}
    with torch.no_grad():
        results["not parallelised, no gradients"] = said(calls["not parallelised"])
    return results


# A folder that is read in pieces.

FOLDER = Path()  # of the launch


def saved(kind: str) -> Path:
    """The folder of a model, written by the first process."""
    folder = FOLDER / kind.replace(" ", "-").replace(",", "")
    torch.manual_seed(0)
    model: Any = MODELS[kind]()
    if rank() == 0:
        model.save_pretrained(folder, max_shard_size="60KB")
    dist.barrier()
    return folder


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "base": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True, dtype="bfloat16"),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16)),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=2, d_kv=16, vocab_size=96, dtype="float16")
    ),
}


def unequal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """The names of weights that differ in kind, in dtype or in a bit of what this process holds."""
    assert list(found) == list(wanted)
    wrong = []
    for name, weight in wanted.items():
        given = found[name]
        pairs = [(given, weight)]
        if isinstance(weight, fl.Quantized):
            if not isinstance(given, fl.Quantized) or given.source != weight.source:
                wrong.append(name)
                continue
            pairs = [*zip(given.parts, weight.parts, strict=True), (given.dequantize(), weight.dequantize())]
        if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
            wrong.append(name)
    return wrong


def check_load_sharded() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in ("llama", "llama, tied", "mixtral", "resnet", "t5"):
        make, folder = MODELS[kind], saved(kind)
        whole: Any = type(make()).from_pretrained(folder)  # type: ignore[attr-defined]
        results |= {f"{kind}: {name}": value for name, value in read_in_pieces(folder, whole).items()}
        if kind == "llama":
            for more in (
                {"quantize": "nf4"},
                {"quantize": "nf4", "double_quant": True},
                {"quantize": "int8", "targets": ["q_proj", "mlp.down_proj"]},
                {"dtype": torch.bfloat16},
            ):
                found = read_in_pieces(folder, whole, **more)
                results |= {f"{kind} {more}: {name}": value for name, value in found.items()}
            results |= used(whole, *fl.distributed.load_sharded(folder))
    return results


def read_in_pieces(folder: Path, whole: Any, **options: Any) -> dict[str, Any]:
    """What `load_sharded` gives, compared with `shard` of the whole model, and the bytes that it takes."""
    params = fl.base_params(whole)
    wanted = {key: value.to(options.get("dtype", value.dtype)) for key, value in params.items()}
    if "quantize" in options:
        packing = {key: value for key, value in options.items() if key not in ("quantize", "targets")}
        linear = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
        targets = options.get("targets", [name for name in linear if name != "lm_head"])
        wanted = fl.quantize(wanted, targets, options["quantize"], **packing)
    read = Counted()
    with Peak() as memory, read:
        model, divided = fl.distributed.load_sharded(folder, **options)
    total = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in params.values()}.values())
    largest = max(tensor.nbytes for tensor in params.values())
    buffers = zip(whole.named_buffers(), model.named_buffers(), strict=True)
    return {
        "different": unequal(divided, fl.distributed.shard(wanted)),
        "bytes read": read.nbytes / total,
        "bytes held beside two weights": (memory.peak - 2 * largest) / total,
        "on the meta device": all(parameter.is_meta for parameter in model.parameters()),
        "other buffers": [a for (a, x), (b, y) in buffers if a != b or (a not in divided and not torch.equal(x, y))],
    }


def check_page() -> list[str]:
    """Runs a script of the documentation."""
    saved("base")
    text = (Path(fl.__file__).parents[1] / "docs" / "many-devices.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for code in re.findall(r'```python title="base.py"\n(.*?)```', text, re.DOTALL):
        exec(code, names)
    return [repr(names["pieces"]["lm_head.weight"]), repr(names["quantised"]["model.layers.0.mlp.up_proj.weight"])]


def used(whole: Any, model: Any, divided: Any) -> dict[str, Any]:
    """How far results of a model without weights are from those of the whole one."""
    params = fl.base_params(whole)
    tree = adapters(whole, params)
    prompt, options = ids(2)[:, :4], {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first, second = fl.bind(whole, params, tree), fl.bind(model, divided, tree)
    return {
        "llama: apply": difference(first(prompt).logits, second(prompt).logits),
        "llama: generate": difference(first.generate(prompt, **options), second.generate(prompt, **options)),
        "llama: settings": str(whole.generation_config) == str(model.generation_config),
    }


def check_load_sharded_refuses() -> dict[str, str]:
    folder, cut = saved("llama"), FOLDER / f"cut-{rank()}"
    shutil.copytree(folder, cut)
    mesh = init_device_mesh("cpu", (world(), 1), mesh_dim_names=("shard", "rest"))
    calls: dict[str, Callable[[], Any]] = {
        "one mesh": lambda: fl.distributed.load_sharded(folder, group=mesh["shard"]),
        "a mesh of two dimensions": lambda: fl.distributed.load_sharded(folder, group=mesh),
        "another kind": lambda: fl.distributed.load_sharded(folder, quantize="nf4" if rank() else None),
        "a part of a tie": lambda: fl.distributed.load_sharded(
            saved("llama, tied"), quantize="nf4", targets=["lm_head"]
        ),
        "targets": lambda: fl.distributed.load_sharded(folder, targets=["q_proj"]),
        "another class": lambda: fl.distributed.load_sharded(folder, make=lambda: nn.Linear(1, 1)),
        "another dtype": lambda: fl.distributed.load_sharded(
            folder, make=lambda: llama().float(), dtype=torch.bfloat16
        ),
        "no head": lambda: fl.distributed.load_sharded(
            folder, make=lambda: LlamaForSequenceClassification(LlamaConfig.from_pretrained(folder))
        ),
    }
    if rank() == 1:
        (cut / "model-00002-of-00006.safetensors").unlink()
    calls["a missing file"] = lambda: fl.distributed.load_sharded(cut)
    return {name: said(call) for name, call in calls.items()}


def said(call: Callable[[], Any]) -> str:
    """The error of a call."""
    try:
        call()
    except fl.errors.FuncloraError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Counted:
    """Counts the bytes that are read from files of tensors inside the block."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __enter__(self) -> None:
        self._fill = safetensors.fill

        def fill(descriptor: int, raw: Tensor, at: int) -> None:
            self.nbytes += raw.numel()
            self._fill(descriptor, raw, at)

        safetensors.fill = fill

    def __exit__(self, *_: object) -> None:
        safetensors.fill = self._fill


CHECKS: dict[str, Callable[[], Any]] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}


def main(out: str, *names: str) -> None:
    global FOLDER  # noqa: PLW0603
    torch.set_num_threads(1)
    FOLDER = Path(out)
    os.chdir(FOLDER)
    dist.init_process_group("gloo")
    try:
        results = {name: CHECKS[name]() for name in names}
        Path(out, f"{rank()}.json").write_text(json.dumps(results), encoding="utf-8")
        dist.barrier()  # a process that exits first can abort what the other still sends
    finally:
        gc.collect()  # a DistributedDataParallel that is freed after its group can wait for ever for gloo's thread
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
