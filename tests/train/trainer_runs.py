"""Trainers in several processes: what each process of a launch does with each of them.

A run returns the adapter as numbers and the losses; what is refused, or warned of, returns the message. One process
must come to the same as several: it takes as many rows in a step, in as many micro-batches.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from cases import llama
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_trainers import Lightning, history, lora, module_of, regression, sft_of, trainer_of
from torch import nn, optim
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import funclora as fl

MICRO_BATCHES = 2  # in a step, of all processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def base() -> Any:
    torch.manual_seed(0)
    return llama()


def divided() -> Any:
    model = base()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def numbers(module: Any) -> dict[str, Any]:
    return {name: value.tolist() for name, value in module.state_dict().items()}


def run_of(trainer: Any) -> Any:
    trainer.train()
    return {"adapter": numbers(trainer.model), "history": history(trainer, "loss", "grad_norm")}


def run_trainer(folder: Path, model: Any = None, **more: Any) -> Any:
    module = module_of(base() if model is None else model, lora(use_dora=True))
    return run_of(trainer_of(module, folder, gradient_accumulation_steps=MICRO_BATCHES // world(), **more))


def run_trainer_over_fsdp(folder: Path) -> Any:
    return run_trainer(folder, divided())


def run_trainer_resumed(folder: Path) -> Any:
    """With dropout, from a checkpoint, and saved: the numbers are those of the folder."""
    folder = folder / "resumed"
    more = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": MICRO_BATCHES // world()}
    config = lora(lora_dropout=0.3)
    whole = run_of(trainer_of(module_of(base(), config), folder, **more))
    again = trainer_of(module_of(base(), config), folder, **more)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert numbers(again.model) == whole["adapter"], "resumed and uninterrupted"
    again.model.save_pretrained(folder / "adapter", is_main_process=again.is_world_process_zero())
    dist.barrier()
    adapters, _ = fl.load_peft(folder / "adapter", base())
    return {name: {"a": rule.a.tolist(), "b": rule.b.tolist()} for name, rule in adapters.items()}  # type: ignore[attr-defined]


def run_sft(folder: Path) -> Any:
    module = module_of(base(), lora())
    return run_of(sft_of(module, folder, gradient_accumulation_steps=MICRO_BATCHES // world()))


def run_accelerate(folder: Path) -> Any:
    _, module, data = regression()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES // world())
    prepared, optimizer, loader = accelerator.prepare(
        module.eval(), optim.SGD(module.parameters(), lr=0.1), DataLoader(data, batch_size=4)
    )
    for x, y in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(F.mse_loss(prepared(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return {"adapter": numbers(module)}


def fit(folder: Path, strategy: Any, kind: type[Lightning] = Lightning) -> Any:
    _, module, data = regression()
    wrapped = kind(module.eval())
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world(), strategy=strategy, max_epochs=2, logger=False, default_root_dir=folder,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accumulate_grad_batches=MICRO_BATCHES // world(), use_distributed_sampler=False,
    )  # fmt: skip
    rows: Any = DistributedSampler(data, world(), rank(), shuffle=False)  # Lightning's own would shuffle
    trainer.fit(wrapped, DataLoader(data, batch_size=4, sampler=rows))
    return {"adapter": numbers(module)}


def run_lightning(folder: Path) -> Any:
    return fit(folder, DDPStrategy() if world() > 1 else "auto")


class Configured(Lightning):
    """What Lightning's `ModelParallelStrategy` asks for: here, all could be divided, and nothing is."""

    def configure_model(self) -> None:
        pass


# --- what is refused, or warned of -----------------------------------------------------------------------------


def message(function: Callable[[], Any]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function()
        except fl.errors.UnsupportedError as error:
            return str(error)
    own = [str(each.message) for each in caught if isinstance(each.message, fl.errors.FuncloraWarning)]
    return own[0] if own else "nothing"


def forward(module: Any) -> Any:
    return F.mse_loss(module(torch.ones(4, 5)), torch.ones(4, 3)).backward()


def refused_lightning_model_parallel(folder: Path) -> str:
    strategy = ModelParallelStrategy(data_parallel_size=world(), tensor_parallel_size=1)
    return message(lambda: fit(folder, strategy, Configured))


def refused_plain_loop(folder: Path) -> str:
    return message(lambda: forward(regression()[1]))


def refused_without_gradients(folder: Path) -> str:
    with torch.no_grad():
        return message(lambda: regression()[1](torch.ones(4, 5)))


def refused_accelerate_fsdp(folder: Path) -> str:
    """accelerate takes its plugin on GPUs only; this is what it does there."""
    accelerator: Any = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    return message(lambda: forward(fsdp2_prepare_model(accelerator, regression()[1])))


def refused_fsdp_around(folder: Path) -> str:
    around = nn.Sequential(regression()[1])
    fully_shard(around)
    return message(lambda: forward(around))


def refused_fsdp1(folder: Path) -> str:
    """What Lightning's `FSDPStrategy` does, which wants a GPU."""
    wrapped = FullyShardedDataParallel(regression()[1], use_orig_params=True, device_id=torch.device("cpu"))
    return message(lambda: forward(wrapped))


def refused_fsdp1_base(folder: Path) -> str:
    wrapped = FullyShardedDataParallel(regression()[0], use_orig_params=True, device_id=torch.device("cpu"))
    return message(lambda: fl.base_params(wrapped))


RUNS: dict[str, Callable[[Path], Any]] = {
    name: value for name, value in list(globals().items()) if name.startswith(("run_", "refused_")) and name != "run_of"
}


def main(out: str, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", fl.errors.FuncloraWarning)  # what works does so without one
    dist.init_process_group("gloo")
    try:
        results = {name: RUNS[name](Path(out)) for name in names}
        Path(out, f"{rank()}.json").write_text(json.dumps(results), encoding="utf-8")
        dist.barrier()
    finally:
        gc.collect()  # a DistributedDataParallel that is freed after its group can wait for ever for gloo's thread
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
