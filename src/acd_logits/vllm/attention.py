"""Attention for both streams: each layer of the stock model gets a twin with a KV cache of its own.

Inside the model every tensor has 2N rows, N tokens of the safeguarding stream and then the same N of the adversarial
one. All layers work on rows and need not know; only attention looks from one token at others. `PairedAttention` gives
the first N rows to the stock layer and the last N to its twin. To vLLM the twin is one more attention layer of the
model: it allots cache for it, and hands both layers the same N tokens' metadata, block tables and slots.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

if TYPE_CHECKING:
    from collections.abc import Iterator

# A quantised cache has scales that the checkpoint holds for one stream only
_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


class PairedAttention(Attention):
    """A stock attention layer and its twin. A layer becomes one by a change of class: its parameters' names stay."""

    adversarial: Attention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Attend in each stream by itself.

        Args:
            query: `[2N, heads * head_size]`, or with heads and head size apart; S rows first.
            key: `[2N, kv_heads * head_size]`, likewise.
            value: `[2N, kv_heads * head_size]`, likewise.
            output_shape: of the output, 2N first; default: that of the stock layer.
            output_dtype: of the output; default: that of the query.

        Returns:
            `[2N, heads * head_size]`.
        """
        n = query.shape[0] // 2
        half = None if output_shape is None else torch.Size((n, *output_shape[1:]))
        safe = super().forward(query[:n], key[:n], value[:n], half, output_dtype)
        adversarial = self.adversarial(query[n:], key[n:], value[n:], half, output_dtype)
        return torch.cat([safe, adversarial])


@contextlib.contextmanager
def paired_attention(vllm_config: Any) -> Iterator[None]:
    """Pair every attention layer that is built inside the block.

    Raises:
        ValueError: for a layer that carries something from token to token in another way, or keeps a cache that
            cannot be doubled.
    """
    layers = vllm_config.compilation_config.static_forward_context
    before = set(layers)
    with _recorded_arguments() as arguments:
        yield
    # vLLM lists mixture-of-experts layers here too, which work row by row
    built = {
        name: layer for name, layer in layers.items() if name not in before and isinstance(layer, AttentionLayerBase)
    }
    if not built:
        raise ValueError("ACD on vLLM does not support this model: it has no attention layers that vLLM knows of.")
    for name, layer in built.items():
        _check_layer(name, layer)
        twin = Attention(**arguments[layer] | {"prefix": f"{name}.adversarial"})
        layer.__class__ = PairedAttention
        layer.adversarial = twin


def _check_layer(name: str, layer: Any) -> None:
    if type(layer) is not Attention:
        reason = f"a {type(layer).__name__} layer"
    elif layer.attn_type != AttentionType.DECODER:
        reason = f"{layer.attn_type} attention"
    elif layer.kv_sharing_target_layer_name is not None:
        reason = "a layer that shares the KV cache of another"
    elif layer.kv_cache_dtype not in _CACHE_DTYPES:
        reason = f"a KV cache of type {layer.kv_cache_dtype}"
    else:
        return
    raise ValueError(f"ACD on vLLM does not support this model: {name} is, or has, {reason}.")


@contextlib.contextmanager
def _recorded_arguments() -> Iterator[dict[Any, dict[str, Any]]]:
    """What every attention layer in the block was built with, by layer."""
    stock = Attention.__init__
    signature = inspect.signature(stock)
    recorded: dict[Any, dict[str, Any]] = {}

    def recording(self: Attention, *args: Any, **kwargs: Any) -> None:
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        del arguments["self"]
        extra = dict(arguments.pop("extra_impl_args", {}))
        stock(self, *args, **kwargs)
        recorded[self] = arguments | extra

    Attention.__init__ = recording
    try:
        yield recorded
    finally:
        Attention.__init__ = stock
