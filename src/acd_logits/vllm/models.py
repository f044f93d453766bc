"""The models `ACD<Arch>`: stock vLLM models that run both streams of ACD in one forward and decode by eq. 5.

To the engine nothing is special: one request, one sequence of tokens, one row of logits. A prompt is [placeholders; x]
with n placeholders. In the forward

1. N tokens are embedded, and become 2N rows: [SP; x] and [AP; x], each with the positions 0, 1, 2, ...
2. the stock model runs on the 2N rows, with a KV cache for each stream (see `attention`);
3. the two streams' hidden states leave side by side, [N, 2 * hidden_size], since the engine picks rows by token.

`compute_logits` takes such rows apart again and contrasts. Batching, chunked prefill, prefix caching, preemption,
and tensor parallelism work on tokens and rows, and so go on as before. CUDA graphs should, too: the buffers below
are for them, but no GPU has run this yet.

Which rows are soft prompt is told by position, not by token: a prompt that slipped past the checks on requests would
lose its first n tokens to the soft prompts, but never the contrast.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from vllm import ModelRegistry
from vllm.forward_context import get_forward_context, is_forward_context_available

from ..decoding.contrast import coefficient_sum, contrast
from .attention import paired_attention
from .exported import PREFIX, TENSOR_PREFIX, TENSORS, ExportedPair
from .sampling import strengths

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
        with paired_attention(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        if not getattr(self, "do_not_compile", True):
            raise ValueError(f"ACD on vLLM does not support {type(self).__name__}: vLLM compiles all of it at once.")
        self.acd_pair = pair
        self.acd_compilation = vllm_config.compilation_config
        self.acd_last_token = vllm_config.model_config.get_vocab_size() - 1
        self.acd_loaded = False
        width, rows = pair.hidden_size, 2 * vllm_config.scheduler_config.max_num_batched_tokens
        for name, buffer in {
            "acd_prompts": torch.zeros(2, pair.num_virtual_tokens, width),
            # CUDA graphs of pieces of the model read their input where it was at capture
            "acd_embeds": torch.zeros(rows, width),
            "acd_positions": torch.zeros(rows, dtype=torch.long),
        }.items():
            self.register_buffer(name, buffer, persistent=False)

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
        embeds, positions = self._both_streams(input_ids, positions)
        with _twice_the_tokens(self.acd_compilation):
            hidden = super().forward(
                input_ids=None, positions=positions, intermediate_tensors=None, inputs_embeds=embeds
            )
        return torch.cat(hidden.chunk(2), dim=-1)

    def _both_streams(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[2N, hidden_size]` and positions `[2N]`, S rows first, with the soft prompts in place."""
        n, tokens = self.acd_pair.num_virtual_tokens, len(ids)
        # The placeholder may lie behind the vocabulary, and what it embeds to is overwritten
        x = self.embed_input_ids(ids.clamp(max=self.acd_last_token))
        soft = self.acd_prompts[:, positions.clamp(max=n - 1)]
        embeds = self.acd_embeds[: 2 * tokens]
        embeds.view(2, tokens, -1).copy_(torch.where((positions < n)[:, None], soft, x))
        doubled = self.acd_positions[: 2 * tokens]
        doubled.view(2, tokens).copy_(positions)
        return embeds, doubled

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
        strength = strengths(self.acd_compilation, self.acd_pair.alpha, len(safe))
        alpha = torch.tensor(strength, device=safe.device)[:, None] if isinstance(strength, list) else strength
        # Without a bound, a token at -inf in the adversarial stream alone would win by infinity
        scores = contrast(safe, adversarial.clamp(min=-IMPLAUSIBLE), alpha, self.acd_pair.beta)
        implausible = scores.isneginf()
        implausible[:, self.acd_pair.placeholder_id :][:, :1] = True  # where the vocabulary has a row for it
        # The contrast divides by that: what a token without plausibility loses grows as much, to stay out of reach
        return torch.where(implausible, safe - IMPLAUSIBLE / coefficient_sum(alpha), scores)

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
        loaded = super().load_weights(theirs())
        self._load_prompts(ours)
        return loaded

    def _load_prompts(self, tensors: dict[str, torch.Tensor]) -> None:
        missing = [name for name in TENSORS if name not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is not among the weights: export the model again.")
        safe, adversarial, ids, expected = (tensors[name] for name in TENSORS)
        buffer = self.acd_prompts
        prompts = torch.stack([safe, adversarial]).to(device=buffer.device, dtype=torch.float32)
        if prompts.shape != buffer.shape:
            raise ValueError(f"the prompts are {list(prompts.shape)}, config.json says {list(buffer.shape)}.")
        with torch.no_grad():
            found = self.embed_input_ids(ids.to(buffer.device))
            buffer.copy_(prompts * embedding_scale(found.float(), expected.to(found.device).float()))
        self.acd_loaded = True


def embedding_scale(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How much larger vLLM's embeddings are than those the prompts belong to.

    The prompts live in the space of the embedding layer's output in transformers. vLLM's port of a model may scale
    embeddings in the layer where transformers does it behind, or the other way round; a constant makes up for that.

    Args:
        found: `[k, hidden_size]`, what vLLM makes of some tokens.
        expected: `[k, hidden_size]`, what transformers makes of them.

    Returns:
        The constant; 1.0 where there is no difference but rounding.

    Raises:
        ValueError: if the two differ by more than a constant.
    """
    scale = float((found * expected).sum() / (expected * expected).sum())
    error = float((found - scale * expected).norm() / found.norm())
    if not error < 0.02:  # bf16 rounds by 0.4 %
        raise ValueError(
            "ACD on vLLM does not support this model: vLLM's embeddings are not those of the model that was exported."
        )
    return 1.0 if abs(scale - 1) < 0.02 else scale


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
