r"""Train a harm judge for `acd-logits evaluate --judge harm:FOLDER` on labels by hand, and check it on fresh ones.

    python scripts/train_harm_judge.py --train_labels judged-run/labels-train.jsonl \
        --fresh_labels judged-run/labels.jsonl --output_dir harm-judge

Each file of labels lies in the results folder that it was drawn from. Texts that were trained on are left out of the
fresh labels. The folder that is written holds coefficients and rates, and no text.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acd_logits.cli.command import CommandParser, run_command, show, user_errors
from acd_logits.cli.loading import load_model
from acd_logits.cli.options import add_device_arguments, add_model_argument, not_negative
from acd_logits.evaluation.harm_training import (
    check_enough,
    default_layers,
    fresh_ones,
    read_labelled,
    require_scikit_learn,
    train,
    validate,
)
from acd_logits.evaluation.tables import markdown_table, shown_kappa
from acd_logits.files import check_new_file

if TYPE_CHECKING:
    from collections.abc import Sequence

TITLES = {
    "harmful": "Goes along or not, by the harm judge",
    "keywords": "Goes along or not, by keywords alone",
    "behaviour": "Refuses, goes along or neither",
    "refusal": "Refusal, by keywords",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--train_labels", nargs="+", type=Path, required=True, metavar="FILE", help="train on these files of labels"
    )
    parser.add_argument(
        "--fresh_labels", nargs="+", type=Path, default=[], metavar="FILE", help="check on these files of labels"
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="write the judge here")
    add_model_argument(parser)
    add_device_arguments(parser)
    parser.add_argument(
        "--layers",
        nargs="+",
        type=not_negative,
        metavar="N",
        help="read the input of these layers (default: chosen at a third, at half and at two thirds of the model)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read the labels, train, check, and show how far judge and labels agree."""
    from transformers.utils import logging

    from acd_logits.evaluation.harm import SETTINGS_NAME

    with user_errors(ImportError, OSError, ValueError):
        require_scikit_learn()
        examples = read_labelled(args.train_labels)
        check_enough(examples)
        fresh = fresh_ones(read_labelled(args.fresh_labels), examples) if args.fresh_labels else []
        check_new_file(args.output_dir / SETTINGS_NAME)
    model, tokenizer = load_model(args)
    layers = [tuple(args.layers)] if args.layers else default_layers(model.eval())
    with user_errors(OSError, ValueError), logging.tqdm(desc="Reading", unit="response") as progress:
        judge = train(model.eval(), tokenizer, args.model_name_or_path, examples, layers, progress.update)
        facts = judge.facts | {"dtype": args.dtype}
        if fresh:
            facts["fresh"] = validate(judge, model, tokenizer, fresh, examples)
        dataclasses.replace(judge, facts=facts).save(args.output_dir)
    names = [str(layer) for layer in judge.layers]
    show(f"layers {' and '.join(names)}, trained on {facts['trained_on']['read']} responses that do not refuse\n\n")
    show("\n".join(table(facts)) + f"\n\n{args.output_dir}\n")


def table(facts: dict[str, Any]) -> Sequence[str]:
    """The kappas of a judge."""
    parts = {"cross_validated": "Cross-validated", "fresh": "Fresh labels"}
    present = [name for name in parts if name in facts]
    rows = [
        [title, *(f"{shown_kappa(some)} (n = {some['n']})" for part in present for some in [facts[part][name]])]
        for name, title in TITLES.items()
    ]
    return markdown_table(["Cohen's kappa", *(parts[name] for name in present)], rows)


def main() -> int:
    """Parse, train, print; return the exit code."""
    parser = CommandParser(
        prog="train_harm_judge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
