"""`acd-logits distil`: turn a pair's contrast into one prompt that stock peft runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .command import CommandParser, show, user_errors
from .train import training_parser

if TYPE_CHECKING:
    import argparse

SUMMARY = "turn a pair's contrast into one prompt that stock peft runs"


def add_arguments(parser: CommandParser) -> None:
    """Declare the arguments of `acd-logits distil`, which take long to import: they are asked for at need."""
    parser.delegate = _build_parser


def _build_parser(prog: str, description: str | None) -> CommandParser:
    from ..training.distil import DistilArguments, DistilTrainingArguments

    usage = "%(prog)s --pair PAIR --train_file FILE [options]"
    groups = (DistilArguments, DistilTrainingArguments)
    return training_parser(groups, run, prog=prog, usage=usage, description=description)


def run(args: argparse.Namespace) -> None:
    """Let the pair answer the anchors' prompts, train one prompt on what it says, and save that as an adapter."""
    from ..training import distil
    from ..training.run import load_model

    with user_errors(ImportError, OSError, RuntimeError, ValueError):
        prepared = distil.prepare_distillation(*distil.parse_distil_arguments(vars(args)))
        model = load_model(prepared)
    with user_errors(FloatingPointError, OSError, ValueError):
        distilled = distil.distil(model, prepared)
    if prepared.args.process_index == 0:
        _report(distilled.facts["training"]["held_out_loss"])
        show(f"{prepared.args.output_dir}: {len(distilled.prompt)} virtual tokens\n")


def _report(losses: dict[str, dict[str, float]]) -> None:
    from ..pairs.distilled import TOKEN_RANGES

    if not losses:
        return
    first, kept = losses.get("first", {}), losses["kept"]
    show(f"held out, before -> after {kept['epoch']:g} epochs:\n")
    for where, (words, _) in TOKEN_RANGES.items():
        names = [name for name in (f"KL{where}", f"agreement{where}") if name in kept]
        numbers = [f"{n.removesuffix(where)} {first.get(n, math.nan):.3f} -> {kept[n]:.3f}" for n in names]
        if numbers:
            show(f"{words:18} {', '.join(numbers)}\n")
