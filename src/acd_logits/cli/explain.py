"""`acd-logits explain`: answer prompts and show what the contrast did to each token."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_text
from .assistant import add_assistant_arguments, load_assistant
from .command import CommandError, note, show, user_errors
from .loading import pair_name
from .options import positive_int
from .prompts import add_prompt_arguments, read_prompts

if TYPE_CHECKING:
    import argparse

SUMMARY = "answer prompts and show what the contrast did to each token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits explain`."""
    add_prompt_arguments(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per prompt and line")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page to this file")
    parser.add_argument(
        "--num_candidates",
        type=positive_int,
        default=5,
        metavar="N",
        help="keep the N likeliest tokens of each stream (default: %(default)s)",
    )
    add_assistant_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Answer every prompt with the contrast, and show a table of the new tokens."""
    prompts = read_prompts(args)
    if args.html and not args.html.parent.is_dir():
        raise CommandError(f"{args.html.parent} is not a folder")  # now, and not after the last answer
    assistant = load_assistant(args)
    pages = []
    for prompt in prompts:
        with user_errors(ValueError):
            explanation = assistant.explain(prompt, args.num_candidates)
        if args.json:
            names = {"model": args.model_name_or_path, "pair": pair_name(args)}
            show(json.dumps(explanation.to_dict() | names) + "\n")
        elif args.html:
            pages.append(explanation.to_dict())
        else:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            show(explanation.to_text(_shows_colors(), width) + "\n\n")
    if args.html:
        from ..decoding.html_view import to_page

        with user_errors(OSError):
            write_text(args.html, to_page(pages))
        note(f"{args.html} is written: open it in a browser.")


def _shows_colors() -> bool:
    """Whether stdout is a terminal with colours, and the user has not turned them off (no-color.org)."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
