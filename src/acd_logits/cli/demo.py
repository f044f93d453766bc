"""`acd-logits demo`: a web page that answers a prompt plainly and safeguarded, side by side."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ..demo_model import DEMO_EMBEDDING_PAIR, DEMO_PAIR
from ..pairs.texts import MANUAL_TEXTS
from .address import add_address_arguments, check_address, is_loopback
from .command import CommandError, show
from .loading import pair_name
from .options import (
    add_contrast_arguments,
    add_device_arguments,
    add_horizon_argument,
    add_length_argument,
    add_model_argument,
    add_pair_arguments,
)

if TYPE_CHECKING:
    import argparse

    import gradio

SUMMARY = "open a web page with plain and safeguarded answers side by side"

_REVIEWED = (DEMO_PAIR, DEMO_EMBEDDING_PAIR, MANUAL_TEXTS)  # these come with the package, where anyone reads them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits demo`."""
    server = parser.add_argument_group("server")
    add_address_arguments(server, default_port=7860)
    server.add_argument("--share", action="store_true", help="open the page to the internet, through Gradio's servers")
    server.add_argument(
        "--public",
        action="store_true",
        help="let strangers use a pair of your own, whose adversarial prompt you have reviewed",
    )
    model = parser.add_argument_group("model and prompt pair")
    add_model_argument(model)
    add_pair_arguments(model)
    add_device_arguments(model)
    decoding = parser.add_argument_group("decoding, where the page's sliders stand at first")
    add_contrast_arguments(decoding)
    add_horizon_argument(decoding)
    add_length_argument(decoding, default=128)
    parser.set_defaults(run=run, share_instruction_kv=None, do_sample=False, temperature=None, top_p=None, seed=None)


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    page = serve(args)
    page.block_thread()


def serve(args: argparse.Namespace) -> gradio.Blocks:
    """Load the model, start the server, and print its address.

    Raises:
        CommandError: Gradio is missing, the address is taken, the pair is not for strangers, or something cannot be
            loaded.
    """
    if importlib.util.find_spec("gradio") is None:
        raise CommandError('the page needs Gradio: pip install "acd-logits[demo-ui]"')
    is_public = args.share or not is_loopback(args.host)
    if is_public and not args.public and pair_name(args) not in _REVIEWED:
        raise CommandError(
            f"strangers would use the adversarial prompt of {pair_name(args)}, which is a jailbreak for its model: "
            "review it and say --public, or serve the page on this machine alone (without --share and --host)"
        )
    check_address(args.host, args.port)

    from .demo_page import build_page, launch
    from .two_answers import Answerer

    page = build_page(Answerer(args), args, for_strangers=is_public)
    show(f"The page is at {launch(page, args.host, args.port, args.share)}\n")
    return page
