"""`acd-logits train`: train a prompt pair for a model."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from .command import CommandParser, show, user_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainingArguments

    from ..pairs.prompt_pair import PromptPair

SUMMARY = "train a prompt pair for a model"


def add_arguments(parser: CommandParser) -> None:
    """Declare the arguments of `acd-logits train`, which take long to import: they are asked for at need."""
    parser.delegate = _build_parser


def _build_parser(prog: str, description: str | None) -> CommandParser:
    from ..training import OPOArguments, OPOTrainingArguments

    usage = "%(prog)s --train_file FILE [options]"
    return training_parser((OPOArguments, OPOTrainingArguments), run, prog=prog, usage=usage, description=description)


def training_parser(
    groups: tuple[type, ...], run: Callable[[argparse.Namespace], None], **kwargs: Any
) -> CommandParser:
    """The parser of our arguments, and of those of transformers' `TrainingArguments`.

    Args:
        groups: the dataclasses of both.
        run: the command.
        kwargs: as of `ArgumentParser`.
    """
    from transformers import HfArgumentParser

    class TrainParser(HfArgumentParser, CommandParser):
        def __init__(self, **kwargs: Any) -> None:
            HfArgumentParser.__init__(self, groups, **kwargs)

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = TrainParser(formatter_class=Formatter, **kwargs)
    parser.add_argument("--no_chat", action="store_false", dest="chat", default=None, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Train SP and AP on an anchor set, save the pair and, if asked to, push it to a private repository."""
    from .. import training

    with user_errors(ImportError, OSError, RuntimeError, ValueError):
        prepared = training.prepare(*training.parse_arguments(vars(args)))
        model = training.load_model(prepared)
    with user_errors(FloatingPointError, OSError, ValueError):
        pair = training.train_pair(model, prepared)
    if prepared.args.process_index == 0:
        _report_pair(pair, prepared.args)


def _report_pair(pair: PromptPair, arguments: TrainingArguments) -> None:
    losses = pair.config.training["held_out_loss"]
    if losses:
        first, kept = losses.get("first", {}), losses["kept"]
        show(f"held out, before -> after {kept['epoch']:g} epochs:\n")
        for stream in ("SP", "AP", "ACD"):
            names = [name for name in kept if name.startswith(f"{stream}_") and not name.endswith("_first")]
            numbers = (f"{n.removeprefix(f'{stream}_')} {first.get(n, math.nan):.3f} -> {kept[n]:.3f}" for n in names)
            show(f"{stream:4} {', '.join(numbers)}\n")
    show(f"{arguments.output_dir}: {len(pair.safeguarding)} and {len(pair.adversarial)} virtual tokens\n")
    if arguments.push_to_hub:
        with user_errors(OSError, ValueError):
            revision, token = arguments.hub_revision, arguments.hub_token
            show(f"{pair.push_to_hub(arguments.hub_model_id, revision=revision, token=token).commit_url}\n")
