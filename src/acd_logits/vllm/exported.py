"""The folder that `acd-logits export-vllm` writes and vLLM serves.

    config.json       the base model's, with `architectures: ["ACD<Arch>"]` and an `acd` entry, `ExportedPair` below
    acd.safetensors   the prompts and what vLLM is compared with, `TENSORS` below
    *.safetensors     the base model's weights, linked
    tokenizer files   the base model's

The plugin puts n placeholder tokens into every prompt, for which vLLM's positions, cache slots and prefix hashes then
count the soft prompts (where: `requests`). The placeholder is a token that the tokenizer does not know, so no text
spells it. It is at most the first id behind the model's vocabulary, where vLLM keeps its padding value, so penalties
pass over it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pairs.prompt_pair import PromptPair

PREFIX = "ACD"
FORMAT_VERSION = 2
MOST_ALPHA = 100  # far behind any use, and where what is not plausible still lies below all that is

TENSORS_NAME = "acd.safetensors"
TENSOR_PREFIX = "acd."
# SP and AP, and what the base model makes of some token ids `[k]`: in the embedding layer, `[k, hidden_size]`, or, at
# some positions `[k]`, as keys and values of the first layer, `[k, 2, kv_heads, head_dim]`
_PROMPTS, _IDS = ("acd.safeguarding", "acd.adversarial"), "acd.probe_ids"
TENSORS = {
    "embedding": (*_PROMPTS, _IDS, "acd.probe_embeddings"),
    "key_value": (*_PROMPTS, _IDS, "acd.probe_positions", "acd.probe_key_values"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedPair:
    """What the `acd` entry of an exported `config.json` says.

    Args:
        format_version: version of this layout.
        prompt_type: "embedding" or "key_value".
        alpha: strength of the contrast, eq. 5.
        beta: keep tokens with `P_S >= beta * max P_S`.
        num_virtual_tokens: length n of both soft prompts.
        hidden_size: the model's width.
        placeholder_id: the token that stands n times in every prompt.
    """

    format_version: int = FORMAT_VERSION
    prompt_type: str = "embedding"
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
    config = PairConfig(prompt_type=entry["prompt_type"], alpha=entry["alpha"], beta=entry["beta"])
    return PromptPair(tensors[_PROMPTS[0]], tensors[_PROMPTS[1]], config)
