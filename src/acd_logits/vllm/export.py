"""`acd-logits export-vllm`: a folder that `vllm serve` starts as it is (layout: `exported`)."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..model_files import CONFIG, INDEX, link_weights, model_folder, read_config, write_json
from ..pairs.key_values import check_shareable, embeddings_to_key_values, prompt_key_values
from ..pairs.prompt_pair import PromptPair
from ..pairs.texts import OPPOSITE_PROMPT, SAFE_PROMPT
from ..ranges import check_alpha, check_beta
from .exported import MOST_ALPHA, PREFIX, TENSORS, TENSORS_NAME, ExportedPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

_PROBES = 16  # tokens whose embeddings, or keys and values, vLLM compares
_PROBE_POSITION = 100  # far enough for rotary frequencies to show


def export(
    model_name_or_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    pair: PromptPair | None = None,
    *,
    texts: tuple[str, str] = (SAFE_PROMPT, OPPOSITE_PROMPT),
    prompt_type: str = "embedding",
    alpha: float | None = None,
    beta: float | None = None,
) -> None:
    """Write the folder. It appears in one step, or not at all.

    The base model is loaded once, on the CPU, for its embeddings, keys and values.

    Args:
        model_name_or_path: folder or Hub id of the base model.
        output_dir: the folder to write; must not exist.
        pair: the prompt pair; default: one made of texts, the shorter filled up in front with line breaks.
        texts: what the safeguarding and the adversarial prompt say; without a pair.
        prompt_type: what becomes of the texts, "embedding" or "key_value".
        alpha: strength of the contrast; default: the pair's.
        beta: plausibility threshold; default: the pair's.

    Raises:
        OSError: if a file is missing or cannot be written.
        ValueError: for a model, tokenizer or pair that cannot be exported.
    """
    target = Path(output_dir)
    if target.exists():
        raise ValueError(f"{target} exists: choose a new folder.")
    base = model_folder(model_name_or_path)
    config = _checked_config(base)
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype="auto").eval()
    pair = _text_pair(model, tokenizer, texts, prompt_type) if pair is None else pair
    pair.check(model)
    n = _common_length(pair)
    prompt_type = pair.config.prompt_type
    if prompt_type == "key_value":
        check_shareable(model, key_value=True)
    elif pair.config.share_instruction_kv:
        logger.warning(
            "This embedding pair was trained with share_instruction_kv, and vLLM serves it without: measure it there."
        )
    placeholder_id = _free_token(tokenizer, model.config.get_text_config().vocab_size)

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        index = link_weights(base, temporary)
        if index is not None:  # vLLM then reads the files of the index only
            index["weight_map"] |= dict.fromkeys(TENSORS[prompt_type], TENSORS_NAME)
            write_json(temporary / INDEX, index)
        _write_tensors(temporary / TENSORS_NAME, pair, model)
        tokenizer.save_pretrained(temporary)
        config["architectures"] = [PREFIX + config["architectures"][0]]
        config["acd"] = dataclasses.asdict(
            ExportedPair(
                prompt_type=prompt_type,
                alpha=_strength(pair.alpha if alpha is None else alpha),
                beta=check_beta(pair.beta if beta is None else beta),
                num_virtual_tokens=n,
                hidden_size=model.get_input_embeddings().embedding_dim,
                placeholder_id=placeholder_id,
            )
        )
        write_json(temporary / CONFIG, config)
        if (base / "generation_config.json").is_file():
            shutil.copyfile(base / "generation_config.json", temporary / "generation_config.json")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _strength(alpha: float) -> float:
    strength = float(check_alpha(alpha))
    if strength > MOST_ALPHA:
        raise ValueError(f"alpha is {strength:g}, and vLLM is served up to {MOST_ALPHA}: choose a smaller one")
    return strength


# ----- the base model -----


def _checked_config(base: Path) -> dict[str, Any]:
    """The base model's `config.json`, if vLLM's plugin could serve it."""
    config = read_config(base)
    [architecture] = config["architectures"]
    if config.get("is_encoder_decoder") or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"{architecture} is not a decoder-only language model of text.")
    return config


# ----- the pair -----


def _text_pair(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: tuple[str, str], prompt_type: str
) -> PromptPair:
    """The two texts, as long as each other: vLLM keeps as many slots for one stream as for the other."""
    pair = PromptPair.from_text(model, tokenizer, *texts)
    safe, adversarial = pair.safeguarding, pair.adversarial
    if len(safe) != len(adversarial):
        line_break = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        if not line_break:
            raise ValueError("this tokenizer has no line break to make the two texts equally long with.")
        with torch.no_grad():
            filler = model.get_input_embeddings()(torch.tensor(line_break, device=model.device))
        n = max(len(safe), len(adversarial))
        safe, adversarial = (torch.cat([filler.expand(n - len(p), -1), p]) for p in (safe, adversarial))
    if prompt_type == "key_value":
        safe, adversarial = (embeddings_to_key_values(model, prompt) for prompt in (safe, adversarial))
    config = dataclasses.replace(pair.config, format_version=None, prompt_type=prompt_type, share_instruction_kv=None)
    return PromptPair(safe, adversarial, config)


def _common_length(pair: PromptPair) -> int:
    lengths = len(pair.safeguarding), len(pair.adversarial)
    if lengths[0] != lengths[1] or not lengths[0]:
        raise ValueError(
            f"vLLM needs two prompts of one length, and these have {lengths[0]} and {lengths[1]} virtual tokens: "
            "train them with the same number."
        )
    return lengths[0]


@torch.no_grad()
def _write_tensors(path: Path, pair: PromptPair, model: PreTrainedModel) -> None:
    embedding = model.get_input_embeddings()
    last = min(embedding.num_embeddings, model.config.get_text_config().vocab_size) - 1
    ids = torch.linspace(0, last, _PROBES, device=model.device).long().unique()
    made = [embedding(ids)]
    if pair.config.prompt_type == "key_value":
        keys, values = prompt_key_values(model, made[0][None], _PROBE_POSITION)[0]  # type: ignore[misc]
        positions = torch.arange(_PROBE_POSITION, _PROBE_POSITION + len(ids))
        made = [positions, torch.stack([keys[0], values[0]]).permute(2, 0, 1, 3)]
    tensors = (pair.safeguarding.float(), pair.adversarial.float(), ids, *made)
    contents = {
        name: tensor.cpu().contiguous() for name, tensor in zip(TENSORS[pair.config.prompt_type], tensors, strict=True)
    }
    save_file(contents, path, metadata={"format": "pt"})


# ----- the tokenizer -----


def _free_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """An id that no text becomes, for the placeholders."""
    free = max(tokenizer.get_vocab().values()) + 1
    if free > vocab_size:
        raise ValueError(f"this tokenizer has more tokens than the model, which knows {vocab_size}.")
    return free
