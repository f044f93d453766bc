"""`acd-logits export`: write a model folder whose `generate()` is safeguarded by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..demo_model import resolve_model_name
from .command import CommandError, show, user_errors
from .loading import hide_progress_bars, load_pair
from .options import add_contrast_arguments, add_model_argument, add_pair_arguments

if TYPE_CHECKING:
    import argparse

SUMMARY = "write a model folder whose generate() is safeguarded by itself"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits export`."""
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="write this folder, which must not exist yet"
    )
    add_model_argument(parser)
    add_pair_arguments(parser)
    add_contrast_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the folder: the model's files, linked, the prompt pair, and the tokenizer."""
    if args.output_dir.exists():
        raise CommandError(f"{args.output_dir} exists: choose a new folder")
    from ..decoding.export import export

    hide_progress_bars()
    with user_errors(ImportError, OSError, RuntimeError, ValueError):
        pair = load_pair(args)
        export(resolve_model_name(args.model_name_or_path), args.output_dir, pair, alpha=args.alpha, beta=args.beta)
    show(f"{args.output_dir}\n")
