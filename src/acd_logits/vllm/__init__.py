"""Contrastive decoding on vLLM: the plugin that serves what `acd-logits export-vllm` writes.

vLLM calls `register` in each of its processes. For every text model it knows, `<Arch>`, it then also knows
`ACD<Arch>`, the same model with both streams in one forward (`models`). An exported folder asks for that name, so a
vLLM without this plugin refuses the folder, and other models are served as before.

Nothing heavy is imported here: vLLM loads plugins early, and in processes that never see a model.
"""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["RequestAlpha", "register"]

logger = logging.getLogger(__name__)


def register() -> None:
    """Teach vLLM the architectures `ACD<Arch>`; the entry point in the group `vllm.general_plugins`.

    The checks on requests come first: where they cannot be put in place, no architecture is registered, and exported
    folders do not load.
    """
    from .exported import PREFIX

    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

        from .requests import install_checks
        from .startup import config_hook

        install_checks()
    except (AttributeError, ImportError) as error:
        logger.warning(f"acd-logits does not know this version of vLLM ({error}): exported models will not load.")
        return
    for architecture in list(ModelRegistry.get_supported_archs()):
        if architecture.endswith(("ForCausalLM", "LMHeadModel")) and not architecture.startswith(PREFIX):
            name = PREFIX + architecture
            ModelRegistry.register_model(name, f"{__name__}.models:{name}")
            MODELS_CONFIG_MAP[name] = config_hook(MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig))


def __getattr__(name: str) -> Any:
    """Import on first use: `--logits-processors acd_logits.vllm:RequestAlpha`."""
    if name == "RequestAlpha":
        from .sampling import RequestAlpha

        return RequestAlpha
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
