"""`as_module` under `DistributedDataParallel`: two processes train what one does on all rows."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from launch import spawned
from oracle import snapshot
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import funclora as fl


def regression() -> tuple[nn.Sequential, Any, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    config = fl.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], use_dora=True)
    module = fl.as_module(model, fl.base_params(model), fl.init(model, config), config)
    return model, module, TensorDataset(torch.randn(16, 5), torch.randn(16, 3))


def trained(rank: int, find_unused: bool) -> dict[str, Any]:
    """The adapter after two steps, each on this process's half of a batch."""
    model, module, data = regression()
    check = snapshot(model, fl.base_params(model))
    if rank == 1:  # the first process's values count
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
    wrapped = nn.parallel.DistributedDataParallel(module, find_unused_parameters=find_unused)
    optimizer = optim.AdamW(wrapped.parameters(), lr=1e-2)
    for x, y in DataLoader(data, batch_size=8):
        optimizer.zero_grad()
        F.mse_loss(wrapped(x[rank::2]), y[rank::2]).backward()
        optimizer.step()
    check()
    return module.state_dict()


def distributed(rank: int, folder: str) -> None:
    """What each of two processes does.

    The wrapped modules are gone when the group is destroyed: one that is freed after it destroys the group itself and,
    holding the interpreter's lock, can wait for ever for gloo's thread, which wants that lock. The first one of a
    process is part of a cycle.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for i, find_unused in enumerate((False, True)):
            torch.save(trained(rank, find_unused), f"{folder}/{i}-{rank}.pt")
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()


def test_two_processes_train_what_one_does_on_all_rows(tmp_path: Path) -> None:
    spawned(distributed, 2, str(tmp_path))
    _, module, data = regression()
    optimizer = optim.AdamW(module.parameters(), lr=1e-2)
    start = copy.deepcopy(module.state_dict())
    for x, y in DataLoader(data, batch_size=8):
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()
    for i in range(2):
        first, second = (torch.load(tmp_path / f"{i}-{rank}.pt", weights_only=True) for rank in range(2))
        for name, value in module.state_dict().items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, start[name]), name
