"""`acd-logits export-vllm`: write a folder that vLLM serves with the contrast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..demo_model import resolve_model_name
from ..pairs.texts import MANUAL_TEXTS, OPPOSITE_PROMPT, SAFE_PROMPT
from .command import CommandError, show, user_errors
from .loading import hide_progress_bars, load_pair, pair_name
from .options import add_contrast_arguments, add_model_argument, add_pair_arguments, checked

if TYPE_CHECKING:
    import argparse

SUMMARY = "write a folder that vLLM serves with the contrast"

_scale = checked(float, lambda value: 1 <= value < float("inf"), "a finite number of at least 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits export-vllm`."""
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="write this folder, which must not exist yet"
    )
    add_export_arguments(parser)
    parser.set_defaults(run=run)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is exported."""
    add_model_argument(parser)
    add_pair_arguments(parser)
    for name, which in (("positive", "steer towards"), ("negative", "steer away from")):
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="FILE",
            help=f"{which} the system prompt in this text file (with --pair {MANUAL_TEXTS}; default: the manual one)",
        )
    parser.add_argument(
        "--prompt_type",
        choices=["embedding", "key_value"],
        help=f"make prompts of this kind from the texts (with --pair {MANUAL_TEXTS}; default: embedding)",
    )
    add_contrast_arguments(parser)
    parser.add_argument(
        "--guidance_scale",
        type=_scale,
        metavar="G",
        help="set the strength as that of classifier-free guidance: --alpha 1 - 1 / G",
    )


def run(args: argparse.Namespace) -> None:
    """Write a folder for vLLM: the model's files, linked, the prompt pair, and the tokenizer."""
    export_to(args.output_dir, args)
    show(f"{args.output_dir}\n")


def export_to(folder: Path, args: argparse.Namespace) -> None:
    """Write the folder that the arguments ask for."""
    if folder.exists():
        raise CommandError(f"{folder} exists: choose a new folder")
    if args.alpha is not None and args.guidance_scale is not None:
        raise CommandError("--alpha and --guidance_scale are two names of one number: give one of them")
    alpha = args.alpha if args.guidance_scale is None else 1 - 1 / args.guidance_scale
    if pair_name(args) != MANUAL_TEXTS:
        for name in ("positive", "negative", "prompt_type"):
            if getattr(args, name) is not None:
                raise CommandError(f"--{name} is about texts in place of a learned pair: add --pair {MANUAL_TEXTS}")
    texts = _text(args.positive, SAFE_PROMPT), _text(args.negative, OPPOSITE_PROMPT)
    from ..vllm.export import export

    hide_progress_bars()
    with user_errors(ImportError, OSError, RuntimeError, ValueError):
        pair = load_pair(args)
        model_path = resolve_model_name(args.model_name_or_path)
        kind = args.prompt_type or "embedding"
        export(model_path, folder, pair, texts=texts, prompt_type=kind, alpha=alpha, beta=args.beta)


def _text(path: Path | None, default: str) -> str:
    if path is None:
        return default
    with user_errors(OSError, UnicodeError):
        text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise CommandError(f"{path} holds no text")
    return text
