"""The artifact: a pair of soft prompts in memory, on disk and on the Hub.

prompt_pair.py   the pair
config.py        what `acd_config.json` says about it
adapters.py      one soft prompt as a stock peft adapter
fit.py           whether a pair fits a model
key_values.py    keys and values of soft prompts
hub.py           download and upload
custom_generate.py  what a repository carries for `generate(..., custom_generate="org/pair")`
model_card.py    the README.md of a saved pair, from `model_card.md`
distilled.py     a pair's contrast as one prompt, and its card, from `distilled_card.md`
texts.py         the two manual system prompts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["PairConfig", "PromptPair"]

if TYPE_CHECKING:
    from .config import PairConfig
    from .prompt_pair import PromptPair


def __getattr__(name: str) -> Any:
    """Import on first use: the texts are wanted without torch."""
    if name in __all__:
        from . import prompt_pair

        return getattr(prompt_pair, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
