"""Inspect finds these through the entry point: the model provider, the tasks and the scorers."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi

from .scorers import llm_judge, refusal_keywords, safety_classifier
from .tasks import harmless, overrefusal
from .winrate import preference, winrate

__all__ = [
    "acd",
    "harmless",
    "llm_judge",
    "overrefusal",
    "preference",
    "refusal_keywords",
    "safety_classifier",
    "winrate",
]


@modelapi(name="acd")
def acd() -> type[ModelAPI]:
    """The provider, whose import takes long."""
    from .provider import ACDModelAPI

    return ACDModelAPI
