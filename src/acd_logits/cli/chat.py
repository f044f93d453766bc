"""`acd-logits chat`: talk with the safeguarded model."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from .assistant import add_assistant_arguments, load_assistant
from .command import note, show, user_errors

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

SUMMARY = "talk with the safeguarded model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits chat`."""
    add_assistant_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Hold a conversation with the safeguarded model: one turn per line of stdin, until `/exit` or its end."""
    assistant = load_assistant(args, needs_chat_template=True)
    if sys.stdin.isatty():
        note("/reset starts a new conversation, /exit quits.")
    conversation: list[dict[str, str]] = []
    for line in _read_turns():
        if line == "/exit":
            break
        if line == "/reset":
            conversation = []
        elif line:
            conversation.append({"role": "user", "content": line})
            # The whole conversation is read again in each turn. A kept cache would save that time, but chat templates
            # are free to render earlier turns differently later (some drop the reasoning), and it would be stale then.
            answer = assistant.answer(conversation, safeguarded=True, on_text=show)
            conversation.append({"role": "assistant", "content": answer})
            show("\n\n")


def _read_turns() -> Iterator[str]:
    """Yield the user's lines, with a prompt and line editing where stdin is a terminal."""
    if not sys.stdin.isatty():
        with user_errors(UnicodeError):
            yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # absent on Windows, whose console edits lines by itself
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            show("\n")
            return
        yield line.strip()
