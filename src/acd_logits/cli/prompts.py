"""The prompts that `generate` and `explain` are given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .command import CommandError, user_errors

if TYPE_CHECKING:
    import argparse


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that [`read_prompts`] reads."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='answer this prompt; "-", or none, reads stdin')
    parser.add_argument(
        "--input_file", type=Path, metavar="FILE", help="answer the prompts in this text file, one per line"
    )


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts from the arguments, the file or stdin; raise CommandError where there is none."""
    if args.input_file and args.prompts:
        raise CommandError("give the prompts as arguments or with --input_file, not both")
    if args.input_file:
        with user_errors(OSError, UnicodeError), args.input_file.open(encoding="utf-8") as file:
            prompts = [line.rstrip("\n") for line in file if line.strip()]
        if not prompts:
            raise CommandError(f"{args.input_file} holds no prompt")
        return prompts
    if not args.prompts and sys.stdin.isatty():
        raise CommandError("no prompt: give one as an argument, with --input_file or on stdin")
    with user_errors(UnicodeError):
        prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in args.prompts or ["-"]]
    if not all(prompt.strip() for prompt in prompts):
        raise CommandError("the prompt is empty")
    return prompts
