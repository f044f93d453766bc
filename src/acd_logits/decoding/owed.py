"""The contrasts that a decoding loop owes: a forward whose logits choose a token must be followed by eq. 5."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

NOT_ASKED = (
    "the model ran under ACD, but its logits were never contrasted: the decoding loop left the logits processors out. "
    "Use a decoding method that calls logits_processor at every token."
)


class Owed:
    """The adversarial logits of the last forward, and its positions that nobody has contrasted yet.

    The next forward and the end of the call raise where none of them was asked for, so no decoding loop goes on with
    the safeguarding stream alone, unnoticed. Each position is given once: a second question means another text.

    Args:
        prompt_length: visible tokens the prefill ends with; a forward that ends earlier owes nothing.
        offset: visible tokens that are not in generate's `input_ids`.
    """

    def __init__(self, prompt_length: int, offset: int) -> None:
        self.prompt_length, self.offset = prompt_length, offset
        self.adversarial: torch.Tensor | None = None  # [B, kept, vocab]; None past the horizon too
        self._last = 0  # visible length at the last kept position
        self._open: set[int] = set()  # kept positions, counted from the last one, that nobody has asked for
        self._due = False  # whether one of them must be asked for before anything else
        self._closed = False  # whether the generate call is over

    def check(self) -> None:
        """Raise RuntimeError where a forward would go on from one without contrast, or outside of generate()."""
        if self._closed:
            raise RuntimeError(
                "this cache belongs to a generate() call under ACD that is over, and nothing would contrast the "
                "logits of another forward: go on with generate(..., past_key_values=cache, logits_processor=[acd])."
            )
        if self._due:
            raise RuntimeError(NOT_ASKED)

    def note(self, last: int, kept: int, adversarial: torch.Tensor | None) -> None:
        """Note a forward whose `kept` last positions, up to visible length `last`, have logits."""
        self.adversarial, self._last = adversarial, last
        self._open = set(range(kept))
        self._due = last >= self.prompt_length  # not between the chunks of a prefill

    def take(self, ids_length: int) -> torch.Tensor | None:
        """Adversarial logits `[B, vocab]` for the token that follows `ids_length` input ids.

        Returns:
            The logits, or `None` past the horizon, where the safeguarding stream runs alone.

        Raises:
            RuntimeError: if the last forward does not cover that position, or was asked for it before.
        """
        back = self._last - self.offset - ids_length
        if back not in self._open:
            raise RuntimeError(
                "ACD has no adversarial logits for this position: the decoding loop did not call the model with the "
                "cache that generate() prepared, so the contrast cannot be applied."
            )
        self._open.remove(back)
        self._due = False
        if self.adversarial is None:
            return None
        logits = self.adversarial[:, -1 - back]
        if not self._open:
            self.adversarial = None  # beams need not reorder it
        return logits

    def select(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a selection of visible rows."""
        self.adversarial = None if self.adversarial is None else rows(self.adversarial)

    def drop(self) -> None:
        """Forget positions that are cropped; if a contrast is due, it stays so."""
        self.adversarial, self._open = None, set()

    def close(self) -> None:
        """End the generate call; raise RuntimeError if the logits of its last forward were never contrasted."""
        if self._due:
            raise RuntimeError(NOT_ASKED)
        self._closed = True
