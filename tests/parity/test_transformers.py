"""transformers' own models at work: many threads with streamed generation, and gradient checkpointing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LLAMA, gen, llama, make_rule
from oracle import snapshot, tensors
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.generation.streamers import BaseStreamer

from funclora import apply, base_params, bind, optim, train_step, value_and_grad

IDS = torch.arange(12).reshape(2, 6) * 5 % 17


def adapters_of(params: dict[str, Tensor], seed: int, kinds: tuple[str, ...] = ("lora", "dora")) -> dict[str, Any]:
    generator = gen(seed)
    return {
        name: make_rule(kinds[i % len(kinds)], layout, params[name], generator)
        for i, (name, layout) in enumerate(LLAMA.items())
    }


def same(actual: Any, expected: Any) -> None:
    """Bit for bit."""
    assert len(tensors(actual)) == len(tensors(expected)) > 0
    for got, want in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


# --- threads ---------------------------------------------------------------------------------------------------


class Tokens(BaseStreamer):
    """What arrives while the model generates."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Lets threads take turns as often as the interpreter can, so that a race would show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
def test_eight_adapters_and_the_base_model_in_threads_of_their_own() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    params = base_params(model)
    many = [adapters_of(params, i, (("lora",), ("dora",), ("lora", "dora"))[i % 3]) for i in range(8)]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def streamed(i: int) -> Any:
        streamer = Tokens()
        ids = bind(model, params, many[i]).generate(IDS[:1], streamer=streamer, **options)
        assert streamer.ended
        assert [token for part in streamer.parts for token in part] == ids.flatten().tolist()
        return ids

    def generated(i: int) -> Any:
        return bind(model, params, many[i]).generate(IDS, **options)

    def scored(i: int) -> Any:
        return apply(model, params, many[i], IDS).logits

    def trained(i: int) -> Any:
        return value_and_grad(lambda bound, ids: bound(ids, labels=ids).loss)(model, params, many[i], IDS)

    kinds = (streamed, scored, generated, trained)
    jobs: list[Callable[[], Any]] = [lambda i=i: kinds[i % len(kinds)](i) for i in range(len(many))]  # type: ignore[misc]
    jobs += [lambda: model(IDS).logits, lambda: model.generate(IDS, **options)]
    check = snapshot(model, params, many)
    with torch.random.fork_rng(devices=[]):
        expected = [job() for job in jobs]
    assert len({str(pytree.tree_map(torch.Tensor.tolist, tensors(one))) for one in expected}) == len(jobs)

    results: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(n: int) -> None:
        barrier.wait()
        results[n] = [jobs[n]() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rounds, want in zip(results, expected, strict=True):
        for got in rounds:
            same(got, want)
    check()


# --- gradient checkpointing ------------------------------------------------------------------------------------


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradient(model: Any, params: Any, adapters: Any) -> Any:
    return value_and_grad(loss_of)(model, params, adapters, IDS)


def two_steps(model: Any, params: Any, adapters: Any) -> Any:
    optimizer = optim.adamw(1e-2)
    step = train_step(model, loss_of, optimizer)
    adapters, state, _ = step(params, adapters, optimizer.init(adapters), IDS)
    adapters, state, metrics = step(params, adapters, state, IDS)
    # The norm's sum depends on the strides of gradients, which reentrant checkpoints change.
    return adapters, state, metrics["loss"]


def backward_afterwards(model: Any, params: Any, adapters: Any) -> Any:
    """The recomputation happens when `apply` has long returned."""
    leaves, spec = pytree.tree_flatten(adapters)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    tree = pytree.tree_unflatten(leaves, spec)
    loss = loss_of(lambda ids, **options: apply(model, params, tree, ids, **options), IDS)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("run", [gradient, two_steps, backward_afterwards], ids=lambda run: run.__name__)
def test_gradient_checkpointing_changes_no_bit(run: Callable[..., Any], use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model = llama().train()
    params = base_params(model)
    adapters = adapters_of(params, 1)
    expected = run(model, params, adapters)

    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    check = snapshot(model, params, adapters)
    same(run(model, params, adapters), expected)
    check()
    passes = 2 if run is two_steps else 1
    assert len(calls) == 2 * passes, "each layer runs a second time in backward"
    assert all(leaf.abs().max() > 0 for leaf in tensors(expected))
