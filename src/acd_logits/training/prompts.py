"""What learns: the two prompts of a pair, how they start (eq. 1), and in which units they are trained."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from ..pairs.key_values import check_shareable, embeddings_to_key_values
from ..pairs.prompt_pair import PromptPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..pairs.key_values import KeyValues
    from .arguments import OPOArguments


def initial_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: OPOArguments) -> PromptPair:
    """What both prompts start as.

    By eq. 1 they are the embeddings of their texts, cut off or repeated to `num_virtual_tokens`. Key-value prompts
    start as the keys and values that these embeddings have. With `init_pair` they are that pair.

    Raises:
        OSError: that pair cannot be loaded.
        ValueError: it does not fit the model, or the model cannot share an instruction.
    """
    if options.shares_instruction:
        check_shareable(model, options.prompt_type == "key_value")
    if start := options.start:
        options.check_start(start)
        start.check(model)
        config = dataclasses.replace(start.config, results={})  # which were measured on that pair
        return PromptPair(start.safeguarding.float(), start.adversarial.float(), config)

    pair = PromptPair.from_text(model, tokenizer, *options.texts)
    length = options.virtual_tokens(len(pair.safeguarding), len(pair.adversarial))

    def fit(prompt: torch.Tensor) -> torch.Tensor:
        prompt = prompt.repeat(math.ceil(length / len(prompt)), 1)[:length]
        return (
            prompt.float() if options.prompt_type == "embedding" else embeddings_to_key_values(model, prompt).float()
        )

    config = dataclasses.replace(
        pair.config, format_version=None, prompt_type=options.prompt_type, share_instruction_kv=None
    )
    return PromptPair(fit(pair.safeguarding), fit(pair.adversarial), config)


class TrainablePrompt(torch.nn.Module):
    """A prompt as `start + scale * delta`, in fp32 whatever the model is: `delta` is what the optimiser moves.

    Keys and values differ in size from layer to layer by far more than AdamW, whose steps are of one size, could
    follow. So `scale` is their standard deviation in each layer, for keys and values apart. For an embedding prompt it
    is 1.

    Args:
        start: `[n, hidden_size]`, or `[n, layers, 2, kv_heads, head_dim]`.
    """

    start: torch.Tensor
    scale: torch.Tensor

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        start = start.detach().float()
        scale = start.std(dim=(0, 3, 4), keepdim=True) if start.ndim == 5 else torch.ones(1)
        # A checkpoint holds delta alone
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.delta = torch.nn.Parameter(torch.zeros_like(start))

    def forward(self) -> torch.Tensor:
        """The prompt, in the shape of `start`, fp32."""
        return self.start + self.scale * self.delta


def layers_of(prompt: torch.Tensor) -> list[KeyValues]:
    """The layers of a key-value prompt `[n, layers, 2, heads, head_dim]`: pairs of `[1, heads, n, head_dim]`."""
    # Unbound, not indexed: the gradient of an index is a tensor of zeros as large as the whole prompt
    halves = (layer.unbind(1) for layer in prompt.unbind(1))
    return [(keys.transpose(0, 1)[None], values.transpose(0, 1)[None]) for keys, values in halves]
