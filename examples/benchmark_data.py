"""Training on data larger than memory: time and peak memory of tokenising, of training, and of going on from the cache.

Run by hand: `python examples/benchmark_data.py --gib 2 --folder /tmp/data`. It needs five times the space of the data,
and removes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

COMMAND = "from funclora.cli import main; main()"
WORD = re.compile(r"\w+|\W+")


def write(file: Path, size: int) -> int:
    """Records of texts, of words of Python's own sources in random order; returns their number."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    words = WORD.findall("".join(source.read_text(encoding="utf-8") for source in sources[:40]))
    generator, written, n = random.Random(0), 0, 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            start = generator.randrange(len(words) - 1000)
            written += stream.write(json.dumps({"text": f"{n} {''.join(words[start : start + 600])}"}) + "\n")
            n += 1
    return n


def timed(*arguments: object) -> tuple[float, float]:
    """Seconds and peak memory in MiB of the command."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", COMMAND, "train", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"it failed: {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        file, out = options.folder / "data.jsonl", options.folder / "run"
        n = write(file, int(options.gib * 2**30))
        print(f"{file.stat().st_size / 2**30:.2f} GiB, {n:,} records", flush=True)
        common = ("--validation-split", "0.0001", "--batch", "4", "--log-every", "1", "--out", out)
        seconds, memory = timed("--data", file, "--steps", "4", *common)
        stored = sum(part.stat().st_size for part in (out / "cache").iterdir())
        print(
            f"tokenised and trained: {seconds:.0f} s, {memory:.0f} MiB; cache of {stored / 2**30:.2f} GiB", flush=True
        )
        seconds, memory = timed("--out", out, "--resume", "--steps", "8")
        print(f"resumed from the cache: {seconds:.0f} s, {memory:.0f} MiB", flush=True)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
