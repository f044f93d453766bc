"""`acd-logits generate`: answer prompts plainly and safeguarded, side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .assistant import add_assistant_arguments, load_assistant
from .columns import print_columns, terminal_shows_columns
from .command import show
from .loading import pair_name
from .options import add_adapter_argument
from .prompts import add_prompt_arguments, read_prompts

if TYPE_CHECKING:
    import argparse

    from .assistant import Assistant

SUMMARY = "answer prompts plainly and safeguarded, side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits generate`."""
    add_prompt_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt and line")
    add_adapter_argument(parser)
    add_assistant_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Answer every prompt plainly and safeguarded, and print both answers."""
    prompts = read_prompts(args)
    assistant = load_assistant(args, adapter=args.adapter)
    for prompt in prompts:
        if args.json:
            _print_json(assistant, prompt, args)
        elif terminal_shows_columns():
            print_columns(assistant, prompt, _labels(assistant, args))
        else:
            _print_blocks(assistant, prompt, _labels(assistant, args))


def _labels(assistant: Assistant, args: argparse.Namespace) -> tuple[str, str]:
    how = "Distilled" if args.adapter else "Safeguarded"
    return "Plain", f"{how} (alpha {assistant.alpha:g}, beta {assistant.beta:g})"


def _print_json(assistant: Assistant, prompt: str, args: argparse.Namespace) -> None:
    conversation = [{"role": "user", "content": prompt}]
    record = {
        "prompt": prompt,
        "plain": assistant.answer(conversation, safeguarded=False),
        "safeguarded": assistant.answer(conversation, safeguarded=True),
        "model": args.model_name_or_path,
        **({"adapter": args.adapter} if args.adapter else {"pair": pair_name(args)}),
        "alpha": assistant.alpha,
        "beta": assistant.beta,
    }
    show(json.dumps(record) + "\n")


def _print_blocks(assistant: Assistant, prompt: str, labels: tuple[str, str]) -> None:
    show(f"Prompt: {prompt}\n\n")
    for safeguarded, label in enumerate(labels):
        show(f"{label}:\n")
        assistant.answer([{"role": "user", "content": prompt}], safeguarded=bool(safeguarded), on_text=show)
        show("\n\n")
