"""Where a server of ours listens."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING

from .command import CommandError
from .options import checked

if TYPE_CHECKING:
    import argparse

_port = checked(int, lambda value: 0 < value < 65536, "a port from 1 to 65535")


def add_address_arguments(group: argparse._ActionsContainer, default_port: int) -> None:
    """Declare where a server listens."""
    group.add_argument("--host", default="127.0.0.1", help="listen at this address (default: %(default)s)")
    group.add_argument("--port", type=_port, default=default_port, help="listen at this port (default: %(default)s)")


def check_address(host: str, port: int) -> None:
    """Raise CommandError if no server can listen there; to be asked before a model is loaded."""
    try:
        with contextlib.closing(socket.create_server((host, port))):
            pass
    except OSError as error:
        raise CommandError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
