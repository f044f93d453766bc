"""Steering: a direction in the model's hidden states is added at one layer.

    steering  a refusal direction, for every request (Arditi et al. 2024, arXiv 2406.11717)
    cast      the same, only for requests that look harmful (CAST, Lee et al. 2024, arXiv 2409.05907)

Both directions are differences of means, of the states of harmful requests and of safe ones. A layer's state is its
input.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .rivals import ChangedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Condition:
    """CAST's condition: how much a request resembles a direction, compared with a threshold.

    Args:
        direction: `[hidden_size]`.
        layer: whose input is looked at.
        threshold: of the similarity.
        larger: whether requests above the threshold are met, or those below it.
    """

    direction: torch.Tensor
    layer: int
    threshold: float
    larger: bool

    def met(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Which requests are met, `[B]`, by the layer's input `[B, T, hidden_size]` and the mask `[B, T]`."""
        alike = similarity(mean_over_tokens(hidden, mask), self.direction)
        return (alike > self.threshold) == self.larger


def mean_over_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of `[B, T, hidden_size]` over the tokens that the mask `[B, T]` keeps, in float32."""
    return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def similarity(states: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """CAST's sim(h, tanh(proj_c h)): the cosine of states `[B, hidden_size]` and their projections on a direction."""
    direction = direction.to(states)
    projected = torch.outer(states @ direction / direction.dot(direction), direction).tanh()
    return torch.cosine_similarity(states, projected, dim=-1)


@dataclass(frozen=True)
class Steering(ChangedModel):
    """A direction is added to the input of one layer, at every token.

    Args:
        direction: `[hidden_size]`, the mean state of harmful requests minus that of safe ones.
        layer: where it is added.
        strength: times which it is added.
        condition: adds it only where the request meets it; looked at in no later layer.
    """

    direction: torch.Tensor
    layer: int
    strength: float
    condition: Condition | None = None

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Hook the addition into the model.

        Raises:
            ValueError: in the first forward, if there is a condition and the model generates without a cache.
        """
        added, condition = self.strength * self.direction.to(model.device), self.condition
        mask: Any = None
        met: Any = None

        def note_prompt(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal mask
            ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
            if cache is None:
                raise ValueError(
                    f"CAST tells a request from its answer by a cache of keys, and {type(model).__name__} generates "
                    "without one: set use_cache in its generation_config, or leave 'cast' out."
                )
            given = kwargs.get("attention_mask")  # generate() leaves out a mask of ones
            mask = None if cache.get_seq_length() else torch.ones_like(ids) if given is None else given

        def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal met
            if mask is not None:  # the prompt decides, and not the answer
                assert condition is not None
                met = condition.met(args[0] if args else kwargs["hidden_states"], mask)

        def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, *others = args or (kwargs.pop("hidden_states"),)
            steered = hidden + added.to(hidden.dtype) * (1 if condition is None else met[:, None, None])
            return (steered, *others), kwargs

        layers = decoder_layers(model)
        hooks: list[tuple[torch.nn.Module, Callable[..., Any]]] = [(layers[self.layer], add)]
        if condition is not None:
            hooks = [(model, note_prompt), (layers[condition.layer], look), *hooks]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The model's decoder layers."""
    number = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next(module for module in lists if len(module) == number)
