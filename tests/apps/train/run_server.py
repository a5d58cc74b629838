"""A process that is ready to train, and does so in children that can be killed: the imports are paid for once.

Reads a line of JSON for each child: {"out": folder, "resume": ..., other settings, "kill_at": n, "kill_in": [step, n]}.
With `kill_at` the child kills itself at the n-th moment in which the disk is written to, with `kill_in` at the n-th
call of a function from its step-th step on. Answers with its exit code (negative: the signal).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dying import die_after
from tiny_runs import run, settings

from funclora._apps.train import loop
from funclora._apps.train._sinks import Metrics


class Moments:
    """Counts the moments around and amid everything that is done to the disk, and dies in one of them."""

    def __init__(self, at: int) -> None:
        self.left = at

    def pass_(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.pass_()
            out = call(*args, **kwargs)
            self.pass_()
            return out

        return watched

    def amid(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def halves(file: Path, content: bytes) -> None:
            self.pass_()
            with file.open("wb", buffering=0) as stream:
                stream.write(content[: len(content) // 2])
                self.pass_()
                stream.write(content[len(content) // 2 :])
            self.pass_()

        return halves

    def amid_line(self, line: Callable[..., Any]) -> Callable[..., Any]:
        def halves(sink: Any, content: Any) -> None:
            if self.left == 1:
                sink._stream.write(json.dumps(content).encode()[:7])
            self.pass_()
            line(sink, content)

        return halves


def child(given: dict[str, Any]) -> None:
    if within := given.pop("kill_in", None):
        nth, calls = within
        training: Any = loop._Training
        step, counter = training._step, itertools.count(1)

        def counted(self: Any) -> None:
            if next(counter) == nth:
                die_after(calls)
            step(self)

        training._step = counted
    at = given.pop("kill_at", 0)
    if at:
        moments = Moments(at)
        patched: Any = Path
        patched.write_bytes = moments.amid(Path.write_bytes)
        patched.replace = moments.around(Path.replace)
        patched.unlink = moments.around(Path.unlink)
        os.fsync = moments.around(os.fsync)
        sink: Any = Metrics
        sink.line = moments.amid_line(Metrics.line)
    run(settings(Path(given.pop("out")), **given))


def main() -> None:
    while request := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(json.loads(request))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
