"""The student: one key-value prompt where stock peft puts it, how far it is from the teacher, and its Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..pairs.distilled import TOKEN_RANGES
from ..pairs.key_values import embeddings_to_key_values
from .data import IGNORED
from .distil_data import collate_teacher
from .model import PromptedModel, by_length, forward_behind_prefix, trim
from .prompts import TrainablePrompt
from .trainer import PromptTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from ..pairs.prompt_pair import PromptPair
    from .arguments import RunArguments
    from .data import Batch

RANGES = {where: tokens for where, (_, tokens) in TOKEN_RANGES.items()}
MEASURES = ("divergence", "KL", "agreement")
DISTIL_NAMES = [f"{measure}{where}" for measure in MEASURES for where in RANGES]


class StudentModel(PromptedModel):
    """The frozen model behind one key-value prompt, as `PeftModel.generate()` has a cartridge.

    The whole input sees the prompt's n tokens, which have the positions 0 to n - 1, and begins at position n.

    Args:
        model: the base model, as of [`PromptedModel`].
        start: what the prompt starts as, `[n, layers, 2, kv_heads, head_dim]`.
    """

    def __init__(self, model: PreTrainedModel, start: torch.Tensor) -> None:
        super().__init__(model)
        self.prompt = TrainablePrompt(start)
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits for the response tokens, in parts as of [`OPOModel`]: rows `[b]` and logits `[b, r, vocab]`."""
        prompt, parts = self.prompt(), []
        for rows in by_length((labels != IGNORED).sum(-1)):
            part = trim(input_ids[rows], attention_mask[rows], labels[rows])
            parts.append((rows, forward_behind_prefix(self.base, prompt, *part)))
        return parts


def student_start(model: PreTrainedModel, pair: PromptPair) -> torch.Tensor:
    """What the student starts as: the pair's SP.

    Keys and values are taken as they are: learned for tokens at every distance, they bear the n positions that peft
    puts in between. An embedding SP becomes keys and values at the positions 0 to n - 1, which decode as its stream
    does.

    Returns:
        `[n, layers, 2, kv_heads, head_dim]`, float32.
    """
    prompt = pair.safeguarding.to(model.device)
    return (prompt if prompt.ndim == 5 else embeddings_to_key_values(model, prompt, start=0)).float()


def student_log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The student's log-probabilities of the teacher's tokens, and of all others together.

    Args:
        logits: `[..., vocab]`.
        ids: `[..., k]`.

    Returns:
        `[..., k + 1]`.
    """
    total = logits.logsumexp(-1, keepdim=True)
    tail = logits.scatter(-1, ids, torch.finfo(logits.dtype).min).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), tail], -1) - total


def forward_kl(teacher: torch.Tensor, student: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student): the student covers all that the teacher may say."""
    return (teacher.exp() * (teacher.masked_fill(~kept, 0.0) - student)).masked_fill(~kept, 0.0).sum(-1)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher): the student says nothing that the teacher would not."""
    return (student.exp() * (student - teacher.masked_fill(~kept, 0.0))).masked_fill(~kept, 0.0).sum(-1)


def total_variation(teacher: torch.Tensor, student: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Half the sum of all differences in probability; the student's probability of the others counts in any case."""
    kept = torch.cat([kept[..., :-1], torch.ones_like(kept[..., -1:])], -1)
    return 0.5 * (teacher.exp() - student.exp()).abs().masked_fill(~kept, 0.0).sum(-1)


# Each of log-probabilities `[..., k + 1]` of teacher and student, and of where the teacher's are above -inf: `[...]`.
# What stands together in the last place is compared as one, so each is a lower bound of that over the vocabulary
DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
}


class DistilTrainer(PromptTrainer):
    """The student's divergence from the teacher, as a mean over all tokens, and over first tokens once more.

    Sums and counts of tokens have a shape of `[3, 4]`: the divergence, the forward KL and top-1 agreement; the
    `RANGES` of tokens.

    Args:
        options: which divergence, and the weight of first tokens.
        kwargs: as of `Trainer`; the model is a [`StudentModel`].
    """

    names, shape = DISTIL_NAMES, (len(MEASURES), len(RANGES))

    def __init__(self, options: RunArguments, **kwargs: Any) -> None:
        super().__init__(options, data_collator=collate_teacher, **kwargs)

    def sums(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """What each row adds to the terms, `[B, 3, 4]`."""
        labels = inputs["labels"]
        sums = torch.zeros(len(labels), *self.shape, device=labels.device)
        for rows, logits in model(inputs["input_ids"], inputs["attention_mask"], labels):
            length = logits.shape[1]
            ids, teacher = (inputs[f"teacher_{name}"][rows, :length] for name in ("ids", "log_probs"))
            student, kept = student_log_probs(logits.float(), ids), teacher.isfinite()
            divergence = DIVERGENCES[self.options.divergence](teacher, student, kept)
            with torch.no_grad():
                kl, agrees = forward_kl(teacher, student, kept), logits.argmax(-1) == ids[..., 0]
            each = torch.stack([divergence, kl, agrees.float()], 1).masked_fill(
                (labels[rows, :length] == IGNORED)[:, None], 0.0
            )
            sums = sums.index_put((rows,), torch.stack([each[..., where].sum(-1) for where in RANGES.values()], -1))
        return sums

    def counts(self, inputs: Batch) -> torch.Tensor:
        """Tokens of each row that the terms are means over, `[B, 3, 4]`."""
        tokens = inputs["labels"] != IGNORED
        counts = torch.stack([tokens[:, where].sum(-1) for where in RANGES.values()], -1)
        return counts[:, None].expand(-1, len(MEASURES), -1).float()

    def weighted(self, means: torch.Tensor) -> torch.Tensor:
        """The divergence over all tokens, and that of the first ones times its weight."""
        return means[0, 0] + self.options.first_token_weight * means[0, 1]
