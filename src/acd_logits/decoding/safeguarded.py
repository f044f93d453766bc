"""A model whose `generate()` is safeguarded by itself, from a folder that `acd-logits export` writes (`export`).

    config.json       the base model's, with an `acd` entry, and with `SafeguardedModel` as code of the model's own
    safeguarded.py    that code: it imports this module
    model/            the base model: config and weights, as links
    pair/             the prompt pair
    tokenizer files   the base model's

The weights stand in a folder of their own. So whatever reads the folder as an ordinary model, transformers without
`trust_remote_code=True` for instance, finds no weights, and says so. It cannot answer without the contrast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from transformers import AutoModelForCausalLM
from transformers.generation import GenerationMixin

from .. import __version__
from ..pairs.prompt_pair import PromptPair
from .attach import BoundProcessor, checks_padding, is_attached, is_noted
from .logits_process import ACDLogitsProcessor

if TYPE_CHECKING:
    import os

    from transformers import LogitsProcessorList, PretrainedConfig, PreTrainedModel

FORMAT_VERSION = 1
MODEL_FOLDER, PAIR_FOLDER = "model", "pair"
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


class SafeguardedModel:
    """What `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads an exported folder with."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str) -> None:
        """Do nothing; transformers asks all code of a model's own to note this."""

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *args: Any, config: PretrainedConfig, **kwargs: Any
    ) -> PreTrainedModel:
        """Load the base model as `AutoModelForCausalLM` does, and safeguard it.

        Args:
            name: the exported folder, or a Hub id.
            args: as of `AutoModelForCausalLM.from_pretrained`.
            config: the base model's, with an `acd` entry.
            kwargs: as of `AutoModelForCausalLM.from_pretrained`.

        Raises:
            OSError: the base model or the pair cannot be loaded.
            ValueError: the folder is of another format, or the pair does not fit the model.
        """
        entry = getattr(config, "acd", None) or {}
        version = entry.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"config.json has no acd entry of format_version {FORMAT_VERSION}, which acd-logits {__version__} "
                f"reads (found {version!r}): export the model again."
            )
        top = f"{kwargs['subfolder']}/" if kwargs.get("subfolder") else ""
        where = {argument: kwargs[argument] for argument in _HUB_ARGUMENTS if argument in kwargs}
        pair = PromptPair.from_pretrained(name, subfolder=top + PAIR_FOLDER, **where)
        kwargs |= {"subfolder": top + MODEL_FOLDER, "trust_remote_code": False}
        loaded = AutoModelForCausalLM.from_pretrained(name, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        model.name_or_path = entry["base_model_name_or_path"]  # which the pair is compared with
        safeguard(model, pair)
        return loaded


class Safeguarded(GenerationMixin):
    """What stands in front of a model's class, so that `generate()` adds the contrast."""

    _acd_pair: PromptPair
    _acd: ACDLogitsProcessor

    @property
    def acd(self) -> ACDLogitsProcessor:
        """The processor that `generate()` adds, attached."""
        acd = self._acd
        if acd.model is not self or not is_attached(acd):  # a copy of the model, or detached
            acd = self._acd = ACDLogitsProcessor(self, self._acd_pair)
        return acd

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, under the contrast; a processor in the call takes the place of the model's."""
        given = list((args[2] if len(args) > 2 else kwargs.get("logits_processor")) or [])
        if any(map(is_noted, given)) or checks_padding.get():
            return super().generate(*args, **kwargs)
        given.append(self.acd)
        if len(args) > 2:
            return self.generate(*args[:2], given, *args[3:], **kwargs)
        return self.generate(*args, **kwargs | {"logits_processor": given})

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Refuse a way around `generate()`, such as continuous batching."""
        processors = super()._get_logits_processor(*args, **kwargs)
        if not (any(isinstance(processor, BoundProcessor) for processor in processors) or checks_padding.get()):
            raise ValueError(
                "this model is safeguarded, and this way to generate leaves the contrast out: call its generate()."
            )
        return processors

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: what would be saved is the plain model.

        Raises:
            ValueError: always.
        """
        raise ValueError("a safeguarded model would be saved without its contrast: copy the folder it comes from.")


def safeguard(model: PreTrainedModel, pair: PromptPair) -> None:
    """Let a model's `generate()` use the contrast from now on, by itself.

    Args:
        model: the model.
        pair: the prompt pair, with the strength to decode with.

    Raises:
        ValueError: the pair does not fit the model, or the model is one ACD cannot run on.
    """
    acd = ACDLogitsProcessor(model, pair)
    kind = type(model)
    # The class keeps its name, by which transformers tells some models apart
    model.__class__ = type(kind.__name__, (Safeguarded, kind), {"__module__": __name__})
    model._acd_pair, model._acd = pair, acd
