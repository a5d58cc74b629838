"""The losses of preferences against the formulas of their papers, in float64, number by number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from funclora.errors import ArgumentError, ConfigError
from funclora.losses import dpo, ipo, kto, orpo, simpo

N = 7


def log_probs(seed: int, scale: float = 3.0) -> Tensor:
    return -scale * torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1e-3


C, R, RC, RR = (log_probs(seed) for seed in range(4))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


def by_hand(formula: Callable[..., float], *tensors: Tensor) -> Tensor:
    return torch.tensor(
        [formula(*row) for row in zip(*(x.tolist() for x in tensors), strict=True)], dtype=torch.float64
    )


@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_dpo(beta: float, eps: float) -> None:
    def formula(c: float, r: float, rc: float, rr: float) -> float:
        m = beta * (math.log(math.exp(c) / math.exp(rc)) - math.log(math.exp(r) / math.exp(rr)))
        return -(1 - eps) * math.log(sigma(m)) - eps * math.log(sigma(-m))

    got = dpo(C, R, RC, RR, beta=beta, label_smoothing=eps)
    torch.testing.assert_close(got, by_hand(formula, C, R, RC, RR), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_ipo(beta: float) -> None:
    want = by_hand(lambda c, r, rc, rr: ((c - rc) - (r - rr) - 1 / (2 * beta)) ** 2, C, R, RC, RR)
    torch.testing.assert_close(ipo(C, R, RC, RR, beta=beta), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_orpo(beta: float) -> None:
    want = by_hand(lambda c, r: -c - beta * math.log(sigma(math.log(odds(c) / odds(r)))), C, R)
    torch.testing.assert_close(orpo(C, R, beta=beta), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.5, 0.0)])
def test_simpo(beta: float, gamma: float) -> None:
    want = by_hand(lambda c, r: -math.log(sigma(beta * c - beta * r - gamma)), C, R)
    torch.testing.assert_close(simpo(C, R, beta=beta, gamma=gamma), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kl", [0.7, -0.7, 0.0])
def test_kto(kl: float) -> None:
    desirable = torch.tensor([True, False, True, True, False, False, True])
    z, beta, good, bad = max(kl, 0.0), 0.4, 1.5, 0.5

    def formula(answer: float, reference: float, said: float) -> float:
        h = answer - reference
        return good * (1 - sigma(beta * (h - z))) if said else bad * (1 - sigma(beta * (z - h)))

    want = by_hand(formula, C, RC, desirable)
    got = kto(C, RC, desirable, kl, beta=beta, desirable_weight=good, undesirable_weight=bad)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "dpo": lambda c, r, rc, rr: dpo(c, r, rc, rr, beta=0.7, label_smoothing=0.1),
    "ipo": lambda c, r, rc, rr: ipo(c, r, rc, rr, beta=0.7),
    "orpo": lambda c, r, rc, rr: orpo(c, r, beta=0.7) + 0 * (rc + rr),
    "simpo": lambda c, r, rc, rr: simpo(c, r) + 0 * (rc + rr),
    "kto": lambda c, r, rc, rr: kto(c, r, rc < rr, 0.3, beta=0.7) + 0 * (rc + rr),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(FUNCTIONS[name], [x.clone().requires_grad_() for x in (C, R, RC, RR)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_number_and_no_gradient_is_lost_far_out(name: str) -> None:
    far = torch.tensor([-1e-7, -5e-3, -0.693, -0.7, -40.0, -3000.0])
    given = [x.clone().requires_grad_() for x in (far, far.flip(0), far * 0.9, far.flip(0) * 1.1)]
    loss = FUNCTIONS[name](*given)
    assert loss.isfinite().all()
    grads = torch.autograd.grad(loss.sum(), given)
    assert all(grad.isfinite().all() for grad in grads)
    exact = FUNCTIONS[name](*[x.detach().double() for x in given])
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_certain_answer_has_a_loss_and_no_nan() -> None:
    zero = torch.zeros(1, requires_grad=True)
    loss = orpo(zero, torch.tensor([-1.0]))
    (grad,) = torch.autograd.grad(loss.sum(), zero)
    assert loss.isfinite()
    assert grad.isfinite()


def test_the_estimate_of_kl_gets_no_gradient() -> None:
    kl = torch.tensor(0.5, requires_grad=True)
    assert kto(C.requires_grad_(), RC, RC < RR, kl).requires_grad
    grads: Any = torch.autograd.grad(kto(C, RC, RC < RR, kl).sum(), kl, allow_unused=True)
    assert grads == (None,)
    C.requires_grad_(False)


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo"])
def test_each_pair_may_have_its_own_beta(name: str) -> None:
    beta = torch.linspace(0.1, 2, N, dtype=torch.float64)
    function: Any = {"dpo": dpo, "ipo": ipo, "orpo": orpo, "simpo": simpo}[name]
    args = (C, R, RC, RR) if name in ("dpo", "ipo") else (C, R)
    got = function(*args, beta=beta)
    want = torch.stack([function(*(x[i] for x in args), beta=float(beta[i])) for i in range(N)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: dpo(C, R, RC, RR[:3]), ConfigError, "reference_rejected: expected the shape of the others, [7]"),
        (lambda: dpo(C, R, RC, 1.0), ArgumentError, "reference_rejected: expected log-probabilities as tensors"),  # type: ignore[arg-type]
        (lambda: dpo(C, R, RC, RR, beta=0.0), ConfigError, "beta: expected a number above 0, got 0.0"),
        (lambda: dpo(C, R, RC, RR, label_smoothing=0.5), ConfigError, "label_smoothing: expected a number from 0"),
        (lambda: simpo(C, R, gamma=-1.0), ConfigError, "gamma: expected a number from 0, got -1.0"),
        (lambda: kto(C, R, torch.ones(N)), ArgumentError, "desirable: expected a tensor of true and false"),
        (lambda: kto(C, R, C < R, desirable_weight=-1), ConfigError, "desirable_weight: expected a number from 0"),
    ],
)
def test_what_is_wrong_is_said(call: Callable[[], Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()
