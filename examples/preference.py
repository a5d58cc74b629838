"""Direct preference optimisation with the reference in the same batch, and betas side by side in one population.

Each pair of answers is four rows of one batch: two for the policy, and two for the reference, which is the base (-1)
or any other adapter. The base model runs once for all of them, and gradients reach the policy only.

    python examples/preference.py
"""

from __future__ import annotations

import argparse
from typing import Any

import optree
import torch
from torch import Tensor

import funclora as fl
from funclora.demo.model import load_base
from funclora.losses import dpo, token_log_probs

# Both ways to write a text are likely for the base; the first one is preferred.
PAIRS = [(f"print({name}, ", "sep='')", 'sep="")') for name in ("a", "line", "total", "self.name", "x + 1", "path")]


def rows(pairs: list[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
    """Chosen answers, then rejected ones, `[2 * pairs, seq]`, and their labels: -100 on prompts and padding."""
    texts = [(prompt, answers[k]) for k in (0, 1) for prompt, *answers in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids, labels = torch.zeros(len(texts), width, dtype=torch.int64), torch.full((len(texts), width), -100)
    for row, (prompt, answer) in enumerate(texts):
        whole = torch.tensor(list((prompt + answer).encode()))
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids, labels


# --8<-- [start:one-batch]
def preference_loss(
    model: Any, params: fl.Params, policy: fl.Adapters, reference: fl.Adapters | None, ids: Tensor, labels: Tensor,
    beta: float,
) -> Tensor:  # fmt: skip
    """The loss of pairs, with policy and reference in one batch.

    Args:
        model: as for `fl.bind`.
        params: as for `fl.bind`.
        policy: the adapters that are trained.
        reference: other adapters; None is the base.
        ids: chosen answers, then rejected ones, `[2 * pairs, seq]`.
        labels: as for `token_log_probs`.
        beta: as for `dpo`.
    """
    n = len(ids)
    members = fl.stack([dict(policy)] if reference is None else [dict(policy), dict(reference)])
    both = fl.route(members, [0] * n + [-1 if reference is None else 1] * n)
    bound = fl.bind(model, params, both)
    log_probs = token_log_probs(bound, ids.repeat(2, 1), labels.repeat(2, 1)).sum(1)
    chosen, rejected, *fixed = log_probs.chunk(4)
    return dpo(chosen, rejected, *(x.detach() for x in fixed), beta=beta).mean()


# --8<-- [end:one-batch]


# --8<-- [start:two-passes]
def two_passes(bound: Any, batch: dict[str, Tensor]) -> Tensor:
    """The same loss for `train_step` and `population_step`, given what the reference says."""
    log_probs = token_log_probs(bound, batch["ids"], batch["labels"]).sum(1)
    return dpo(*log_probs.chunk(2), *batch["reference"].chunk(2), beta=batch["beta"].mean()).mean()


def said_by(model: Any, params: fl.Params, reference: fl.Adapters | None, ids: Tensor, labels: Tensor) -> Tensor:
    """The log-probabilities of the reference, once for all steps on these rows."""
    with torch.no_grad():
        return token_log_probs(fl.bind(model, params, reference or {}), ids, labels).sum(1)


# --8<-- [end:two-passes]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args(argv).steps
    model = load_base()
    params = fl.base_params(model)
    config = fl.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    start: Any = fl.init(model, config, generator=torch.Generator().manual_seed(0))
    ids, labels = rows(PAIRS)

    # One batch and two passes give the same loss and gradient. A policy that differs from its reference:
    noise = torch.Generator().manual_seed(1)
    policy: Any = optree.tree_map(lambda x: x + 0.05 * torch.randn(x.shape, generator=noise), start)
    tree: Any
    leaves, tree = optree.tree_flatten(policy)
    leaves = [x.requires_grad_() for x in leaves]
    grads: Any
    other_grads: Any
    loss = preference_loss(model, params, tree.unflatten(leaves), None, ids, labels, beta=0.1)
    grads = torch.autograd.grad(loss, leaves)
    batch = {"ids": ids, "labels": labels, "reference": said_by(model, params, None, ids, labels)}
    batch["beta"] = torch.full((len(ids),), 0.1)
    other, other_grads = fl.value_and_grad(two_passes)(model, params, policy, batch)
    gap = max(float((a - b).abs().max()) for a, b in zip(grads, optree.tree_leaves(other_grads), strict=True))
    print(f"loss {loss.item():.6f} in one batch, {other:.6f} in two passes; the gradients differ by at most {gap:.0e}")

    # A population: each member has its own beta and learning rate, and all read the same pairs.
    betas, rates = [0.05, 0.05, 0.5, 0.5], [1e-3, 3e-3, 1e-3, 3e-3]
    members = fl.stack([start] * len(betas))
    adamw = fl.optim.per_member(fl.optim.adamw, lr=rates)
    step = fl.population_step(model, two_passes, adamw)
    state = adamw.init(members)
    many = {key: x.expand(len(betas), *x.shape) for key, x in batch.items() if key != "beta"}
    many["beta"] = torch.tensor(betas)[:, None].expand(-1, len(ids))
    metrics: dict[str, Any] = {}
    for _ in range(steps):
        members, state, metrics = step(params, members, state, many)
    print("  beta  rate   loss   margin of log-probabilities")
    margins = []
    for member, beta, rate, last in zip(members, betas, rates, metrics["loss"].tolist(), strict=True):
        chosen, rejected = (said_by(model, params, member, ids, labels) - batch["reference"]).chunk(2)
        margins.append(float((chosen - rejected).mean()))
        print(f"  {beta:4.2f}  {rate:.0e}  {last:.3f}  {margins[-1]:.2f}")
    return {"loss": float(loss.detach()), "two passes": float(other), "gap": gap, "margins": margins}


if __name__ == "__main__":
    main()
