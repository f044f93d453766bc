"""The folder that `acd-logits export-vllm` writes and vLLM serves.

    config.json       the base model's, with `architectures: ["ACD<Arch>"]` and an `acd` entry, `ExportedPair` below
    acd.safetensors   acd.safeguarding, acd.adversarial    SP and AP, [n, hidden_size]
                      acd.probe_ids, acd.probe_embeddings  some token ids [k] and what the base model's embedding layer
                                                           makes of them, [k, hidden_size]
    *.safetensors     the base model's weights, linked
    tokenizer files   the base model's, putting n placeholder tokens in front of every prompt, with the chat template
                      and without

The placeholders hold the place of SP in one stream and of AP in the other, so that vLLM's positions, cache slots and
prefix hashes count the soft prompt. The placeholder is a token of its own: text that spells it gives a second
placeholder, which the checks on requests notice. It is at most the first id behind the model's vocabulary, where vLLM
keeps its padding value, so penalties pass over it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pairs.prompt_pair import PromptPair

PREFIX = "ACD"
PLACEHOLDER = "<|acd|>"
FORMAT_VERSION = 1

TENSORS_NAME = "acd.safetensors"
TENSOR_PREFIX = "acd."
TENSORS = tuple(TENSOR_PREFIX + name for name in ("safeguarding", "adversarial", "probe_ids", "probe_embeddings"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedPair:
    """What the `acd` entry of an exported `config.json` says.

    Args:
        format_version: version of this layout.
        alpha: strength of the contrast, eq. 5.
        beta: keep tokens with `P_S >= beta * max P_S`.
        num_virtual_tokens: length n of both soft prompts.
        hidden_size: their width.
        placeholder_id: the token that stands n times in front of every prompt.
    """

    format_version: int = FORMAT_VERSION
    alpha: float
    beta: float
    num_virtual_tokens: int
    hidden_size: int
    placeholder_id: int

    @classmethod
    def of(cls, model_config: Any) -> ExportedPair | None:
        """What the config of a model in vLLM says; `None` for a model that is not ours.

        Raises:
            ValueError: if the model is ours, and its entry is missing or of another version.
        """
        if not str(model_config.architecture).startswith(PREFIX):
            return None
        entry = getattr(model_config.hf_config, "acd", None)
        if not isinstance(entry, dict) or entry.get("format_version") != FORMAT_VERSION:
            version = entry.get("format_version") if isinstance(entry, dict) else None
            raise ValueError(
                f"config.json has no acd entry of format_version {FORMAT_VERSION} (found {version!r}): export the "
                "model again with this acd-logits."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if set(entry) != known:
            wrong = sorted(set(entry) ^ known)[0]
            raise ValueError(
                f"the acd entry of config.json lacks, or does not know, {wrong!r}: export the model again."
            )
        return cls(**entry)


def read_pair(folder: Path) -> PromptPair:
    """The prompt pair of an exported folder, with the strengths it is served with.

    Raises:
        OSError: a file is missing.
    """
    from safetensors.torch import load_file

    from ..pairs import PairConfig, PromptPair

    entry = json.loads((folder / "config.json").read_text(encoding="utf-8"))["acd"]
    tensors = load_file(folder / TENSORS_NAME)
    config = PairConfig(alpha=entry["alpha"], beta=entry["beta"])
    return PromptPair(tensors[TENSORS[0]], tensors[TENSORS[1]], config)
