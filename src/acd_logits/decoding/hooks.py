"""What ACD hooks into in transformers, by name: where something has moved, this is said before a model is loaded.

Some of these methods are private. A release of transformers may rename them, or an argument of theirs, without notice.
"""

from __future__ import annotations

import inspect

import transformers
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

SUPPORTED = "5.16 to 5.23"
# Of each method, the arguments that ACD reads or passes by name
HOOKS: dict[tuple[type, str], tuple[str, ...]] = {
    (GenerationMixin, "generate"): ("inputs", "generation_config", "logits_processor"),
    (GenerationMixin, "generate_batch"): (),
    (GenerationMixin, "init_continuous_batching"): (),
    (GenerationMixin, "prepare_inputs_for_generation"): (
        "input_ids", "past_key_values", "next_sequence_length", "is_first_iteration",
    ),
    (GenerationMixin, "_get_logits_processor"): (
        "generation_config", "input_ids_seq_length", "encoder_input_ids", "logits_processor", "model_kwargs",
    ),
    (GenerationMixin, "_get_candidate_generator"): ("logits_processor", "model_kwargs"),
    (GenerationMixin, "_valid_auto_compile_criteria"): ("model_kwargs", "generation_config"),
    (GenerationMixin, "_supports_default_dynamic_cache"): (),
    (GenerationMixin, "_supports_logits_to_keep"): (),
    (PreTrainedModel, "get_compiled_call"): ("compile_config",),
}  # fmt: skip


def check_hooks() -> None:
    """Compare the installed transformers with `HOOKS`.

    Raises:
        ImportError: a method, or an argument of one, has moved; the message names it.
    """
    for (owner, name), arguments in HOOKS.items():
        method = getattr(owner, name, None)
        found = [] if method is None else list(inspect.signature(method).parameters)
        missing = [f"{owner.__name__}.{name}({argument})" for argument in arguments if argument not in found]
        if method is None:
            missing = [f"{owner.__name__}.{name}"]
        if missing:
            raise ImportError(
                f"transformers {transformers.__version__} has no {missing[0]}, which ACD hooks into: install "
                f"transformers {SUPPORTED}.",
                name="transformers",
            )
