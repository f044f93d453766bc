"""Attention for both streams: each layer of the stock model gets a twin with a KV cache of its own.

All other layers work on rows and need not know that some rows are of the safeguarding stream and some of the
adversarial one; only attention looks from one token at others. To vLLM the twin is one more attention layer of the
model: it allots cache for it, and hands both layers the same tokens' metadata, block tables and slots. Which rows go
to which layer depends on the kind of prompts: see `embedding` and `key_value`.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

if TYPE_CHECKING:
    from collections.abc import Iterator

# A quantised cache has scales that the checkpoint holds for one stream only
_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


@contextlib.contextmanager
def twin_layers(vllm_config: Any) -> Iterator[list[Any]]:
    """Give every attention layer that is built inside the block a twin, as its submodule `adversarial`.

    Yields:
        A list that holds the layers, in the order in which they were built, once the block has ended.

    Raises:
        ValueError: for a layer that carries something from token to token in another way, or keeps a cache that
            cannot be doubled.
    """
    layers = vllm_config.compilation_config.static_forward_context
    before, twinned = set(layers), list[Any]()
    with _recorded_arguments() as arguments:
        yield twinned
    # vLLM lists mixture-of-experts layers here too, which work row by row
    built = {
        name: layer for name, layer in layers.items() if name not in before and isinstance(layer, AttentionLayerBase)
    }
    if not built:
        raise ValueError("ACD on vLLM does not support this model: it has no attention layers that vLLM knows of.")
    for name, layer in built.items():
        _check_layer(name, layer)
        layer.adversarial = Attention(**arguments[layer] | {"prefix": f"{name}.adversarial"})
        twinned.append(layer)


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
    raise unsupported(name, reason)


def unsupported(name: str, reason: str) -> ValueError:
    """The error for a layer that a model of ACD cannot have."""
    return ValueError(f"ACD on vLLM does not support this model: {name} is, or has, {reason}.")


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
