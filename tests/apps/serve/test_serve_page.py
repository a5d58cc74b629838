"""The page in a real browser: Debian's Chromium, without a window, steered over a pipe."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import WAIT, Alone, running, save_all

CHROMIUM = shutil.which("chromium")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


class Browser:
    """A tab. Commands of the Chrome DevTools Protocol go through one pipe and come back through another."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._left, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._answers, 1 << 16)
            assert part, "Chromium has ended"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(message))

    def open(self, url: str, *, dark: bool = False) -> None:
        """Show an address in a new tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Log", "Page", "Runtime"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a script."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait for a script to be true."""
        end = time.monotonic() + WAIT
        while not self.run(script):
            assert time.monotonic() < end, self.run("document.body.innerText")
            time.sleep(0.02)

    def picture(self, file: Path) -> None:
        """Save what is seen."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        file.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])
        )


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    assert CHROMIUM is not None
    (commands, to_us), (from_us, answers) = os.pipe(), os.pipe()
    # It reads its third file and writes the fourth.
    words = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--window-size=1100,800",
        f"--user-data-dir={folder}",
    ]  # fmt: skip
    shell = f'exec "$@" 3<&{commands} 4>&{answers}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *words], pass_fds=(commands, answers), stderr=subprocess.DEVNULL
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(to_us, from_us)
    finally:
        process.kill()
        process.wait(WAIT)
        os.close(to_us)
        os.close(from_us)


def test_one_prompt_and_several_adapters(tmp_path: Path) -> None:
    folder = save_all(tmp_path / "served", 2)
    odd = "<img src=x onerror=alert(1)>"
    shutil.copytree(folder / "adapters" / "ad-0", folder / "adapters" / odd)
    alone = Alone(folder)
    with running(folder) as run, browser(tmp_path / "profile") as tab:
        tab.open(run.server.url)
        tab.until("document.querySelectorAll('#models input').length === 4")
        assert tab.run("[...document.querySelectorAll('#models label')].map(l => l.textContent)") == [
            "model (base)",
            odd,
            "ad-0",
            "ad-1",
        ]
        tab.run("document.getElementById('chat').click()")  # off
        tab.run("document.querySelectorAll('#models input').forEach(box => { box.checked = true; })")
        tab.run("document.getElementById('prompt').value = 'one <b>and</b> two'")
        tab.run("document.getElementById('send').click()")
        tab.until("document.getElementById('stop').disabled && document.querySelectorAll('article').length === 4")
        tab.picture(tmp_path / "page.png")
        found = tab.run("[...document.querySelectorAll('article')].map(a => [a.children[0].textContent,"
                        " a.children[1].textContent, a.children[2].textContent])")  # fmt: skip
        for name, text, note in found:
            adapter = {"model": None, odd: "ad-0"}.get(name, name)
            assert text == alone.text("one <b>and</b> two", adapter, 64)
            assert "tokens, first after" in note
        assert [name for name, _, _ in found] == ["model", odd, "ad-0", "ad-1"]
        assert tab.run("document.querySelectorAll('img, b, #answers script').length") == 0
        assert not [event for event in tab.events if event.get("method") == "Log.entryAdded"]


def test_errors_are_shown(tmp_path: Path) -> None:
    folder = save_all(tmp_path / "served", 1)
    with running(folder, key="secret") as run, browser(tmp_path / "profile") as tab:
        tab.open(run.server.url, dark=True)
        tab.until("document.getElementById('status').textContent.includes('API key')")
        tab.run("key = document.getElementById('key'); key.value = 'secret'; key.dispatchEvent(new Event('change'))")
        tab.until("document.querySelectorAll('#models input').length === 2")
        tab.run("document.getElementById('prompt').value = 'x'.repeat(200)")
        tab.run("document.getElementById('send').click()")
        tab.until("document.getElementById('stop').disabled && document.querySelectorAll('p.failed').length === 2")
        tab.picture(tmp_path / "errors.png")
        assert "the model's context has 128" in tab.run("document.querySelector('p.failed').textContent")
