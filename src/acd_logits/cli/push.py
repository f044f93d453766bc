"""`acd-logits push`: upload a prompt pair to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .command import CommandError, show, user_errors
from .loading import hide_progress_bars

if TYPE_CHECKING:
    import argparse

SUMMARY = "upload a prompt pair to the Hugging Face Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits push`."""
    parser.add_argument("--pair", type=Path, required=True, metavar="FOLDER", help="upload the pair in this folder")
    parser.add_argument(
        "--hub_model_id",
        required=True,
        metavar="ORG/NAME",
        help="upload to this repository, which is made if it is missing",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="let anyone read it; the adversarial prompt is a jailbreak for its model (default: private)",
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="commit to this branch, which is made if it is missing (default: main)"
    )
    parser.add_argument("--create_pr", action="store_true", help="open a pull request with the commit")
    parser.add_argument(
        "--commit_message",
        default="Upload prompt pair",
        metavar="TEXT",
        help="describe the commit in these words (default: %(default)s)",
    )
    parser.add_argument(
        "--license", metavar="ID", help="name this license in the model card, such as apache-2.0 (default: name none)"
    )
    parser.add_argument(
        "--token", help="log in with this token (default: HF_TOKEN, or the one that hf auth login stored)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Upload a saved pair, and the README.md of its folder if that is the user's own."""
    from ..pairs.model_card import own_card
    from ..pairs.prompt_pair import PromptPair

    if not args.pair.is_dir():
        raise CommandError(f"{args.pair} is not a folder")
    hide_progress_bars()
    with user_errors(OSError, ValueError):
        commit = PromptPair.from_pretrained(args.pair).push_to_hub(
            args.hub_model_id,
            private=not args.public,
            revision=args.revision,
            commit_message=args.commit_message,
            token=args.token,
            create_pr=args.create_pr,
            license=args.license,
            model_card=own_card(args.pair),
        )
    show(f"{commit.pr_url or commit.commit_url}\n")
