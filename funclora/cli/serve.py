"""`funclora serve`: a base model and its adapters behind OpenAI's HTTP interface."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from funclora.cli._base import Device, Dtype, Quantize
from funclora.cli._output import AsJson, print_json
from funclora.cli._settings import setting

if TYPE_CHECKING:
    from funclora._apps.serve.server import Server


class Pooling(str, Enum):
    """How the vectors of a text's tokens become one."""

    mean = "mean"
    first = "first"
    last = "last"


def serve(
    base: Annotated[
        Path | None, typer.Argument(help="Folder of a transformers model with its tokenizer.", show_default=False)
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder that contains PEFT folders, whose names are the models' names.", show_default="none"),
    ] = None,
    demo: Annotated[
        bool, typer.Option(help="Serve the demo's base, with --adapters or adapters that are trained in some seconds.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 is a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that requests must have; better given as FUNCLORA_API_KEY.",
            envvar="FUNCLORA_API_KEY",
            show_envvar=False,
            show_default="none",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the base model.", show_default="the folder's")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Number of answers that are generated at a time.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, help="Number of further answers that may wait.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Maximum size of a request in KiB.")] = 1024,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that an answer may take.")] = 600.0,
    memory: Annotated[str, typer.Option(help="Memory for adapters; the least recently used ones make room.")] = "1GiB",
    prefix_memory: Annotated[
        str,
        typer.Option(
            help="Memory for the beginnings of prompts, which are read once for all prompts of an adapter that begin "
            "alike; 0 is none."
        ),
    ] = "256MiB",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the base weights; auto keeps the folder's.")] = Dtype.auto,
    quantize: Annotated[Quantize, typer.Option(help="Quantise the base weights.")] = Quantize.none,
    device: Device = "auto",
    chat_template: Annotated[Path | None, setting("chat_template")] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            help="Vector of a text of an encoder: the mean over its tokens, or the first or last of them.",
            show_default="as sentence-transformers' folder says, otherwise mean",
        ),
    ] = None,
    allow_loading: Annotated[
        bool, typer.Option(help="Let requests load and unload adapters of the folder --adapters.")
    ] = False,
    access_log: Annotated[bool, typer.Option(help="Write a line about each request on stderr.")] = False,
    json: AsJson = False,
) -> None:
    """Serve a model and its adapters by HTTP, as OpenAI does; requests for different adapters share every batch.

    /v1/completions and /v1/chat/completions answer, as a stream if asked to; /v1/models lists the names. A page to try
    adapters side by side is at /. The folder of adapters is looked at for each request: an adapter that is put there
    can be used at once, and one that is replaced serves the requests that come from then on.

    SIGTERM and Ctrl-C let running answers end.

    Examples:
        funclora serve model --adapters adapters
        funclora serve --demo
        funclora serve model --adapters adapters --port 8080 --max-rows 32 --quantize nf4
    """
    import tempfile

    from funclora.errors import ConfigError

    if demo == (base is not None):
        raise ConfigError("Give either the folder of a model, or --demo.")
    if demo and chat_template is not None:
        raise ConfigError("--chat-template: the demo's base reads no chats. Leave it out.")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ConfigError("--api-key: expected printable ASCII characters without spaces around them.")
    if allow_loading and adapters is None and not demo:
        raise ConfigError("--allow-loading needs the folder of --adapters, from which adapters are loaded.")

    from funclora._apps.serve.server import Server
    from funclora._apps.serve.settings import Limits, ServeSettings
    from funclora._apps.sweep.memory import parse_size

    with contextlib.ExitStack() as folders:
        if demo and adapters is None:
            adapters = _trained(Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="funclora-"))))
        server = Server(
            ServeSettings(
                base=base,
                adapters=adapters,
                name=name,
                host=host,
                port=port,
                key=api_key,
                limits=Limits(max_tokens=max_tokens, body=max_body << 10, seconds=timeout),
                max_rows=max_rows,
                max_queue=max_queue,
                memory=parse_size(memory),
                prefix_memory=parse_size(prefix_memory, "--prefix-memory"),
                dtype=dtype.value,
                quantize=quantize.value,
                device=device,
                chat_template=chat_template,
                pooling=None if pooling is None else pooling.value,
                loading=allow_loading,
                access_log=access_log,
            )
        )
        with _frozen():
            _show(server, json=json)
            server.run()


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Spare the collector of garbage what is there now.

    The modules of torch and transformers are hundreds of thousands of objects that never become garbage. A full
    collection looks at all of them, and no answer goes on for that time; every change of a batch brings the next one.
    """
    gc.collect()  # or what is garbage now would stay for ever
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _trained(folder: Path) -> Path:
    """A few adapters of the demo's base, in a folder that is there as long as the server."""
    from rich.progress import BarColumn, Progress, TextColumn

    from funclora._apps.train.console import Console
    from funclora.demo.run import DemoSettings, train_only

    settings = DemoSettings(domains=2, steps=10, batch=2, context=128)
    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training adapters", total=settings.steps)
        return train_only(folder, settings, lambda text: bar.update(task, advance=1, description=text))


def _show(server: Server, *, json: bool) -> None:
    """What is served, as soon as it can be asked."""
    import sys

    names = server.names.all()
    if json:
        print_json({"url": server.url, "model": server.names.base, "adapters": names, "notes": server.notes})
    else:
        some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        typer.echo(f"{server.url} serves {server.names.base} and {len(names)} adapters{': ' if some else ''}{some}")
        for note in server.notes:
            typer.echo(note)
    sys.stdout.flush()
