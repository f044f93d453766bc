"""What every command is made of: a parser, a run that ends in an exit code, and errors of one line.

torch and transformers are imported by the functions that need them, so that `--help` and usage errors take no time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class CommandError(Exception):
    """A failure that the user can mend; its message is shown as one line, without a traceback."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports a usage error in one line."""

    # Builds, from the program's name and description, the parser that does the work: for one whose arguments take
    # long to import
    delegate: Callable[[str, str | None], argparse.ArgumentParser] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: D102
        if self.delegate is not None:
            return self.delegate(self.prog, self.description).parse_known_args(args, namespace)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:  # noqa: D102
        self.exit(2, f"{self.prog.split()[0]}: error: {message} (see {self.prog} --help)\n")


class Command(Protocol):
    """A module of this package that holds one command."""

    SUMMARY: str

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments, and set `run`: it takes the parsed ones and raises `CommandError`."""
        ...


def run_command(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """Parse the arguments, run the command they name and turn its failures into an exit code.

    Args:
        parser (`argparse.ArgumentParser`): sets `run`, a function of the parsed arguments.
        argv (`list[str]`, *optional*): the arguments; default: those of the process.

    Returns:
        `int`: 0, 1 for a `CommandError` or a transformers that is missing or unknown, 130 after Ctrl-C, 141 if the
            reader of the output went away.
    """
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold characters that an old terminal or a Windows pipe cannot encode.
        sys.stdout.reconfigure(errors="replace")
    try:
        args.run(args)
        sys.stdout.flush()
    except (CommandError, ImportError) as error:
        if isinstance(error, ImportError) and error.name != "transformers":  # it is missing, or not one ACD knows
            raise
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def run_script(command: Command, description: str | None) -> int:
    """Run one command as a script of its own.

    Args:
        command (`Command`): the command's module.
        description (`str`): the script's docstring, which `--help` shows.

    Returns:
        `int`: the exit code, as of [`run_command`].
    """
    parser = CommandParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    return run_command(parser)


@contextlib.contextmanager
def user_errors(*types: type[Exception]) -> Iterator[None]:
    """Report these exceptions as the user's: those of a step that can only fail because of its input."""
    try:
        yield
    except types as error:
        # Messages of transformers run over several lines, and one of them lists every model class.
        raise CommandError(textwrap.shorten(str(error), 500, placeholder=" ...")) from error


def show(text: str) -> None:
    """Print to stdout at once, without a line end."""
    print(text, end="", flush=True)


def note(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr)
