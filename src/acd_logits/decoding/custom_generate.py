"""ACD in one line, with a pair from the Hub and without a processor of one's own.

`model.generate(**inputs, custom_generate="org/pair", trust_remote_code=True)` fetches `custom_generate/generate.py`
from the pair's repository and calls its `generate`, which calls `generate_with_pair` here. The script is written by
`acd_logits.pairs.custom_generate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .logits_process import ACDLogitsProcessor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def generate_with_pair(
    model: PreTrainedModel,
    repo_id: str,
    *,
    alpha: float | torch.Tensor | None = None,
    beta: float | None = None,
    horizon: int | None = None,
    share_instruction_kv: bool | None = None,
    keep_temperature: bool = True,
    logits_processor: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> Any:
    """Generate under ACD, and leave the model as it was.

    Args:
        model: the model whose `generate` was called.
        repo_id: the pair's id on the Hub.
        alpha: see [`ACDLogitsProcessor`].
        beta: see [`ACDLogitsProcessor`].
        horizon: see [`ACDLogitsProcessor`].
        share_instruction_kv: see [`ACDLogitsProcessor`].
        keep_temperature: see [`ACDLogitsProcessor`].
        logits_processor: other processors, which act before the contrast.
        revision: branch, tag or commit of the pair.
        token: Hub token, for a private pair.
        cache_dir: where downloads are kept.
        local_files_only: whether to ask the Hub for nothing.
        **kwargs: passed to `generate`.

    Returns:
        What `generate` returns.

    Raises:
        OSError: the pair cannot be loaded.
        ValueError: it does not fit the model, or the model is one ACD cannot run on.
    """
    acd = ACDLogitsProcessor.from_pretrained(
        repo_id,
        model,
        alpha=alpha,
        beta=beta,
        horizon=horizon,
        share_instruction_kv=share_instruction_kv,
        keep_temperature=keep_temperature,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    try:
        return model.generate(**kwargs, logits_processor=[*(logits_processor or []), acd])
    finally:
        acd.detach()
