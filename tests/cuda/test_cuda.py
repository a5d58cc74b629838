"""What a GPU must compute: what the CPU computes, by the same functions.

    pytest -m cuda                  on a GPU; without one, all are skipped
    pytest -m cuda --device cpu     the same tests on the CPU, to see that they are right

Models, inputs and adapters are made on the CPU; results come back to it to be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, gen, llama, make_adapters
from oracle import close, tensors
from torch import Tensor, nn

import funclora as fl
from funclora._torch.memory import budget, is_out_of_memory
from funclora.errors import ParamsError
from funclora.serving import Engine, Settings

pytestmark = pytest.mark.cuda
CPU = torch.device("cpu")
METHODS = [pytest.param(False, id="lora"), pytest.param(True, id="dora")]
LR = 1e-2


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: TensorFloat-32 keeps 10 bits."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def on(where: torch.device, tree: Any) -> Any:
    return optree.tree_map(lambda x: x.to(where) if isinstance(x, Tensor) else x, tree)


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a result, on the CPU."""
    return [x.detach().cpu() for x in tensors(tree) if x.is_floating_point()]


def everywhere(device: torch.device, compute: Callable[[torch.device], Any], tolerance: float = 1e-4) -> None:
    """Assert that a computation gives on the device what it gives on the CPU."""
    close(floats(compute(device)), floats(compute(CPU)), tolerance)


def language_model(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = llama()
    model.config.attention_dropout = dropout
    return model


def adapters_of(model: nn.Module, seed: int = 1, **options: Any) -> Any:
    """Adapters whose B is not zero."""
    options = {"r": 2, "target_modules": ["q_proj", "down_proj", "embed_tokens"], **options}
    made: Any = fl.init(model, fl.LoraConfig(**options), generator=gen(seed))
    noise = gen(seed + 1)
    return optree.tree_map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=noise), made)


def ids(rows: int, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(17, (rows, length), generator=gen(seed))


def loss_fn(bound: Any, batch: Tensor) -> Tensor:
    logits = bound(batch).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


# --- one adapter -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::funclora.errors.DenseFallbackWarning")
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "dora", "mixed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_of_every_layer(device: torch.device, case: Case, kind: str) -> None:
    s = case.setup()
    adapters: Any = make_adapters(case, s.params, kind, gen(1))

    def compute(where: torch.device) -> Any:
        model = copy.deepcopy(s.model).to(where)
        params, tree, args, kwargs = (on(where, each) for each in (s.params, adapters, s.args, s.kwargs))
        with torch.no_grad():
            outputs = floats(fl.apply(model, params, tree, *args, **kwargs))

        def loss(bound: Any) -> Tensor:
            values = [x for x in tensors(bound(*args, **kwargs)) if x.is_floating_point()]
            return torch.stack([x.square().mean() for x in values]).sum()

        return outputs, floats(fl.value_and_grad(loss)(model, params, tree))

    everywhere(device, compute)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dora", METHODS)
def test_half_precision_is_near_single_precision(device: torch.device, dora: bool, dtype: torch.dtype) -> None:
    model = language_model()
    adapters, batch = adapters_of(model, use_dora=dora), ids(4)
    value, grads = fl.value_and_grad(loss_fn)(model, fl.base_params(model), adapters, batch)
    half = copy.deepcopy(model).to(device, dtype)
    got, found = fl.value_and_grad(loss_fn)(half, fl.base_params(half), on(device, adapters), batch.to(device))
    assert got.item() == pytest.approx(value.item(), rel=0.02)
    for name, rule in grads.items():
        for one, other in zip(floats(found[name]), floats(rule), strict=True):
            assert F.cosine_similarity(one.flatten().float(), other.flatten(), 0) > 0.98, name


@pytest.mark.parametrize("dora", METHODS)
def test_training_steps(device: torch.device, dora: bool) -> None:
    model = language_model()
    adapters = adapters_of(model, use_dora=dora)

    def compute(where: torch.device) -> Any:
        own = copy.deepcopy(model).to(where)
        optimizer = fl.optim.adamw(LR)
        step = fl.train_step(own, loss_fn, optimizer, accumulate=2)
        tree = on(where, adapters)
        state = optimizer.init(tree)
        losses = []
        for seed in range(3):
            tree, state, metrics = step(fl.base_params(own), tree, state, ids(4, seed=seed).to(where))
            losses.append(metrics["loss"])
        return tree, losses

    everywhere(device, compute, 1e-3)  # AdamW divides small gradients by their own size


@pytest.mark.parametrize("dora", METHODS)
def test_merged_and_saved(device: torch.device, dora: bool, tmp_path: Path) -> None:
    model = language_model().eval()
    config = fl.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=dora)
    adapters = adapters_of(model, target_modules=["q_proj", "down_proj"], use_dora=dora)
    everywhere(device, lambda where: fl.merge(on(where, fl.base_params(model)), on(where, adapters)))
    fl.save_peft(tmp_path / "adapter", on(device, adapters), config)
    loaded, _ = fl.load_peft(tmp_path / "adapter", model)
    close(floats(loaded), floats(adapters), 0)
    moved = copy.deepcopy(model).to(device)
    cache = fl.AdapterCache(moved, {"one": tmp_path / "adapter"}, 2**20, device=device)
    assert all(leaf.device.type == device.type for leaf in tensors(cache["one"]))


