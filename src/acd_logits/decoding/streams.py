"""The two soft prompts on one model: everything about ACD that outlives a `generate` call."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..pairs.key_values import KeyValues, cache_layers, prompt_key_values
from .layers import changes_from, reach, reuses_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel


class PairedStreams:
    """The two soft prompts on one model, and their keys and values.

    Keys and values of a soft prompt depend on all that a forward depends on: weights, adapters, hooks, module
    attributes, autocast. No cheap test sees all of it (a fused optimiser or a write through `.data` moves no version
    counter), so every call computes them anew, unless the user promises that the model is frozen.

    Args:
        model: the decoder-only model both streams run on.
        safeguarding: SP, `[n_s, hidden_size]`.
        adversarial: AP, `[n_a, hidden_size]`.
        frozen_model: compute keys and values in the first call only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        safeguarding: torch.Tensor,
        adversarial: torch.Tensor,
        frozen_model: bool = False,
    ) -> None:
        self.model = model
        self.prompts = (safeguarding, adversarial)
        self.lengths = (len(safeguarding), len(adversarial))
        self.width = max(self.lengths)
        self.frozen = frozen_model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.num_layers = len(cache_layers(model))
        self.reusable = reuses_prefix(model)
        self.reach = reach(model)
        self.capacity = _position_capacity(model)
        # The text length behind which rotary frequencies change, keys held included where it is longrope
        changes = changes_from(model)
        self.long_from = min(changes.values(), default=None)
        self.switches_at = changes.get("longrope")
        self._lock = threading.Lock()
        self._stored: list[KeyValues | None] | None = None

    @property
    def attention(self) -> str | None:
        """The attention that the model uses now."""
        return self.model.config.get_text_config(decoder=True)._attn_implementation

    def key_values(self, device: torch.device) -> list[KeyValues | None]:
        """Keys and values of both soft prompts, per layer, each `[2, heads, W, head_dim]`, left-padded with zeros.

        A layer that keeps none (cross-attention, without an image) has `None`.
        """
        with self._lock:
            if self._stored is not None:
                return self._stored
            layers = self._compute(device)
            # What dropout or autocast made of them is no property of the frozen model
            if self.frozen and not self.model.training and not torch.is_autocast_enabled(device.type):
                self._stored = layers
                for place in {kv.device for layer in layers if layer is not None for kv in layer}:
                    if place.type == "cuda":  # later calls may be on other streams of the device
                        torch.cuda.current_stream(place).synchronize()
            return layers

    def check_length(self, max_length: int) -> None:
        """Raise ValueError where a text of `max_length` tokens leaves the soft prompts behind, or runs out of room."""
        name = type(self.model).__name__
        if max_length - 1 > self.reach:
            raise ValueError(
                f"every layer of {name} has a sliding window, and together they carry a soft prompt {self.reach} "
                f"tokens far, while prompt and new tokens make up to {max_length}: shorten them, since the rest would "
                "be plain text."
            )
        if self.capacity is not None and self.width + max_length - 1 > self.capacity:
            raise ValueError(
                f"{name} has {self.capacity} positions, of which the soft prompts take {self.width}: prompt and "
                f"new tokens make up to {max_length}, shorten them."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> PairedStreams:
        return self  # a copy of a conversation's cache goes on with the same model and prompts

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a cache filled under ACD belongs to a loaded model and cannot be saved: save the conversation's tokens."
        )

    @torch.no_grad()
    def _compute(self, device: torch.device) -> list[KeyValues | None]:
        if self.lengths[0] == self.lengths[1]:  # one forward, which reads the weights once
            both = self._run(torch.stack(self.prompts), device)
            streams = [[layer and (layer[0][i : i + 1], layer[1][i : i + 1]) for layer in both] for i in (0, 1)]
        else:
            streams = [self._run(prompt[None], device) for prompt in self.prompts]
        return [
            safe and adversarial and (self._join(safe[0], adversarial[0]), self._join(safe[1], adversarial[1]))
            for safe, adversarial in zip(*streams, strict=True)
        ]

    def _run(self, prompts: torch.Tensor, device: torch.device) -> list[KeyValues | None]:
        return prompt_key_values(self.model, prompts.to(device), self._first_position(prompts.shape[1]))

    def _first_position(self, length: int) -> int:
        """Position of the first token of a soft prompt of `length` tokens."""
        return 0

    def _join(self, safe: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
        """`[2, heads, W, head_dim]`."""
        return _stack(safe, adversarial)


def _position_capacity(model: PreTrainedModel) -> int | None:
    """How many tokens the model's table of positions takes, be they learned or computed; `None` without a table."""
    names = ("wpe", "embed_positions", "position_embedding", "position_embeddings", "pos_encoding")

    def named(things: Iterable[tuple[str, Any]]) -> list[Any]:
        return [thing for name, thing in things if name.rsplit(".", 1)[-1] in names]

    learned = [table for table in named(model.named_modules()) if isinstance(table, torch.nn.Embedding)]
    sizes = [table.num_embeddings - int(getattr(table, "offset", 0)) for table in learned]
    sizes += [len(table) for table in named(model.named_buffers())]
    return min(sizes, default=None)


def _stack(*tensors: torch.Tensor) -> torch.Tensor:
    """Stack `[1, heads, n, head_dim]` of differing n to `[streams, heads, W, head_dim]`, left-padded."""
    width = max(t.shape[-2] for t in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, 0, width - t.shape[-2], 0)) for t in tensors])
