"""The two prompts of a pair in front of the frozen model (eq. 2), placed as in inference.

Without a shared instruction, a batch `[pad | x | response | pad]` becomes `[pad | soft | x | response | pad]`. With
one, it becomes `[x | pad | prompt | last token of x | response | pad]`, where x does not see the prompt.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from ..decoding import attention
from ..decoding.layers import reuses_prefix
from ..pairs.key_values import prompt_key_values
from ..pairs.prompt_pair import STREAMS
from .attention import PartedAttention
from .data import IGNORED
from .instructions import InstructionCache, common_length
from .prompts import TrainablePrompt, layers_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from ..pairs.key_values import KeyValues
    from ..pairs.prompt_pair import PromptPair


class PromptedModel(torch.nn.Module):
    """A frozen model with prompts that learn.

    The base model is no submodule: what Trainer saves, restores, wraps for several processes and switches to training
    is the prompts alone.

    Args:
        model: the base model, which is shared, not copied. Its weights are frozen.
    """

    instructions: InstructionCache | None = None  # where they see no prompt

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        model.requires_grad_(False)
        self._base = [model]

    @property
    def base(self) -> PreTrainedModel:
        """The frozen model."""
        return self._base[0]

    def train(self, mode: bool = True) -> PromptedModel:
        """Switch to training; the base model stays in eval mode, since dropout is for weights that learn."""
        super().train(mode)
        # There are two exceptions. Gradient checkpointing works in train mode only. And bitsandbytes, on a CPU,
        # repacks the weights of a model in eval mode into a form that has no gradient
        checkpointing = mode and _checkpoints_gradients(self.base)
        self.base.train(checkpointing or getattr(self.base, "is_quantized", False))
        return self

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Called by Trainer: the base model's."""
        self.base.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The same under its newer name."""
        self.base.activation_checkpointing_enable(**kwargs)


class OPOModel(PromptedModel):
    """A frozen model with two trainable prompts, of which one or none stands in front of its input (eq. 2).

    Args:
        model: the base model, as of [`PromptedModel`].
        pair: what the prompts start as.
        share_instruction_kv: hide the prompts from the instruction, as `shared.py` does.
    """

    def __init__(self, model: PreTrainedModel, pair: PromptPair, share_instruction_kv: bool = False) -> None:
        super().__init__(model)
        self.prompts = torch.nn.ModuleDict({name: TrainablePrompt(getattr(pair, name)) for name in STREAMS})
        self.instructions = InstructionCache(model) if share_instruction_kv else None
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Logits for the response tokens in both streams.

        A batch of a few long responses and many short ones would be mostly padding. So it runs in two parts.

        Args:
            input_ids: `[B, T]`, as of [`collate`].
            attention_mask: `[B, T]`.
            labels: `[B, R]`.

        Returns:
            For each part its rows as indices, `[b]`, and logits `[b, r, vocab]` of each stream, r <= R.
        """
        parts = []
        prompts = {name: self._prepare(prompt()) for name, prompt in self.prompts.items()}
        for rows in by_length((labels != IGNORED).sum(-1)):
            part = trim(input_ids[rows], attention_mask[rows], labels[rows])
            x = self._instructions(*part)
            parts.append((rows, {name: self._logits(prompt, x, *part) for name, prompt in prompts.items()}))
        return parts

    @torch.no_grad()
    def plain_logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_length: int
    ) -> torch.Tensor:
        """Logits `[B, response_length, vocab]` without a prompt."""
        nothing = self._prepare(self.prompts[STREAMS[0]]()[:0])
        part = input_ids, attention_mask, response_length
        return self._logits(nothing, self._instructions(*part), *part)

    def _instructions(self, ids: torch.Tensor, mask: torch.Tensor, response_length: int) -> list[KeyValues]:
        """Keys and values of all of x but its last token, by layer; none where x sees the prompt."""
        if self.instructions is None:
            return []
        last = ids.shape[1] - response_length - 1
        rows = zip(ids[:, :last], mask[:, :last].bool(), strict=True)
        return self.instructions([tuple(row[kept].tolist()) for row, kept in rows])

    def _prepare(self, prompt: torch.Tensor) -> Any:
        """What a prompt is to `_logits`: embeddings, or, behind a shared instruction, keys and values."""
        if self.instructions is None:
            return prompt
        if _checkpoints_gradients(self.base):  # it keeps no keys and values: the prompt would be lost
            raise ValueError("a shared instruction cannot be trained under gradient checkpointing")
        if not len(prompt):
            return []
        return layers_of(prompt) if prompt.ndim == 5 else prompt_key_values(self.base, prompt[None], -len(prompt))

    def _logits(
        self, prompt: Any, x: list[KeyValues], ids: torch.Tensor, mask: torch.Tensor, response_length: int
    ) -> torch.Tensor:
        model = self.base
        if self.instructions is not None:
            return _forward_behind_instruction(model, x, prompt, ids, mask, response_length)
        if reuses_prefix(model) and not _checkpoints_gradients(model):  # which keeps no keys and values
            return forward_behind_prefix(model, prompt, ids, mask, response_length)
        embedded = model.get_input_embeddings()(ids)
        embeds, mask, positions = place_soft_prompt(prompt, embedded, mask)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
        optional = {"position_ids": positions, "logits_to_keep": response_length + 1}
        accepted = inspect.signature(model.forward).parameters
        inputs |= {name: value for name, value in optional.items() if name in accepted}
        # The logits at a token predict the next one
        return model(**inputs).logits[:, -response_length - 1 : -1]