@pytest.mark.parametrize("dora", METHODS)
def test_generation(device: torch.device, dora: bool) -> None:
    model = language_model().eval()
    adapters = adapters_of(model, use_dora=dora)
    answers = []
    for where in (device, CPU):
        own = copy.deepcopy(model).to(where)
        bound: Any = fl.bind(own, fl.base_params(own), on(where, adapters))
        prompt = ids(3).to(where)
        answers.append(bound.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert torch.equal(answers[0].cpu(), answers[1])


def test_a_module_moves_with_its_adapter(device: torch.device) -> None:
    model = language_model()

    def compute(where: torch.device) -> Any:
        module: Any = fl.as_module(model, fl.base_params(model), adapters_of(model)).to(where)
        optimizer = torch.optim.AdamW(module.parameters(), lr=LR)
        for seed in range(2):
            optimizer.zero_grad()
            loss_fn(module, ids(4, seed=seed).to(where)).backward()
            optimizer.step()
        return module.state_dict()

    everywhere(device, compute, 1e-3)
    assert all(parameter.device == CPU for parameter in model.parameters())


def test_tensors_of_two_devices_are_refused(device: torch.device) -> None:
    if device == CPU:
        pytest.skip("needs a second device")
    model = language_model()
    with pytest.raises((ParamsError, RuntimeError), match=r"device"):
        fl.apply(model.to(device), fl.base_params(model), adapters_of(language_model()), ids(2).to(device))


# --- many adapters ---------------------------------------------------------------------------------------------


def members_of(model: nn.Module, n: int = 3, **options: Any) -> list[Any]:
    """LoRA and DoRA of several ranks."""
    return [adapters_of(model, 10 * i, r=2 + i % 2, use_dora=i % 3 == 1, **options) for i in range(n)]


def test_every_row_has_its_own_adapter(device: torch.device) -> None:
    model = language_model().eval()
    members, batch, rows = members_of(model), ids(5), [2, 0, -1, 1, 0]
    own = copy.deepcopy(model).to(device)
    params = fl.base_params(own)
    stacked = fl.stack([on(device, member) for member in members])
    with torch.no_grad():
        got = fl.apply(own, params, fl.route(stacked, rows), batch.to(device)).logits.cpu()
        tensor = fl.apply(own, params, fl.route(stacked, torch.tensor(rows, device=device)), batch.to(device)).logits
        plain = fl.base_params(model)
        alone = [fl.apply(model, plain, members[i] if i >= 0 else {}, batch[k : k + 1]).logits
                 for k, i in enumerate(rows)]  # fmt: skip
    close(got, torch.cat(alone), 1e-4)
    close(tensor.cpu(), torch.cat(alone), 1e-4)


def test_a_population_trains_as_each_member_alone(device: torch.device) -> None:
    model = language_model(dropout=0.1).train()
    members = members_of(model, lora_dropout=0.2)
    own = copy.deepcopy(model).to(device)
    params = fl.base_params(own)
    batch = torch.stack([ids(2, seed=i) for i in range(3)]).to(device)
    stack = fl.stack([on(device, member) for member in members])
    optimizer = fl.optim.per_member(fl.optim.adamw, lr=[LR, LR / 2, LR / 4])
    step = fl.population_step(own, loss_fn, optimizer)
    after, _, metrics = step(params, stack, optimizer.init(stack), batch, seeds=[5, 6, 7])
    for i, member in enumerate(members):
        single = fl.optim.adamw(LR / 2**i)
        tree = on(device, member)
        alone, _, found = fl.train_step(own, loss_fn, single)(params, tree, single.init(tree), batch[i], seed=5 + i)
        close(floats(after[i]), floats(alone), 1e-3)
        assert metrics["loss"][i].item() == pytest.approx(found["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("pieces", [1, 3])
def test_evaluation_in_passes_that_fit_a_memory(device: torch.device, pieces: int) -> None:
    model = language_model().eval()
    members = members_of(model)

    def compute(where: torch.device) -> Any:
        own = copy.deepcopy(model).to(where)
        stack = fl.stack([on(where, member) for member in members])
        batches = [ids(4, seed=i).to(where) for i in range(2)]
        memory = None if pieces == 1 else 40_000
        return fl.evaluate(own, fl.base_params(own), stack, batches, loss_fn, memory=memory)

    everywhere(device, compute)
    assert budget(device) > 2**20


def test_memory_that_runs_out_is_known(device: torch.device) -> None:
    if device == CPU:
        pytest.skip("a CPU may promise memory that it does not have")
    free, _ = torch.cuda.mem_get_info(device)
    with pytest.raises(RuntimeError, match="memory") as caught:
        torch.empty(4 * free, dtype=torch.uint8, device=device)
    assert is_out_of_memory(caught.value)
    assert budget(device) < free


def test_requests_with_several_adapters(device: torch.device, tmp_path: Path) -> None:
    model = language_model().eval()
    config = fl.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    for i in range(2):
        fl.save_peft(tmp_path / f"m{i}", adapters_of(model, i, target_modules=["q_proj", "down_proj"]), config)
    asked = [(ids(1, 3 + k, seed=k)[0].tolist(), [None, "m0", "m1"][k % 3]) for k in range(7)]
    settings = Settings(max_tokens=5, temperature=0.0)
    answers = []
    for where in (device, CPU):
        own = copy.deepcopy(model).to(where)
        params = fl.base_params(own)
        cache = fl.AdapterCache(own, tmp_path, 2**20, device=where, params=params)
        with Engine(own, params, cache, max_rows=3, eos_ids=()) as engine:
            streams = [engine.submit(prompt, name, settings) for prompt, name in asked]
            answers.append([stream.result(timeout=120) for stream in streams])
    assert answers[0] == answers[1]


# --- dropout, checkpointing ------------------------------------------------------------------------------------


def test_a_seed_decides_dropout_and_nothing_else(device: torch.device) -> None:
    model = language_model(dropout=0.2).train().to(device)
    params, optimizer = fl.base_params(model), fl.optim.sgd(LR)
    tree = on(device, adapters_of(language_model(), lora_dropout=0.5))
    step = fl.train_step(model, loss_fn, optimizer)
    torch.manual_seed(3)
    before = torch.randn(4, device=device)
    torch.manual_seed(3)
    first, again, other = (
        step(params, tree, optimizer.init(tree), ids(4).to(device), seed=seed)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.randn(4, device=device), before), "the device's generator is as it was"
    close(floats(first), floats(again), 1e-6)
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(floats(first), floats(other), strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointing_draws_the_same_masks_again(device: torch.device) -> None:
    grads = []
    tree = on(device, adapters_of(language_model(), lora_dropout=0.5))
    for checkpointing in (False, True):
        model = language_model().train().to(device)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        grads.append(floats(fl.value_and_grad(loss_fn)(model, fl.base_params(model), tree, ids(4).to(device))))
    close(grads[0], grads[1], 1e-5)


# --- 4 bits, compiled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dora", METHODS)
def test_weights_in_few_bits(device: torch.device, dora: bool, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(device)
    packed = fl.quantize(fl.base_params(model), ["0", "2"], kind)  # type: ignore[arg-type]
    dense = fl.dequantize(packed)
    config = fl.LoraConfig(r=4, target_modules=["0", "2"], use_dora=dora)
    made: Any = fl.init(model, config, params=packed, generator=gen(1))
    tree = optree.tree_map(lambda leaf: leaf + 0.02, made)
    x = torch.randn(8, 64, generator=gen(2)).to(device)

    def square(bound: Any, x: Tensor) -> Tensor:
        return bound(x).square().mean()

    wanted = fl.value_and_grad(square)(model, dense, tree, x)
    close(floats(fl.value_and_grad(square)(model, packed, tree, x)), floats(wanted), 1e-4)
    back = on(CPU, dense)
    close(
        floats(wanted),
        floats(fl.value_and_grad(square)(copy.deepcopy(model).cpu(), back, on(CPU, tree), x.cpu())),
        1e-4,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dora", METHODS)
def test_compiled_functions(device: torch.device, dora: bool) -> None:
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # a C++ compiler needs minutes for a whole model
    model = language_model().eval().to(device)
    params, batch = fl.base_params(model), ids(4).to(device)
    tree = on(device, adapters_of(language_model(), target_modules=["q_proj", "down_proj"], use_dora=dora))
    logits = torch.compile(lambda a, x: fl.apply(model, params, a, x).logits, fullgraph=True, backend=backend)
    close(floats(logits(tree, batch)), floats(fl.apply(model, params, tree, batch).logits), 1e-4)
    optimizer = fl.optim.adamw(LR)
    step: Any = fl.train_step(model, loss_fn, optimizer)
    state = optimizer.init(tree)
    wanted = step(params, tree, state, batch)
    close(
        floats(torch.compile(step, fullgraph=True, backend=backend)(params, tree, state, batch)), floats(wanted), 1e-3
    )
