"""`acd-logits push`: upload a prompt pair, or a distilled adapter, to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import CommandError, show, user_errors
from .loading import hide_progress_bars

if TYPE_CHECKING:
    import argparse

SUMMARY = "upload a prompt pair, or a distilled adapter, to the Hugging Face Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits push`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pair", type=Path, metavar="FOLDER", help="upload the pair in this folder")
    source.add_argument("--adapter", type=Path, metavar="FOLDER", help="upload the distilled adapter in this folder")
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
        metavar="TEXT",
        help="describe the commit in these words (default: Upload prompt pair, or Upload distilled adapter)",
    )
    parser.add_argument(
        "--license", metavar="ID", help="name this license in the model card, such as apache-2.0 (default: name none)"
    )
    parser.add_argument(
        "--token", help="log in with this token (default: HF_TOKEN, or the one that hf auth login stored)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Upload what was saved, and the README.md of its folder if that is the user's own."""
    from ..pairs.distilled import DistilledPrompt
    from ..pairs.model_card import own_card
    from ..pairs.prompt_pair import PromptPair

    folder = args.pair or args.adapter
    if not folder.is_dir():
        raise CommandError(f"{folder} is not a folder")
    hide_progress_bars()
    with user_errors(OSError, ValueError):
        saved: Any = (PromptPair if args.pair else DistilledPrompt).from_pretrained(folder)
        commit = saved.push_to_hub(
            args.hub_model_id,
            private=not args.public,
            revision=args.revision,
            **({"commit_message": args.commit_message} if args.commit_message else {}),
            token=args.token,
            create_pr=args.create_pr,
            license=args.license,
            model_card=own_card(folder),
        )
    show(f"{commit.pr_url or commit.commit_url}\n")
