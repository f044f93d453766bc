"""The models `ACD<Arch>`: stock vLLM models that run both streams of ACD in one forward and decode by eq. 5.

To the engine nothing is special: one request, one sequence of tokens, one row of logits. Among a request's tokens are
n placeholders for the prompt pair. In the forward

1. N tokens become up to 2N rows, some of the safeguarding stream and some of the adversarial one (how: `embedding` for
   embedding prompts, `key_value` for key-value prompts);
2. the stock model runs on these rows, with a KV cache for each stream (see `attention`);
3. the two streams' hidden states leave side by side, [N, 2 * hidden_size], since the engine picks rows by token.

`compute_logits` takes such rows apart again and contrasts. Batching, chunked prefill, prefix caching, preemption,
and tensor parallelism work on tokens and rows, and so go on as before. CUDA graphs should, too, but no GPU has run
this yet.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from vllm import ModelRegistry
from vllm.config import set_current_vllm_config
from vllm.forward_context import (
    create_forward_context,
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)

from ..decoding.contrast import coefficient_sum, contrast
from .attention import twin_layers
from .embedding import EmbeddingStreams
from .exported import PREFIX, TENSOR_PREFIX, TENSORS, ExportedPair
from .key_value import KeyValueStreams
from .sampling import alpha_state, processor_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    _Stock = Any  # the stock model class, which comes behind in the order of bases
else:
    _Stock = object

# What tokens without plausibility lose. Not infinity: a grammar may leave none but such tokens, and then the one that
# the safeguarding stream prefers must win.
IMPLAUSIBLE = 1e4


class ACDMixin(_Stock):
    """Goes in front of a stock model class; see the module."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        pair = ExportedPair.of(vllm_config.model_config)
        assert pair is not None  # or vLLM would have chosen another class
        with twin_layers(vllm_config) as layers:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        if not getattr(self, "do_not_compile", True):
            raise ValueError(f"ACD on vLLM does not support {type(self).__name__}: vLLM compiles all of it at once.")
        self.acd_pair = pair
        self.acd_config = vllm_config
        self.acd_loaded = False
        streams = EmbeddingStreams if pair.prompt_type == "embedding" else KeyValueStreams
        self.acd_streams = streams(vllm_config, pair, layers)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run both streams.

        Args:
            input_ids: `[N]` tokens of this step, of all requests.
            positions: `[N]`, each token's place in its request.
            intermediate_tensors: of pipeline parallelism, refused at start-up.
            inputs_embeds: refused at start-up.

        Returns:
            `[N, 2 * hidden_size]`, the safeguarding stream's hidden states and then the adversarial one's.

        Raises:
            RuntimeError: if the soft prompts were never loaded.
            ValueError: for inputs that have no meaning in both streams.
        """
        if not self.acd_loaded:
            raise RuntimeError("the prompt pair was not loaded: load the exported folder's safetensors files.")
        if input_ids is None or inputs_embeds is not None or positions.ndim != 1:
            raise ValueError("ACD on vLLM needs token ids, and one position for each.")
        embeds, positions = self.acd_streams.enter(self.embed_input_ids, input_ids, positions)
        with _twice_the_tokens(self.acd_config.compilation_config):
            hidden = super().forward(
                input_ids=None, positions=positions, intermediate_tensors=None, inputs_embeds=embeds
            )
        return self.acd_streams.leave(hidden)

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Eq. 5, with the strength of each request.

        Args:
            hidden_states: `[M, 2 * hidden_size]`, rows of what `forward` returned.
            args: for the stock model.
            kwargs: for the stock model.

        Returns:
            `[M, vocab]` in fp32; `None` on workers that vLLM gives no logits.
        """
        both = torch.cat(hidden_states.chunk(2, dim=-1))
        logits = super().compute_logits(both, *args, **kwargs)
        if logits is None:
            return None
        safe, adversarial = logits.float().chunk(2)
        processor = processor_of(self.acd_config)
        strengths = processor.of_rows(len(safe), safe.device) if processor else None
        alpha = self.acd_pair.alpha if strengths is None else strengths[:, None]
        # Without a bound, a token at -inf in the adversarial stream alone would win by infinity
        scores = contrast(safe, adversarial.clamp(min=-IMPLAUSIBLE), alpha, self.acd_pair.beta)
        implausible = scores.isneginf()
        implausible[:, self.acd_pair.placeholder_id :][:, :1] = True  # where the vocabulary has a row for it
        # The contrast divides by that: what a token without plausibility loses grows as much, to stay out of reach
        return torch.where(implausible, safe - IMPLAUSIBLE / coefficient_sum(alpha), scores)

    def get_model_state_cls(self) -> type[Any]:
        """Called by vLLM's V2 model runner alone: how it prepares a step of this model."""
        if hasattr(super(), "get_model_state_cls"):
            return alpha_state(super().get_model_state_cls())
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        return alpha_state(DefaultModelState)

    @property
    def compute_logits_local(self) -> Any:
        """Absent: eq. 5 with beta needs a row's whole vocabulary, which a worker's share of it is not."""
        raise AttributeError("compute_logits_local")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the stock model, and the prompt pair.

        Args:
            weights: names and tensors of all safetensors files of the folder.

        Returns:
            The stock model's report of the parameters it loaded.

        Raises:
            ValueError: if the pair is missing, or vLLM's embeddings are not those it was made for.
        """
        ours: dict[str, torch.Tensor] = {}

        def theirs() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith(TENSOR_PREFIX):
                    ours[name] = tensor.clone()  # a loader may use its memory again
                else:
                    yield name, tensor

        self.acd_loaded = False  # for good, if a reload fails
        if any(buffer.is_meta for buffer in self.acd_streams.buffers()):  # which would come back as it was
            raise ValueError("ACD on vLLM does not support reloading weights: start the server anew.")
        loaded = super().load_weights(theirs())
        missing = [name for name in TENSORS[self.acd_pair.prompt_type] if name not in ours]
        if missing:
            raise ValueError(f"{missing[0]} is not among the weights: export the model again.")
        self.acd_streams.load(self.embed_input_ids, ours)
        self.acd_loaded = True
        return loaded

    def process_weights_after_loading(self) -> None:
        """Called by vLLM once all weights are in place: see that the prompt pair fits.

        Raises:
            ValueError: if it does not.
        """
        if hasattr(super(), "process_weights_after_loading"):
            super().process_weights_after_loading()
        self.acd_streams.check(self._try)

    @torch.no_grad()
    def _try(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Run the stock model on a few tokens, without a cache."""
        context = create_forward_context(None, self.acd_config, skip_compiled=True)
        with override_forward_context(context), set_current_vllm_config(self.acd_config):
            embeds = self.embed_input_ids(ids)
            super().forward(input_ids=None, positions=positions, intermediate_tensors=None, inputs_embeds=embeds)


@contextlib.contextmanager
def _twice_the_tokens(compilation_config: Any) -> Iterator[None]:
    """What vLLM sets by the number of tokens, set for twice as many inside the model."""
    ranges = compilation_config.compile_ranges_endpoints
    if is_forward_context_available():
        # A mask of N padded rows, which only saves experts some work
        get_forward_context().is_padding = None
    compilation_config.compile_ranges_endpoints = ranges and [2 * end for end in ranges]
    try:
        yield
    finally:
        compilation_config.compile_ranges_endpoints = ranges


def __getattr__(name: str) -> Any:
    """Build `ACD<Arch>` in front of the stock class that vLLM has for `<Arch>`."""
    stock = ModelRegistry.models.get(name.removeprefix(PREFIX))
    if not name.startswith(PREFIX) or stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model = type(name, (ACDMixin, stock.load_model_cls()), {"__module__": __name__})
    globals()[name] = model
    return model
