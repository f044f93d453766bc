"""Adversarial Contrastive Decoding (arXiv 2406.16743) for Hugging Face causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["ACDLogitsProcessor", "PromptPair", "load_demo_model"]

_MODULES = {
    "ACDLogitsProcessor": "decoding.logits_process",
    "PromptPair": "pairs.prompt_pair",
    "load_demo_model": "demo_model",
}

if TYPE_CHECKING:
    from .decoding.logits_process import ACDLogitsProcessor
    from .demo_model import load_demo_model
    from .pairs.prompt_pair import PromptPair


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import acd_logits` does not import torch."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
