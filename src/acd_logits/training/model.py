"""The soft prompt of one stream in front of the frozen model: how it starts (eq. 1) and where it stands (eq. 2).

In the model, a batch `[pad | x | response | pad]` becomes `[pad | soft | x | response | pad]`, as in inference.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModelForCausalLM, PromptTuningConfig
from transformers.cache_utils import DynamicCache

from ..decoding.layers import reuses_prefix
from ..decoding.shared import check_shareable
from ..pairs.prompt_pair import PromptPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .arguments import OPOArguments


def initial_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: OPOArguments) -> PromptPair:
    """What both prompts start as.

    By eq. 1 they are the embeddings of their texts, cut off or repeated to `num_virtual_tokens`. By default they are
    as long as the shorter text, since vLLM serves pairs of one length only. With `init_pair` they are that pair.

    Raises:
        OSError: that pair cannot be loaded.
        ValueError: it does not fit the model.
    """
    if start := options.start:
        start.check(model)
        config = dataclasses.replace(start.config, results={})  # which were measured on that pair
        return PromptPair(start.safeguarding.float(), start.adversarial.float(), config)

    pair = PromptPair.from_text(model, tokenizer, *options.texts)
    length = options.num_virtual_tokens or min(len(pair.safeguarding), len(pair.adversarial))

    def fit(prompt: torch.Tensor) -> torch.Tensor:
        return prompt.float().repeat(math.ceil(length / len(prompt)), 1)[:length]

    return PromptPair(fit(pair.safeguarding), fit(pair.adversarial), pair.config)


class OPOModel(PeftModelForCausalLM):
    """A frozen model with a trainable soft prompt in front of its input (eq. 2).

    It is a peft model, so that `Trainer` saves, resumes and restores the soft prompt alone. Only `forward` is our own.
    """

    share_instruction_kv = False

    @classmethod
    def from_prompt(cls, model: PreTrainedModel, prompt: torch.Tensor, share_instruction_kv: bool = False) -> OPOModel:
        """Freeze a model and put a soft prompt in front of it.

        Args:
            model: the base model, which is shared, not copied.
            prompt: `[n, hidden_size]`, what the soft prompt starts as; it is trained in fp32 whatever the model is.
            share_instruction_kv: hide the soft prompt from the instruction, as `shared.py` does.

        Raises:
            ValueError: the model cannot share.
        """
        if share_instruction_kv:
            check_shareable(model)
        shape = {"num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1], "num_transformer_submodules": 1}
        # Prompt tuning does not use the last two, but peft wants them, and some models have no attention heads
        config = PromptTuningConfig(task_type="CAUSAL_LM", **shape, num_layers=1, num_attention_heads=1)
        opo = cls(model, config)
        with torch.no_grad():
            opo.soft_prompt.copy_(prompt)
        opo.share_instruction_kv = share_instruction_kv
        return opo

    @property
    def soft_prompt(self) -> torch.nn.Parameter:
        """`[n, hidden_size]`, fp32."""
        return self.prompt_encoder[self.active_adapter].embedding.weight

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_length: int, prompted: bool = True
    ) -> torch.Tensor:
        """Logits for the last `response_length` tokens, `[B, response_length, vocab]`.

        Args:
            input_ids: `[B, T]`, as of [`collate`].
            attention_mask: `[B, T]`.
            response_length: number of tokens that belong to the responses.
            prompted: `False` leaves the soft prompt out.
        """
        model = self.get_base_model()
        soft = self.soft_prompt if prompted else self.soft_prompt[:0]
        if self.share_instruction_kv:
            if _checkpoints_gradients(model):  # it keeps no keys and values: the soft prompt would be lost
                raise ValueError("a shared instruction cannot be trained under gradient checkpointing")
            return _forward_behind_instruction(model, soft, input_ids, attention_mask, response_length)
        if self.shares_prefix():
            return _forward_behind_prefix(model, soft, input_ids, attention_mask, response_length)
        x = model.get_input_embeddings()(input_ids)
        embeds, mask, positions = place_soft_prompt(soft, x, attention_mask)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
        optional = {"position_ids": positions, "logits_to_keep": response_length + 1}
        accepted = inspect.signature(model.forward).parameters
        inputs |= {name: value for name, value in optional.items() if name in accepted}
        # The logits at a token predict the next one
        return model(**inputs).logits[:, -response_length - 1 : -1]

    def shares_prefix(self) -> bool:
        """Whether the rows' common prefix is computed once; gradient checkpointing keeps no keys and values."""
        model = self.get_base_model()
        return reuses_prefix(model) and not _checkpoints_gradients(model)

    def train(self, mode: bool = True) -> OPOModel:
        """Switch to training; the base model stays in eval mode, since dropout is for weights that learn."""
        super().train(mode)
        # There are two exceptions. Gradient checkpointing works in train mode only. And bitsandbytes, on a CPU,
        # repacks the weights of a model in eval mode into a form that has no gradient
        checkpointing = mode and _checkpoints_gradients(self.base_model)
        self.base_model.train(checkpointing or getattr(self.base_model, "is_quantized", False))
        return self

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the soft prompt as a stock peft adapter."""
        # "auto" would ask the Hub, at every checkpoint, whether the vocabulary was resized
        super().save_pretrained(save_directory, **{"save_embedding_layers": False, **kwargs})


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


def _forward_behind_prefix(
    model: PreTrainedModel, soft: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, response_length: int
) -> torch.Tensor:
    """The logits of `OPOModel.forward`, with what all rows begin with computed once for all of them.

    A row's soft prompt and the start of its chat template see nothing of what follows, so their keys and values, and
    the gradients through them, are the same for every row: `[prefix | pad | rest of x | response | pad]`.
    """
    x = model.get_input_embeddings()(ids)
    pads = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    shared = _common_prefix(ids, mask, response_length)
    prefix = torch.cat([soft.to(x), x[0, pads[0, 0] : pads[0, 0] + shared]])
    # The row's padding, moved behind the prefix, hides what is left of the prefix's tokens
    columns = torch.arange(mask.shape[1] - shared, device=mask.device)
    mask = mask[:, shared:] * (columns >= pads)
    cache = None
    if len(prefix):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(inputs_embeds=prefix[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(ids))
    logits = model(
        inputs_embeds=x[:, shared:],
        attention_mask=torch.cat([mask.new_ones(len(ids), len(prefix)), mask], dim=1),
        position_ids=len(prefix) + (mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=response_length + 1,
    ).logits
    return logits[:, -response_length - 1 : -1]


def _common_prefix(ids: torch.Tensor, mask: torch.Tensor, response_length: int) -> int:
    """How many tokens all prompts begin with; the last token of a prompt, which predicts the response, is not one."""
    prompts = [
        row[kept.bool()] for row, kept in zip(ids[:, :-response_length], mask[:, :-response_length], strict=True)
    ]
    longest = min(map(len, prompts)) - 1
    same = torch.stack([prompt[:longest] == prompts[0][:longest] for prompt in prompts]).all(0)
    return int(same.long().cumprod(0).sum())


def _forward_behind_instruction(
    model: PreTrainedModel, soft: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, response_length: int
) -> torch.Tensor:
    """The logits of `OPOModel.forward` where x does not see the soft prompt.

    `[pad | x | soft | last token of x | response | pad]`: the keys and values of x are those of the plain model, and
    no gradient goes through them.
    """
    x = model.get_input_embeddings()(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last, n = ids.shape[1] - response_length - 1, len(soft)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if last:
        part = {"inputs_embeds": x[:, :last], "attention_mask": mask[:, :last], "position_ids": positions[:, :last]}
        with torch.no_grad():
            model(**part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if n:
        prompt = DynamicCache(config=model.config.get_text_config(decoder=True))
        positions_of_soft = torch.arange(-n, 0, device=ids.device)[None]
        model(
            inputs_embeds=soft[None].to(x),
            position_ids=positions_of_soft,
            past_key_values=prompt,
            use_cache=True,
            logits_to_keep=1,
        )
        for index, layer in enumerate(prompt.layers):
            cache.update(*(kv.expand(len(ids), -1, -1, -1) for kv in (layer.keys, layer.values)), index)
    logits = model(
        inputs_embeds=x[:, last:],
        attention_mask=torch.cat([mask[:, :last], mask.new_ones(len(ids), n), mask[:, last:]], dim=1),
        position_ids=positions[:, last:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=response_length + 1,
    ).logits
    return logits[:, -response_length - 1 : -1]


def _checkpoints_gradients(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
