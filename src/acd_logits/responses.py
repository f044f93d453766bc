"""Responses in batches: the same requests always share a batch, so that a run can be repeated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Response:
    """What a model answered.

    Args:
        text: without the token that ends a turn.
        ids: its tokens, without that one.
        finished: whether it ended by itself rather than at the length limit.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool

    @property
    def tokens(self) -> int:
        """Its length in tokens."""
        return len(self.ids)


def as_messages(texts: Iterable[str]) -> list[dict[str, str]]:
    """A conversation from its texts, of the user and the assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": next(roles), "content": text} for text in texts]


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """The token ids of a conversation, up to where the answer begins.

    Without a chat template, the messages are paragraphs of a plain text.
    """
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]


@torch.no_grad()
def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    processor: LogitsProcessor | None = None,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[Response]:
    """Continue the prompts, taking the likeliest tokens.

    Args:
        model: the model, in eval mode; also a PeftModel.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        processor: the contrast; `None` generates plainly.
        max_new_tokens: length limit of a response.
        batch_size: prompts answered together.
        on_batch: is told the size of each finished batch.

    Returns:
        The responses, in the order of the prompts.

    Raises:
        ValueError: a prompt and its response do not fit into the model's context.
    """
    pair = processor.pair if processor else None
    adapter = getattr(model, "active_peft_config", None)  # of a PeftModel
    soft = max(len(pair.safeguarding), len(pair.adversarial)) if pair else getattr(adapter, "num_virtual_tokens", 0)
    check_context(model, soft + max(map(len, prompts), default=0) + max_new_tokens)
    # Prompts of one length make no padding. The longest first: if memory does not suffice, it shows at once
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    responses: dict[int, Response] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = generate_batch(
            model,
            tokenizer,
            [prompts[i] for i in places],
            max_new_tokens,
            do_sample=False,
            logits_processor=[processor] if processor else [],
        )
        responses.update(zip(places, batch, strict=True))
        on_batch(len(places))
    return [responses[i] for i in range(len(prompts))]


def check_context(model: PreTrainedModel, length: int) -> None:
    """Raise ValueError if the longest prompt and its response, `length` tokens, do not fit into the context."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"the longest prompt and its response take {length} tokens, the model's context has {limit}")


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    **settings: Any,
) -> list[Response]:
    """Continue the prompts of one batch, padded on the left.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: length limit of a response.
        **settings: of `generate()`.
    """
    ends = end_tokens(model, tokenizer)
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    width = max(map(len, prompts))
    rows = [[padding] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    sequences = model.generate(
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
        **settings,
    )
    return [_response(tokenizer, tokens, ends) for tokens in sequences[:, width:].tolist()]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the model's and the tokenizer's."""
    eos: Any = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


def _response(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: set[int]) -> Response:
    length = next((i for i, token in enumerate(tokens) if token in ends), None)
    text = tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    return Response(text, tuple(tokens[:length]), length is not None)
