"""The model and the prompt pair that the arguments name."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..demo_model import DEMO_MODEL, DEMO_PAIR, resolve_model_name, resolve_pair_name
from ..pairs.texts import MANUAL_TEXTS
from .command import CommandError, note, user_errors

if TYPE_CHECKING:
    import argparse

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..pairs.distilled import DistilledPrompt
    from ..pairs.prompt_pair import PromptPair


def pair_name(args: argparse.Namespace) -> str:
    """The pair that is asked for, or the demo model's own, or for any other model the manual texts."""
    if args.pair is not None:
        return args.pair
    return DEMO_PAIR if args.model_name_or_path == DEMO_MODEL else MANUAL_TEXTS


def load_pair(args: argparse.Namespace) -> PromptPair | None:
    """Load the learned pair; `None` for the manual texts."""
    from ..pairs.prompt_pair import PromptPair

    if args.revision and args.pair in (None, MANUAL_TEXTS):
        raise ValueError("--revision is the pair's and needs --pair")
    name = pair_name(args)
    if not name:
        raise ValueError(f"--pair is empty: name a folder or a Hub id, or {MANUAL_TEXTS} for the manual prompts")
    if name == MANUAL_TEXTS:
        return None
    return PromptPair.from_pretrained(resolve_pair_name(name), revision=args.revision)


def load_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, distilled: DistilledPrompt
) -> PeftModel:
    """The model behind a distilled adapter, by stock peft; the model itself stays as it is."""
    from peft import PeftModel

    with user_errors(ValueError):
        distilled.check(model)
    distilled.check_chat_template(tokenizer)
    with user_errors(OSError):
        return PeftModel.from_pretrained(model, name).eval()


def load_model(
    args: argparse.Namespace, *, needs_chat_template: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model onto its device, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    hide_progress_bars()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with user_errors(RuntimeError, AssertionError):
        torch.empty(0, device=device)
    if sys.stderr.isatty():
        note(f"Loading {args.model_name_or_path} ...")
    with user_errors(ImportError, OSError, RuntimeError):
        model_path = resolve_model_name(args.model_name_or_path)
    with user_errors(ImportError, OSError, ValueError):
        AutoConfig.from_pretrained(model_path)  # says plainly if there is no such model; the tokenizer does not
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    if needs_chat_template and not tokenizer.chat_template:
        raise CommandError(f"{args.model_name_or_path} has no chat template")
    with user_errors(ImportError, OSError, ValueError):
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=args.dtype)
    return model.to(device), tokenizer


def hide_progress_bars() -> None:
    """Turn off the progress bars of transformers where nobody watches them."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
