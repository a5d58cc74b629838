"""What merging a checkpoint costs: time against `cp -r` of the same folder, and memory, both against PEFT's way.

    python examples/benchmark_merge.py --size 8      # GB of bfloat16 weights; takes three times that on the disk

PEFT's way is to load the model, merge in memory and save. Every way runs in a process of its own. Its memory is the
peak of anonymous memory (RssAnon of /proc): what a process asked for, not the pages of files that the system caches.
funclora's process also runs under a limit of 1 GiB for that (`--limit`), enforced while it runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

import funclora as fl

MIB = 1 << 20
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


class Cost(NamedTuple):
    seconds: float
    cpu: float  # seconds of processor time, which others on the machine change least
    peak: int  # bytes of anonymous memory
    done: bool


def settings(gigabytes: float) -> dict[str, object]:
    """A Llama with as many layers as the size asks for; small sizes are narrower."""
    width = 4096 if gigabytes >= 2 else 512
    layer = 2 * (2 * width * width + 2 * width * width // 4 + 3 * width * 11 * width // 4)  # bytes
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": width, "intermediate_size": 11 * width // 4, "vocab_size": 32 * width // 4,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 256, "head_dim": 64,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - 32 * width * width) / layer)),
        "tie_word_embeddings": False,
    }  # fmt: skip


def make(base: Path, adapter: Path, gigabytes: float, r: int, targets: list[str], *, dora: bool) -> None:
    """A sharded checkpoint of noise, written layer by layer, and an adapter of some of its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = settings(gigabytes)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(0)
    # Noise is made once and cut into weights: making it is slow, and no number of bytes depends on it.
    noise = (0.02 * torch.randn(2 * 10**6 if gigabytes < 2 else 5 * 10**7)).to(torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map = {}
    for name, parameter in model.state_dict().items():
        if sum(t.nbytes for t in shards[-1].values()) > 1e9:
            _save(base, shards)
        n = parameter.numel()
        start = torch.randint(10**6, ()).item()
        pieces = [noise[int(start) :]]
        while sum(map(len, pieces)) < n:
            pieces.append(noise)
        shards[-1][name] = torch.cat(pieces)[:n].reshape(parameter.shape)
        weight_map[name] = len(shards)
    _save(base, shards)
    names = {i: f"model-{i:05d}.safetensors" for i in range(1, len(shards))}
    index = {"metadata": {}, "weight_map": {name: names[i] for name, i in weight_map.items()}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    lora = fl.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, use_dora=dora)
    adapters: dict[str, fl.Rule] = {}
    for name, parameter in model.state_dict().items():
        if not any(name.endswith(f".{target}.weight") for target in targets):
            continue
        n_out, n_in = parameter.shape
        a, b = 0.01 * torch.randn(r, n_in), 0.01 * torch.randn(n_out, r)
        adapters[name] = fl.DoRA(a, b, torch.ones(n_out), scaling=2.0) if dora else fl.LoRA(a, b, scaling=2.0)
    fl.save_peft(adapter, adapters, lora)


def _save(base: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    save_file(shards[-1], base / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
    shards[-1] = {}
    shards.append({})


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process at this moment."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:"))


def measure(command: list[str], limit: int | None = None) -> Cost:
    """Run a command to its end and watch its memory; it is killed where it passes the limit."""
    start, before, peak, done = time.perf_counter(), _cpu(), 0, True
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            if limit is not None and peak > limit:
                process.kill()
                done = False
            time.sleep(0.002)
    return Cost(time.perf_counter() - start, _cpu() - before, peak, done and process.returncode == 0)


def _cpu() -> float:
    """Processor time of all processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


PEFT = """
import sys, torch, transformers, peft
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def main(argv: list[str] | None = None) -> dict[str, Cost]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=8.0, help="GB of weights")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--targets", nargs="+", default=LINEAR, help="names of linear layers")
    parser.add_argument("--limit", type=int, default=1024, help="MiB that funclora's process may take")
    parser.add_argument("--rounds", type=int, default=2, help="runs of cp and of funclora, in turns; the best counts")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out, which needs the whole model in memory")
    parser.add_argument("--folder", type=Path, help="where to work; else a temporary folder")
    options = parser.parse_args(argv)
    results: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        base, adapter, out = folder / "base", folder / "adapter", folder / "out"
        make(base, adapter, options.size, options.rank, options.targets, dora=options.dora)
        size = sum(file.stat().st_size for file in base.iterdir())
        print(f"{size / 1e9:.2f} GB in {len(list(base.iterdir())) - 2} files")
        merge = [
            sys.executable,
            "-c",
            "from funclora.cli import main; main()",
            "merge",
            str(base),
            str(adapter),
            "-o",
            str(out),
        ]
        commands = {"cp -r": ["cp", "-r", str(base), str(out)], "funclora merge": merge}
        for i in range(options.rounds):
            for way, command in commands.items():
                subprocess.run(["sync"], check=True)
                cost = measure(command, options.limit * MIB if way != "cp -r" else None)
                report(way, cost)
                if i == 0 or cost.seconds < results[way].seconds:
                    results[way] = cost
                shutil.rmtree(out, ignore_errors=True)
        if not options.no_peft:
            subprocess.run(["sync"], check=True)
            results["PEFT"] = measure([sys.executable, "-c", PEFT, str(base), str(adapter), str(out)])
            report("PEFT", results["PEFT"])
    ratio = results["funclora merge"].seconds / results["cp -r"].seconds
    print(f"funclora merge takes {ratio:.2f} times as long as cp -r (best of {options.rounds})")
    return results


def report(way: str, cost: Cost) -> None:
    end = "" if cost.done else "  did not end well"
    cpu = f"{cost.cpu:8.1f} s of processor time"
    print(f"{way:16}{cost.seconds:8.1f} s{cpu}{cost.peak / MIB:10,.0f} MiB of anonymous memory{end}", flush=True)


if __name__ == "__main__":
    main()
