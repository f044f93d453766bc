"""`acd-logits` itself: it names the commands and runs the one that is asked for."""

from __future__ import annotations

from .. import __version__
from . import anchors, chat, demo, distil, evaluate, explain, export, export_vllm, generate, push, serve, train
from .command import Command, CommandParser, run_command

COMMANDS: dict[str, Command] = {
    "generate": generate,
    "chat": chat,
    "explain": explain,
    "demo": demo,
    "anchors": anchors,
    "train": train,
    "distil": distil,
    "evaluate": evaluate,
    "push": push,
    "export": export,
    "export-vllm": export_vllm,
    "serve": serve,
}


def main(argv: list[str] | None = None) -> int:
    """Run the `acd-logits` command.

    Args:
        argv (`list[str]`, *optional*): the arguments; default: those of the process.

    Returns:
        `int`: the exit code.
    """
    parser = CommandParser(prog="acd-logits", description="Decode causal language models more safely.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        summary = command.SUMMARY
        command.add_arguments(
            commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        )
    return run_command(parser, argv)
