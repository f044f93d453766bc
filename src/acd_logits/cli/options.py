"""Arguments that several commands share, and types that check a number."""

from __future__ import annotations

import argparse
import contextlib
import math
from typing import TYPE_CHECKING

from ..demo_model import DEMO_MODEL, DEMO_PAIR
from ..pairs.texts import MANUAL_TEXTS

if TYPE_CHECKING:
    from collections.abc import Callable


def checked(convert: type[int] | type[float], accepts: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """Make an argparse type for a number in a range."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if accepts(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")

    return parse


positive_int = checked(int, lambda value: value >= 1, "a whole number of at least 1")
not_negative = checked(int, lambda value: value >= 0, "a whole number of at least 0")
finite = checked(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
above_zero = checked(float, lambda value: 0 < value < math.inf, "a finite number above 0")
threshold = checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
share = checked(float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def add_model_argument(group: argparse._ActionsContainer) -> None:
    """Declare which model."""
    group.add_argument(
        "--model_name_or_path",
        default=DEMO_MODEL,
        help="use the model in this folder or with this Hub id (default: %(default)s)",
    )


def add_pair_arguments(group: argparse._ActionsContainer) -> None:
    """Declare which prompt pair."""
    group.add_argument(
        "--pair",
        help=f"use the learned prompt pair in this folder or with this Hub id; {MANUAL_TEXTS} takes the two manual "
        f"prompts (default: {DEMO_PAIR}, the demo model's own; {MANUAL_TEXTS} with any other model)",
    )
    group.add_argument("--revision", help="read the pair from this branch, tag or commit on the Hub")


def add_adapter_argument(group: argparse._ActionsContainer) -> None:
    """Declare which distilled adapter."""
    group.add_argument(
        "--adapter", help="use the distilled adapter in this folder or with this Hub id, as acd-logits distil makes it"
    )


def add_device_arguments(group: argparse._ActionsContainer) -> None:
    """Declare where the model runs, and in which type."""
    group.add_argument("--device", help="run on this device, such as cpu or cuda:1 (default: cuda if there is one)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="load the weights in this type (default: %(default)s, as the model was saved)",
    )


def add_contrast_arguments(group: argparse._ActionsContainer) -> None:
    """Declare the strength of the contrast and its plausibility threshold."""
    group.add_argument(
        "--alpha",
        type=finite,
        help="set the strength of the contrast; 0 leaves the safeguarding prompt alone (default: the pair's)",
    )
    group.add_argument(
        "--beta",
        type=threshold,
        help="keep only tokens with at least this share of the top probability (default: the pair's)",
    )


def add_horizon_argument(group: argparse._ActionsContainer) -> None:
    """Declare how long the contrast lasts."""
    group.add_argument("--horizon", type=positive_int, help="contrast only this many new tokens (default: all)")


def add_speed_arguments(group: argparse._ActionsContainer) -> None:
    """Declare what makes a contrast faster."""
    add_horizon_argument(group)
    group.add_argument(
        "--share_instruction_kv",
        action=argparse.BooleanOptionalAction,
        help="keep one copy of the prompt's keys and values for both streams (default: as the pair was trained)",
    )


def add_length_argument(group: argparse._ActionsContainer, default: int) -> None:
    """Declare how long a response may get."""
    group.add_argument(
        "--max_new_tokens",
        type=positive_int,
        default=default,
        help="stop a response after this many tokens (default: %(default)s)",
    )


def add_batch_argument(group: argparse._ActionsContainer, default: int) -> None:
    """Declare how many requests share a batch."""
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=default,
        help="answer this many requests together (default: %(default)s)",
    )
