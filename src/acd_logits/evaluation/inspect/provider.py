"""Inspect's model provider `acd`: its Hugging Face provider, which answers as one arm of the comparison.

inspect eval acd_logits/harmless --model acd/org/model -M pair=org/pair -M method=acd -M alpha=0.5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelOutput,
)
from inspect_ai.model._providers.hf import HuggingFaceAPI
from transformers import AutoConfig

from ...demo_model import resolve_model_name, resolve_pair_name
from ...pairs.fit import check_fit_unloaded
from ...pairs.prompt_pair import PromptPair
from ...responses import end_tokens
from ..arms import arm_processor, check_arms, find_arm

if TYPE_CHECKING:
    import torch
    from inspect_ai.tool import ToolChoice, ToolInfo
    from transformers import PreTrainedModel

    from ...decoding.logits_process import ACDLogitsProcessor

_MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


class ACDModelAPI(HuggingFaceAPI):
    """A Hugging Face model that answers as one arm of the comparison, in batches.

    It takes the likeliest token, unless a temperature is set.

    Args:
        model_name: Hub id or folder of the model, or the demo model's name.
        base_url: not used.
        api_key: Hub token.
        config: of generation.
        pair: Hub id or folder of the learned pair, for the arms that need one.
        method: the arm.
        alpha: strength of the contrast; default: the pair's.
        beta: plausibility threshold; default: the pair's.
        transfer: accept a pair of another model of the same hidden size.
        **model_args: those of Inspect's Hugging Face provider, such as `device` and `dtype`.

    Raises:
        OSError: the pair or the model cannot be loaded.
        ValueError: there is no such arm, it needs a pair, or the pair does not fit the model.
    """

    model: Any  # Inspect's provider loads it; from the end of `__init__` on, every answer of it is contrasted

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (as in the provider it is built on)
        pair: str | None = None,
        method: str = "acd",
        alpha: float | None = None,
        beta: float | None = None,
        transfer: bool = False,
        **model_args: Any,
    ) -> None:
        self.arm = find_arm(method)
        check_arms([method], has_pair=pair is not None)
        learned = PromptPair.from_pretrained(resolve_pair_name(pair)) if pair is not None else None
        path = resolve_model_name(model_args.setdefault("model_path", model_name))
        if learned is not None:
            check_fit_unloaded(learned.config, AutoConfig.from_pretrained(path), path, transfer)
        super().__init__(model_name, base_url, api_key, config, **{**model_args, "model_path": path})
        if self.tokenizer.chat_template and "tokenizer_call_args" not in model_args:
            self.tokenizer_call_args = {"add_special_tokens": False}  # the template wrote them
        self.model.generation_config.eos_token_id = sorted(end_tokens(self.model, self.tokenizer)) or None
        if learned is not None:
            learned.check_chat_template(self.tokenizer)
        processor = arm_processor(self.arm, self.model, self.tokenizer, learned, alpha, beta)
        self.model = _Contrasted(self.model, processor)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer as Inspect's Hugging Face provider does, which batches what is asked at one time."""
        self.do_sample = bool(config.temperature)
        if not self.do_sample:
            config = config.model_copy(update={"temperature": None, "top_p": None, "top_k": None})
        return await super().generate(input, tools, tool_choice, config)

    def hf_chat(self, messages: list[ChatMessage], tools: list[ToolInfo]) -> str:
        """The prompt as text, after the arm's change to the messages."""
        if self.arm.transform is not None:
            plain = [{"role": message.role, "content": message.text} for message in messages]
            messages = [_MESSAGES[turn["role"]](content=turn["content"]) for turn in self.arm.transform(plain)]
        return super().hf_chat(messages, tools)


class _Contrasted:
    """A model whose every generate call is contrasted."""

    def __init__(self, model: PreTrainedModel, processor: ACDLogitsProcessor) -> None:
        self.model, self.processor = model, processor

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate(self, **kwargs: Any) -> Any:
        return self.model.generate(**kwargs, logits_processor=[self.processor])
