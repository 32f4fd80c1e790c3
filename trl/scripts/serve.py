"""`trl serve`: a server with the interface of OpenAI, by the program of a library that is installed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trl.import_utils import is_installed, pip_install
from trl.scripts.exit_codes import INTERRUPTED
from trl.scripts.open_model import LANGUAGE_MODEL, Found, find_model
from trl.scripts.quiet import quiet, say, without_secrets

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PACKAGES = {"vllm": ("vllm",), "transformers": ("transformers[serving]",)}
"""engine -> what to install for it"""


def command(
    model: Annotated[str, typer.Argument(help="Output folder of a run, checkpoint, adapter, or model.")],
    more: Annotated[list[str] | None, typer.Argument(help="After `--`: options of the server itself.")] = None,
    engine: Annotated[
        Literal["auto", "vllm", "transformers"],
        typer.Option(help="Program that serves; auto: vLLM where it is installed."),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    only_print: Annotated[bool, typer.Option("--print", help="Print the command, and run nothing.")] = False,
) -> int:
    """Serve a model at /v1/chat/completions, by `vllm serve` or `transformers serve`, whichever is installed.

    The command that is run is printed first. These programs read whole models, so an adapter is merged into a folder
    that lasts as long as the server. Nobody is asked for a password: --host 0.0.0.0 lets every machine in.
    """
    found = find_model(model)
    if found.kind != LANGUAGE_MODEL:
        raise ValueError(f"{model}: it is a {found.kind}; a server for it is a program of your own")
    chosen = engine_of(engine)
    name = Path(model).name or model
    if only_print:
        place = found.place if found.adapter is None else f"{model.rstrip('/')}-merged"
        if found.adapter is not None:
            print(f"trl merge {shlex.quote(model)} --output {shlex.quote(place)}")
        print(shlex.join(line_of(chosen, place, name, host, port, more or ())))
        return 0
    check_port(host, port)
    with quiet(), whole_model(found, name) as (place, folder):
        words = line_of(chosen, place, name, host, port, more or ())
        print(f"running{'' if folder is None else f' in {folder}'}: {shlex.join(without_secrets(words))}")
        asked = name if chosen == "vllm" else place
        print(f"it answers at http://{host}:{port}/v1/chat/completions for the model {asked!r}; Ctrl-C ends it")
        if host not in LOOPBACK:
            say(f"--host {host}: whoever reaches this machine can use the model, without a password")
        sys.stdout.flush()
        return run_program([program(chosen), *words[1:]], folder)


def engine_of(asked: str) -> str:
    """vllm or transformers; ImportError says what to install."""
    from transformers.utils.import_utils import is_serve_available

    there: dict[str, Callable[[], bool]] = {
        "vllm": lambda: is_installed("vllm"), "transformers": lambda: bool(is_serve_available())
    }  # fmt: skip
    for engine in there if asked == "auto" else [asked]:
        if there[engine]():
            return engine
    ways = " or ".join(pip_install(*packages) for name, packages in PACKAGES.items() if asked in ("auto", name))
    raise ImportError(f"no program to serve with is installed: {ways}")


def line_of(engine: str, place: str, name: str, host: str, port: int, more: Sequence[str]) -> list[str]:
    """The words of the server's command."""
    words = [engine, "serve", place, "--host", host, "--port", str(port)]
    return [*words, *(("--served-model-name", name) if engine == "vllm" else ()), *more]


def program(engine: str) -> str:
    """The program that belongs to this Python."""
    beside = Path(sys.executable).parent / engine
    found = str(beside) if beside.is_file() else shutil.which(engine)
    if found is None:
        raise ValueError(f"{engine} is installed, and its program `{engine}` is not to be found; put it on the PATH")
    return found


def check_port(host: str, port: int) -> None:
    """ValueError where something listens there already."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another"
        ) from error


@contextmanager
def whole_model(found: Found, name: str) -> Iterator[tuple[str, str | None]]:
    """The folder or name of a whole model, and the folder to start the server in; None: where we are.

    An adapter is merged into a folder that goes afterwards. The server is started beside it: transformers' answers for
    no other name than that of the folder it was started with.
    """
    if found.adapter is None:
        yield found.place, None
        return
    from trl.scripts.merge import merge, mergeable

    with tempfile.TemporaryDirectory(prefix="trl-serve-") as folder:
        say(f"{found.name} is an adapter: it is merged into {found.base} for the server")
        merge(mergeable(found.name), Path(folder) / name)
        yield name, folder


def run_program(words: Sequence[str], folder: str | None = None) -> int:
    """Run the server until it ends; SIGTERM is passed on, and Ctrl-C reaches it by itself."""
    child = subprocess.Popen(list(words), env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, cwd=folder)

    def pass_on(number: int, frame: Any) -> None:
        child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                say("the server ends")
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:
            child.terminate()
    return INTERRUPTED if code == -signal.SIGINT else 128 - code if code < 0 else code