@contextlib.contextmanager
def fast_head(opo: PromptedModel) -> Iterator[None]:
    """Give the language-model head its tokens in one piece.

    A slice of hidden states has gaps, and on a CPU torch multiplies it with a frozen matrix row by row, each time with
    a copy of the matrix: 16 rows by SmolLM2's head took 11 s instead of 0.04 s.
    """
    hook = opo.base.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


def by_length(lengths: torch.Tensor) -> list[torch.Tensor]:
    """Split rows into those of short and those of long responses, such that the least padding is left.

    Args:
        lengths: `[B]`.

    Returns:
        One or two index tensors, short rows first; rows keep their order.
    """
    ordered = lengths.sort().values
    count = torch.arange(1, len(ordered) + 1, device=lengths.device)
    best = int((count * ordered + (len(ordered) - count) * ordered[-1]).argmin())
    short = lengths <= ordered[best]
    return [rows.nonzero()[:, 0] for rows in (short, ~short) if rows.any()]


def trim(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Cut off the columns that are padding in every row; returns ids, mask and what is left of R."""
    length = max(int((labels != IGNORED).sum(-1).max()), 1)
    stop = ids.shape[1] - labels.shape[1] + length
    start = int((mask.cumsum(-1) == 0).sum(-1).min())
    return ids[:, start:stop], mask[:, start:stop], length


def place_soft_prompt(
    soft: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put a soft prompt in front of every row's first real token (eq. 2): `[pad | soft | x]`.

    The row's left padding moves in front of the soft prompt, so that nothing stands between the two; right padding
    stays where it is. Positions count from the soft prompt's first token.

    Args:
        soft: `[n, hidden_size]`, in the space of the embedding layer's output; n may be 0.
        embeds: `[B, T, hidden_size]`.
        mask: `[B, T]`, 1 for real tokens.

    Returns:
        embeddings `[B, n + T, hidden_size]`, attention mask and positions `[B, n + T]`.
    """
    n, rows = len(soft), len(embeds)
    slots = torch.arange(n + mask.shape[1], device=mask.device)
    pads = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    # Which column of [soft | embeds] each slot takes: padding, soft prompt, the rest
    order = torch.where(slots < pads, slots + n, torch.where(slots < pads + n, slots - pads, slots))
    joined = torch.cat([soft.to(embeds).expand(rows, -1, -1), embeds], dim=1)
    mask = torch.cat([mask.new_ones(rows, n), mask], dim=1).gather(1, order)
    row = torch.arange(rows, device=embeds.device)[:, None]
    return joined[row, order.to(embeds.device)], mask, (mask.cumsum(-1) - 1).clamp(min=0)


def forward_behind_prefix(
    model: PreTrainedModel, soft: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, response_length: int
) -> torch.Tensor:
    """Logits behind a prompt that x sees, with what all rows begin with computed once for all of them.

    A row's soft prompt and the start of its chat template see nothing of what follows, so their keys and values, and
    the gradients through them, are the same for every row: `[prefix | pad | rest of x | response | pad]`. The prompt
    has the positions 0 to n - 1, as under peft, and x those from n on.

    Args:
        model: a model with full attention over plain keys and values.
        soft: n embeddings `[n, hidden_size]`, or keys and values `[n, layers, 2, kv_heads, head_dim]`.
        ids: `[B, T]`, as of [`collate`].
        mask: `[B, T]`.
        response_length: of how many tokens, the last of every row, to give the logits.

    Returns:
        `[B, response_length, vocab]`.
    """
    shared = _common_prefix(ids, mask, response_length)
    ids, mask = ids[:, :-1], mask[:, :-1]  # nothing follows the last token of the response
    x = model.get_input_embeddings()(ids)
    pads = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    prefix = x[0, pads[0, 0] : pads[0, 0] + shared]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if soft.ndim == 5:
        for index, (keys, values) in enumerate(layers_of(soft)):
            cache.update(keys.to(x), values.to(x), index)
    else:
        prefix = torch.cat([soft.to(x), prefix])
    # The row's padding, moved behind the prefix, hides what is left of the prefix's tokens
    columns = torch.arange(mask.shape[1] - shared, device=mask.device)
    mask = mask[:, shared:] * (columns >= pads)
    if len(prefix):
        model(inputs_embeds=prefix[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    length = len(soft) + shared
    if length:
        cache.batch_repeat_interleave(len(ids))
    logits = model(
        inputs_embeds=x[:, shared:],
        attention_mask=torch.cat([mask.new_ones(len(ids), length), mask], dim=1),
        position_ids=length + (mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache if length else None,
        use_cache=bool(length),
        logits_to_keep=response_length,
    ).logits
    return logits[:, -response_length:]


def _common_prefix(ids: torch.Tensor, mask: torch.Tensor, response_length: int) -> int:
    """How many tokens all prompts begin with; the last token of a prompt, which predicts the response, is not one."""
    prompts = zip(ids[:, :-response_length], mask[:, :-response_length].bool(), strict=True)
    return common_length([row[kept].tolist()[:-1] for row, kept in prompts])


def _forward_behind_instruction(
    model: PreTrainedModel,
    x: list[KeyValues],
    prompt: list[KeyValues],
    ids: torch.Tensor,
    mask: torch.Tensor,
    response_length: int,
) -> torch.Tensor:
    """The logits of `OPOModel` where x does not see the prompt.

    `[x | pad | prompt | last token of x | response | pad]`: the keys and values of x are those of the plain model, and
    no gradient goes through them.
    """
    last = ids.shape[1] - response_length - 1
    lengths = mask[:, :last].sum(-1, keepdim=True)
    predicting = slice(last, -1)  # nothing follows the last token of the response
    parts = PartedAttention(x, prompt, lengths, mask[:, predicting])
    attention.install(parts)
    try:
        logits = model(
            input_ids=ids[:, predicting],
            attention_mask=parts.mask(model.dtype),
            position_ids=lengths + torch.arange(response_length, device=ids.device),
            use_cache=False,
            logits_to_keep=response_length,
        ).logits
    finally:
        attention.remove(parts)
    if parts.calls != (layers := model.config.get_text_config(decoder=True).num_hidden_layers):
        raise ValueError(
            f"a shared instruction is trained through the attention of {layers} layers, but {parts.calls} of them "
            "called it: load the model with attn_implementation='sdpa'"
        )
    return logits


def _checkpoints_gradients(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
