"""Whether a pair fits a model: what is asked of the model, and the one place where the two are compared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers.utils import logging

from .config import SIZES
from .key_values import key_value_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .config import PairConfig

logger = logging.get_logger(__name__)


def check_fit(config: PairConfig, model: PreTrainedModel) -> None:
    """Check a pair's config against a loaded model.

    Raises:
        ValueError: if a size differs: hidden size or vocabulary, or layers, heads and head size of key-value prompts.
            A differing base model name only warns.
    """
    model = base_model(model)
    facts = model_facts(model)
    if difference := _difference(config, facts, model.config):
        raise ValueError(
            f"this prompt pair was made for {difference[0]}, the model has {difference[1]}: use a pair made for "
            f"{facts['base_model_name_or_path'] or 'this model'}."
        )
    warn_of_other_model("prompt pair", config.base_model_name_or_path, model)


def warn_of_other_model(what: str, ours: Any, model: PreTrainedModel) -> None:
    """Warn if a pair or an adapter, `what`, was made for a model of another name, `ours`; `None` says nothing."""
    theirs = model.name_or_path
    # A folder and a Hub id of the same model share the last part of their names
    if ours and theirs and Path(str(ours)).name.lower() != Path(theirs).name.lower():
        logger.warning(f"This {what} was made for {ours}, the model is {theirs}: it may protect less.")


def warn_of_other_template(what: str, ours: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if a pair or an adapter, `what`, has seen a chat template of another digest, `ours`, in training."""
    if ours is not None and ours != chat_template_digest(tokenizer):
        logger.warning(f"This {what} was trained with another chat template: it may protect less.")


def check_fit_unloaded(pair: PairConfig, config: PretrainedConfig, name: str, transfer: bool) -> bool:
    """Check a pair's config against a model that is not loaded yet.

    Args:
        pair: the pair's config.
        config: the model's.
        name: the model's name.
        transfer: whether a pair of another model is wanted.

    Returns:
        Whether the pair was made for another model.

    Raises:
        ValueError: the prompts' sizes differ, or it was made for another model and `transfer` is not set.
    """
    config = config.get_text_config(decoder=True)
    if difference := _difference(pair, {"hidden_size": config.hidden_size}, config):
        raise ValueError(f"the pair was made for {difference[0]}, {name} has {difference[1]}")
    ours = pair.base_model_name_or_path
    foreign = bool(ours) and Path(str(ours)).name.lower() != Path(name).name.lower()
    foreign = foreign or pair.vocab_size not in (None, config.vocab_size)
    if foreign and not transfer:
        raise ValueError(
            f"the pair was made for {ours or 'another model'}, not for {name}: --transfer (transfer=True) measures it "
            "there"
        )
    return foreign


def _difference(pair: PairConfig, facts: dict[str, Any], config: PretrainedConfig) -> tuple[str, Any] | None:
    """The first size that a model has otherwise than a pair's, in words, and the model's."""
    if pair.prompt_type == "key_value":
        facts = facts | key_value_sizes(config)
    for name in SIZES:
        ours, theirs = getattr(pair, name), facts.get(name)
        if None not in (ours, theirs) and ours != theirs:
            return SIZES[name].format(ours), theirs
    return None


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PeftModel or a `torch.compile(model)`.

    Raises:
        ValueError: for a PeftModel without an active adapter, or with a learned prompt or prefix, which would stand
            between ACD's and the input, or an activated LoRA, which peft places before there are two streams.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        active = model.peft_config.get(model.active_adapter)
        if active is None:  # it was deleted, and peft does not go on without
            raise ValueError("this PeftModel has no active adapter left: pass its unload() instead.")
        if active.is_prompt_learning:
            kind = active.peft_type.value
            raise ValueError(f"this PeftModel brings a {kind} prompt of its own: pass its get_base_model() instead.")
        model = model.get_base_model()
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if getattr(adapter, "alora_invocation_tokens", None):
            raise ValueError(
                f"the adapter {name!r} is an activated LoRA (aLoRA), which peft cannot place in ACD's two streams: "
                "load the model without it, or train a LoRA without alora_invocation_tokens."
            )
    return model


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the tokenizer's chat template; `None` if it has none."""
    if not tokenizer.chat_template:
        return None
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a pair's config notes about its model."""
    config = model.config.get_text_config(decoder=True)
    return {
        "base_model_name_or_path": model.name_or_path or None,
        "hidden_size": embed_tokens(model, [0]).shape[-1],  # of any embedding layer, wrapped by peft or not
        "vocab_size": config.vocab_size,
    }


@torch.no_grad()
def embed_tokens(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """What the embedding layer gives for tokens, `[len(ids), hidden_size]`."""
    device = "cpu" if model.device.type == "meta" else model.device  # accelerate's hooks bring it to offloaded weights
    return model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long, device=device))[0]
