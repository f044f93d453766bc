"""Log-likelihoods under ACD: of the distribution that the processor samples from, the softmax of the contrast."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from ..decoding.call import CACHE_NAMES
from ..decoding.contrast import contrast
from ..decoding.paired import PairedCache
from ..decoding.shared import SharedCache, SharedStreams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..decoding.logits_process import ACDLogitsProcessor


def contrasted_logits(
    acd: ACDLogitsProcessor, input_ids: torch.Tensor, beta: float, instruction: int | None = None
) -> torch.Tensor:
    """The contrast at the positions of given texts, in one paired forward.

    Every text stands behind the soft prompts from its first token on, so the rows may only be padded on the right:
    what a causal model says about a token does not depend on what follows.

    Args:
        acd: the processor, with one strength for all rows.
        input_ids: `[B, T]`.
        beta: plausibility threshold.
        instruction: how many tokens of every row are the instruction, behind which a response stands. Default: all is
            scored, and nothing is known of an instruction.

    Returns:
        `[B, T, vocab]` unnormalised float32 scores of the token that follows each position, `-inf` for those cut. With
        `instruction`, those from its last token on: `[B, T - instruction + 1, vocab]`. A horizon ends their contrast.

    Raises:
        ValueError: the processor shares the instruction, and it is not said where that ends; or the texts are longer
            than the soft prompts reach.
    """
    streams, length = acd.streams, input_ids.shape[1]
    if isinstance(streams, SharedStreams) and instruction is None:
        raise ValueError(
            "log-likelihoods cannot be scored under share_instruction_kv where a text does not say where its "
            "instruction ends: score a response behind an instruction."
        )
    streams.check_length(length + 1)
    model = acd.model
    # The forward's hooks answer a call that carries a paired cache: see paired.py
    inner = DynamicCache(config=model.config.get_text_config(decoder=True))
    if isinstance(streams, SharedStreams):
        cache: PairedCache = SharedCache(streams, inner)
        cache.begin_call(instruction or 0, length + 1, 0, None, None)
    else:
        cache = PairedCache(streams, inner)
    name = next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)
    safe = model(input_ids=input_ids, use_cache=True, **{name: cache}).logits
    adversarial = cache.owed.adversarial
    assert adversarial is not None
    kept = None if instruction is None else instruction - 1 - length  # counted from the end: a shared x has no logits
    safe, adversarial = safe[:, kept:], adversarial[:, kept:]
    # Row by row, since the contrast makes several copies of what it is given
    rows = zip(safe, adversarial, strict=True)
    scores = torch.stack([contrast(s.float(), a.float(), acd.alpha, beta, acd.keep_temperature) for s, a in rows])
    if instruction is not None and acd.horizon is not None:
        scores[:, acd.horizon :] = safe[:, acd.horizon :].float()
    return scores


@torch.no_grad()
def response_loglikelihoods(
    acd: ACDLogitsProcessor | PeftModel | PreTrainedModel,
    instruction: list[int],
    responses: Sequence[list[int]],
    beta: float = 0.0,
) -> list[tuple[float, bool]]:
    """The log-likelihoods of responses to one instruction, in one batch.

    Args:
        acd: the processor, with one strength for all rows; or a model, such as one behind a distilled
            adapter.
        instruction: its token ids, up to where a response begins; at least one.
        responses: the token ids of each response; at least one each.
        beta: plausibility threshold. A token below it has log-likelihood `-inf`.

    Returns:
        For each response, its log-likelihood, and whether greedy search would write it.
    """
    width = max(map(len, responses))
    rows = [instruction + response + [0] * (width - len(response)) for response in responses]
    model = acd if isinstance(acd, (PeftModel, PreTrainedModel)) else acd.model
    ids = torch.tensor(rows, device=model.device)[:, :-1]  # nothing is asked behind the last token
    if isinstance(acd, (PeftModel, PreTrainedModel)):
        scores = acd(input_ids=ids).logits[:, len(instruction) - 1 :].float()
    else:
        scores = contrasted_logits(acd, ids, beta, len(instruction))
    found = []
    for response, row in zip(responses, scores, strict=True):
        targets = torch.tensor(response, device=row.device)
        row = row[: len(response)]
        loglikelihood = row.log_softmax(-1).gather(-1, targets[:, None]).sum().item()
        found.append((loglikelihood, bool((row.argmax(-1) == targets).all())))
    return found
