"""Key-value prompts on vLLM: x runs once, and what comes behind it in both streams.

x must not see the prompts; its last token and the answer do, as if n tokens with the learned keys and values stood at
the positions -n to -1. A paged cache has no masks, but attention does not ask in which order keys lie there, only for
the rotation that is baked into them. So a request's tokens are

    [ x without its last token | n placeholders | last token of x | answer ]

and causality hides the placeholders from x. In every layer, what is written into the cache for a placeholder is the
learned key, rotated for -n to -1 already, and its value: SP's in the stock layer's cache, AP's in its twin's. Tokens
behind the placeholders have the positions that they have without them.

In the part in front of the placeholders both streams are the same. So the N tokens of a step become the rows

    [ x's tokens, and those behind the placeholders | those behind the placeholders once more, for stream A ]

and attention puts x's keys and values into both caches. Placeholders have no rows. Where all of a step's tokens lie
behind placeholders, as in decoding, and where a CUDA graph wants a number of rows that follows from N, these are 2N
rows: all N tokens, twice.

On which side of the placeholders a token lies, a step cannot tell from its ids and positions: chunks of a prompt, and
decoding, begin anywhere. So each slot of the KV cache has a number beside it: how many placeholders there are up to
its token. A step starts from the number of the slot in front of its first token. Like the keys, the numbers follow
from the tokens up to theirs; so they stay right in blocks that prefix caching hands to other requests. Prefix caching
also hands on a block in the very step that fills it. Then the number comes from the step itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context, is_forward_context_available

from .attention import unsupported
from .exported import TENSORS, ExportedPair

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_STREAMS = 2
# They read a step's keys from the cache, where the learned ones are. Others take them as the model made them
_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")


@dataclasses.dataclass
class Step:
    """How the rows of a step lie, S rows first.

    Args:
        tokens: N.
        learned: `[N]`, the learned key that a placeholder stands for, and -1 for other tokens; `None`: there is none.
        contrasted: `[N]`, whether a token lies behind the placeholders; `None`: all do.
        rows: the tokens that have an S row, and those that have an A row; `None`: all have both.
        placeholders: where not all tokens have both rows, the placeholders and the learned keys that they stand for.
        metadata: what the twins' attention goes by, where it is for fewer than N queries.
    """

    tokens: int
    learned: torch.Tensor | None = None
    contrasted: torch.Tensor | None = None
    rows: tuple[torch.Tensor, torch.Tensor] | None = None
    placeholders: tuple[torch.Tensor, ...] = ()
    metadata: Any = None

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of S and of A."""
        first = self.tokens if self.rows is None else len(self.rows[0])
        return states[:first], states[first:]

    def of_tokens(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What S, and what A, has for each of the N tokens: zero for placeholders, S's where the streams are one."""
        safe, adversarial = self.split(states)
        if self.rows is None:
            return safe, adversarial
        safe = states.new_zeros(self.tokens, *states.shape[1:]).index_copy_(0, self.rows[0], safe)
        return safe, safe.index_copy(0, self.rows[1], adversarial)


class PairedImpl:
    """Goes in front of a backend's implementation of attention, which becomes that of both streams."""

    streams: KeyValueStreams
    index: int  # of the layer

    def fused_rope_kvcache_supported(self) -> bool:
        """No fusion may write keys past `do_kv_cache_update`."""
        return False

    fused_qk_norm_rope_kvcache_supported = fused_qk_norm_mrope_kvcache_supported = fused_rope_kvcache_supported

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write the step's keys and values, `[rows, kv_heads, head_size]`, and the learned ones."""
        step, twin = self.streams.step, layer.adversarial
        safe, adversarial = zip(*map(step.split, (key, value)), strict=True)
        updates = (
            functools.partial(super().do_kv_cache_update, layer, kv_cache=kv_cache),  # type: ignore[misc]
            functools.partial(twin.impl.do_kv_cache_update, twin, kv_cache=twin.kv_cache),
        )
        for stream, (update, own) in enumerate(zip(updates, (safe, adversarial), strict=True)):
            if step.rows is None:
                update(*self.streams.with_learned(stream, self.index, own), slot_mapping=slot_mapping)
                continue
            # x's are S's in both caches; A has its own behind the placeholders, and both the learned ones in these
            update(*safe, slot_mapping=slot_mapping[step.rows[0]])
            if stream and len(adversarial[0]):
                update(*adversarial, slot_mapping=slot_mapping[step.rows[1]])
            placeholders, which = step.placeholders
            if len(placeholders):
                learned = self.streams.prompts[stream, which, self.index].to(key)
                keys, values = (part.contiguous() for part in learned.unbind(1))
                update(keys, values, slot_mapping=slot_mapping[placeholders])

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend, from the rows of each stream to its cache, `[rows, heads, head_size]`."""
        attend = super().forward  # type: ignore[misc]
        if attn_metadata is None:  # a trial run of the model, without caches
            if not self.index and self.streams.checking:
                self.streams.seen = (key, value)
            return attend(layer, query, key, value, kv_cache, None, output, *args, **kwargs)
        step, twin = self.streams.step, layer.adversarial
        safe, adversarial = step.split(output)
        if step.rows is None:
            attend(layer, query[: step.tokens], key, value, kv_cache, attn_metadata, safe, *args, **kwargs)
        else:
            queries = query.new_zeros(step.tokens, *query.shape[1:]).index_copy_(0, step.rows[0], step.split(query)[0])
            full = output.new_empty(step.tokens, *output.shape[1:])
            attend(layer, queries, key, value, kv_cache, attn_metadata, full, *args, **kwargs)
            torch.index_select(full, 0, step.rows[0], out=safe)
        if len(adversarial):
            metadata = get_forward_context().attn_metadata[twin.layer_name] if step.metadata is None else step.metadata
            queries = step.split(query)[1]
            twin.impl.forward(twin, queries, key, value, twin.kv_cache, metadata, adversarial, *args, **kwargs)
        return output


class KeyValueStreams(torch.nn.Module):
    """The rows of both streams.

    Args:
        vllm_config: of the engine.
        pair: what the folder says about the prompts.
        layers: the attention layers, with their twins.

    Raises:
        ValueError: a layer cannot attend to learned keys and values.
    """

    prompts: torch.Tensor
    embeds: torch.Tensor
    positions: torch.Tensor
    step: Step
    slots: torch.Tensor | None = None  # beside the KV cache: placeholders up to each slot's token

    def __init__(self, vllm_config: Any, pair: ExportedPair, layers: list[Any]) -> None:
        super().__init__()
        if is_breakable_cudagraph_enabled():
            raise ValueError(
                "ACD on vLLM plans key-value prompts anew in each step, which a breakable CUDA graph skips: unset "
                "VLLM_USE_BREAKABLE_CUDAGRAPH and VLLM_BATCH_INVARIANT."
            )
        sizes = {(layer.num_kv_heads, layer.head_size, layer.head_size_v) for layer in layers}
        if len(sizes) != 1 or layers[0].head_size != layers[0].head_size_v:
            raise unsupported("one of its layers", "keys and values of another size than the others")
        for index, layer in enumerate(layers):
            self._join(index, layer)
        self._twin = [layers[0].adversarial]  # the first, in a list, since it is no submodule
        rows = 2 * vllm_config.scheduler_config.max_num_batched_tokens
        self.length, self.placeholder = pair.num_virtual_tokens, pair.placeholder_id
        self.last_token = vllm_config.model_config.get_vocab_size() - 1
        heads, head_size, _ = sizes.pop()
        for name, buffer in {
            "prompts": torch.zeros(_STREAMS, self.length, len(layers), 2, heads, head_size),
            # CUDA graphs of pieces of the model read their input where it was at capture
            "embeds": torch.zeros(rows, pair.hidden_size),
            "positions": torch.zeros(rows, dtype=torch.long),
        }.items():
            self.register_buffer(name, buffer, persistent=False)
        self.probe: tuple[torch.Tensor, ...] = ()
        self.seen: tuple[torch.Tensor, ...] = ()  # keys and values of the first layer, while `check` runs
        self.checking = False

    def _join(self, index: int, layer: Any) -> None:
        """Make a layer attend for both streams."""
        backend = layer.attn_backend
        if layer.sliding_window is not None:
            raise unsupported(layer.layer_name, "a sliding window, and key-value prompts need full attention")
        if backend.get_name() not in _BACKENDS:
            raise unsupported(layer.layer_name, f"the attention backend {backend.get_name()}: choose another one")
        layer.adversarial.attn_backend = _remembering(backend)
        stock = type(layer.impl)
        paired: Any = type(f"Paired{stock.__name__}", (PairedImpl, stock), {})
        impl = paired.__new__(paired)
        vars(impl).update(vars(layer.impl), streams=self, index=index)
        layer.impl = impl

    # ----- a step -----

    def enter(
        self, embed: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's input for N tokens of a step.

        Args:
            embed: the model's embedding layer.
            ids: `[N]` tokens.
            positions: `[N]`, each token's place in its request.

        Returns:
            Embeddings `[rows, hidden_size]` and positions `[rows]`, S rows first.
        """
        self.step, positions = self._plan(ids, positions)
        # The placeholder may lie behind the vocabulary, and what it embeds to is not used
        x = embed(ids.clamp(max=self.last_token))
        if self.step.rows is not None:
            rows = torch.cat(self.step.rows)
            return x[rows], positions[rows]
        embeds, doubled = self.embeds[: 2 * len(ids)], self.positions[: 2 * len(ids)]
        embeds.view(2, len(ids), -1).copy_(x)
        doubled.view(2, len(ids)).copy_(positions)
        return embeds, doubled

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """The streams' hidden states side by side, `[N, 2 * hidden_size]`.

        They are zero, which makes all tokens equally likely, for tokens that are not behind placeholders. No token is
        drawn there, unless a request were to slip past the checks.
        """
        both = torch.cat(self.step.of_tokens(hidden), dim=-1)
        if self.step.contrasted is None:
            return both
        return torch.where(self.step.contrasted[:, None], both, 0)

    def with_learned(
        self, stream: int, index: int, states: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of N tokens, with the learned ones in place of the placeholders'."""
        if self.step.learned is None:
            return states
        learned = self.prompts[stream, :, index].to(states[0])[self.step.learned.clamp(min=0)]
        placeholder = (self.step.learned >= 0)[:, None, None]
        key, value = (torch.where(placeholder, learned[:, i], states[i]) for i in range(2))
        return key, value

    def _plan(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[Step, torch.Tensor]:
        """How the rows of a step lie, and the positions of its tokens without placeholders in between."""
        context = get_forward_context() if is_forward_context_available() else None
        if context is None or context.attn_metadata is None:
            return Step(len(ids)), positions
        builder, batch = context.attn_metadata[self._twin[0].layer_name].built_from
        placeholder = ids == self.placeholder
        slots = context.slot_mapping[self._twin[0].layer_name][: len(ids)]
        request, count = self._count(placeholder, positions, slots, builder.kv_cache_spec.block_size, batch)
        self.slots[slots] = count  # type: ignore[index]  # padding has slot -1, which is kept for it
        contrasted = ~placeholder & (count >= self.length)
        positions = (positions - count).clamp(min=0)
        # While the second runner captures a graph, the mode does not say so
        capturing = ids.is_cuda and torch.cuda.is_current_stream_capturing()
        in_graph = capturing or context.cudagraph_runtime_mode != CUDAGraphMode.NONE
        if not in_graph and bool(contrasted.all()):
            return Step(len(ids)), positions
        which = (count - 1).clamp(max=self.length - 1)
        step = Step(len(ids), torch.where(placeholder, which, -1), contrasted)
        if not in_graph:
            safe = ~placeholder
            safe[:1] |= placeholder.all()  # the model wants a row
            step.rows = safe.nonzero()[:, 0], contrasted.nonzero()[:, 0]
            found = placeholder.nonzero()[:, 0]
            step.placeholders = found, which[found]
            step.metadata = self._fewer_queries(builder, batch, request, contrasted)
        return step, positions

    def _count(
        self, placeholder: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, block_size: int, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The request of each token, `[N]`, and how many placeholders there are up to it, `[N]`."""
        if self.slots is None or len(self.slots) != _num_slots(self._twin[0]) + 1:
            self.slots = positions.new_zeros(_num_slots(self._twin[0]) + 1)
        starts = batch.query_start_loc.long()
        tokens = torch.arange(len(placeholder), device=positions.device)
        request = torch.searchsorted(starts[1:], tokens, right=True).clamp(max=len(starts) - 2)
        first = starts[:-1].clamp(max=len(placeholder) - 1)
        before = positions[first] - 1
        block = batch.block_table_tensor[
            torch.arange(len(before), device=before.device), before.clamp(min=0) // block_size
        ]
        slot = torch.where(before < 0, -1, block.long() * block_size + before % block_size)
        total = placeholder.cumsum(0)
        in_front = total[first] - placeholder[first].long()  # of the step's other requests
        stored = torch.where(slot < 0, 0, self.slots[slot])
        earlier = _before_the_step(stored, slot, slots, request, total - in_front[request]) - in_front
        return request, total + earlier[request]

    def _fewer_queries(self, builder: Any, batch: Any, request: torch.Tensor, contrasted: torch.Tensor) -> Any:
        """Metadata for the tokens behind placeholders alone, which are the last ones of each request's."""
        lengths = torch.bincount(request[contrasted], minlength=batch.num_reqs)[: batch.num_reqs]
        some = lengths.nonzero()[:, 0]
        if not len(some):
            return None
        lengths = lengths[some]
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(batch.query_start_loc)
        seen = batch.seq_lens_cpu_upper_bound
        fewer = batch.replace(
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            seq_lens=batch.seq_lens[some],
            num_reqs=len(some),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(lengths.max()),
            block_table_tensor=batch.block_table_tensor[some],
            slot_mapping=batch.slot_mapping[: len(contrasted)][contrasted],
            positions=None,
            is_prefilling=None,
            seq_lens_cpu_upper_bound=None if seen is None else seen[some.cpu()],
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return builder.build(0, fewer)

    # ----- loading -----

    @torch.no_grad()
    def load(self, embed: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the key-value heads that this worker attends with.

        Raises:
            ValueError: the sizes are others.
        """
        safe, adversarial, *probe = (tensors[name] for name in TENSORS["key_value"])
        ours = slice(None)
        heads, total = self.prompts.shape[-2], safe.shape[-2]
        if safe.ndim == 5 and heads <= total:  # with more workers than heads, some have the same
            first = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
            ours = slice(first, first + heads)
        prompts = torch.stack([safe, adversarial])[..., ours, :]
        if prompts.shape != self.prompts.shape:
            raise ValueError(
                f"the prompts are {list(prompts.shape)}, model and config.json ask for {list(self.prompts.shape)}."
            )
        self.prompts.copy_(prompts)
        ids, positions, states = probe
        self.probe = (ids, positions, states[..., ours, :])

    def check(self, forward: Callable[..., Any]) -> None:
        """See that the model's first layer makes the keys and values that the prompts were made for.

        Args:
            forward: the stock model's.

        Raises:
            ValueError: it does not, since it rotates in another way or with other frequencies.
        """
        ids, positions, expected = self.probe
        device = self.prompts.device
        self.checking = True
        forward(ids.to(device), positions.to(device))
        self.checking = False
        for what, found, wanted in zip(("keys", "values"), self.seen, expected.unbind(1), strict=True):
            found, wanted = found.view(wanted.shape).float(), wanted.to(device).float()
            if not (found - wanted).norm() < 0.1 * wanted.norm():  # quantised weights round, too
                raise ValueError(
                    f"ACD on vLLM does not support this model: vLLM's {what} are not those of the model that was "
                    "exported. If its rotary frequencies depend on the length of the text, a smaller --max-model-len "
                    "helps."
                )
        self.seen = ()


def _before_the_step(
    stored: torch.Tensor, slot: torch.Tensor, slots: torch.Tensor, request: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """How many placeholders each request has in front of its first token of the step, `[requests]`.

    Where that token follows on a block that another request fills in this step, that is what the other one has up to
    there: before the step, and of its own in it. The other one may follow on a third in the same way.

    Args:
        stored: `[requests]`, the number beside the slot in front, which is right where no other request fills it.
        slot: `[requests]`, that slot; below 0 for requests that begin in this step.
        slots: `[N]`, the slots that the step fills.
        request: `[N]`, whose they are.
        own: `[N]`, placeholders of that request in the step, up to each token.
    """
    same = (slot[:, None] == slots) & (slot >= 0)[:, None]
    filled, token = same.any(1), same.int().argmax(1)
    root = len(stored)
    count = torch.nn.functional.pad(torch.where(filled, own[token], stored), (0, 1))
    leader = torch.nn.functional.pad(torch.where(filled, request[token], root), (0, 1), value=root)
    for _ in range(root.bit_length()):  # each round doubles how far is looked; no number is read, for CUDA graphs
        count, leader = count + count[leader], leader[leader]
    return count[:root]


def _num_slots(layer: Any) -> int:
    return layer.kv_cache.numel() // (layer.num_kv_heads * (layer.head_size + layer.head_size_v))


@functools.cache
def _remembering(backend: Any) -> Any:
    """An attention backend whose metadata say from what, and by whom, they were built."""
    stock = backend.get_builder_cls()

    class Builder(stock):  # type: ignore[misc, valid-type]
        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            metadata.built_from = self, common_attn_metadata
            return metadata

    return type(f"Paired{backend.__name__}", (backend,), {"get_builder_cls": staticmethod(lambda: Builder)})
