"""`acd-logits generate`: answer prompts plainly and safeguarded, side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .assistant import add_assistant_arguments, load_assistant
from .columns import print_columns, terminal_shows_columns
from .command import CommandError, show, user_errors
from .loading import pair_name

if TYPE_CHECKING:
    import argparse

    from .assistant import Assistant

SUMMARY = "answer prompts plainly and safeguarded, side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits generate`."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='answer this prompt; "-", or none, reads stdin')
    parser.add_argument(
        "--input_file", type=Path, metavar="FILE", help="answer the prompts in this text file, one per line"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt and line")
    add_assistant_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Answer every prompt plainly and safeguarded, and print both answers."""
    prompts = _read_prompts(args)
    assistant = load_assistant(args)
    for prompt in prompts:
        if args.json:
            _print_json(assistant, prompt, args)
        elif terminal_shows_columns():
            print_columns(assistant, prompt, _labels(assistant))
        else:
            _print_blocks(assistant, prompt)


def _read_prompts(args: argparse.Namespace) -> list[str]:
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


def _labels(assistant: Assistant) -> tuple[str, str]:
    return "Plain", f"Safeguarded (alpha {assistant.alpha:g}, beta {assistant.beta:g})"


def _print_json(assistant: Assistant, prompt: str, args: argparse.Namespace) -> None:
    conversation = [{"role": "user", "content": prompt}]
    record = {
        "prompt": prompt,
        "plain": assistant.answer(conversation, safeguarded=False),
        "safeguarded": assistant.answer(conversation, safeguarded=True),
        "model": args.model_name_or_path,
        "pair": pair_name(args),
        "alpha": assistant.alpha,
        "beta": assistant.beta,
    }
    show(json.dumps(record) + "\n")


def _print_blocks(assistant: Assistant, prompt: str) -> None:
    show(f"Prompt: {prompt}\n\n")
    for safeguarded, label in enumerate(_labels(assistant)):
        show(f"{label}:\n")
        assistant.answer([{"role": "user", "content": prompt}], safeguarded=bool(safeguarded), on_text=show)
        show("\n\n")
