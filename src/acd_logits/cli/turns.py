"""Several `generate()` calls at once, each in a thread of its own, which take turns token by token.

Calls that compute at the same time would fight for the same cores, and the speed of none would mean anything. Taking
turns, each call computes alone, and all of their answers grow together. The turn goes to the call that has waited
longest. A call hands it on behind each token, and notes how long its own turns took.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from types import TracebackType


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Turns:
    """A lock that those who wait get in the order in which they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def acquire(self) -> None:
        """Wait for the turn."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def release(self) -> None:
        """Hand the turn to whoever has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # it stays taken
            else:
                self._taken = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class Turn(StoppingCriteria):
    """One `generate()` call among others: held around it, and given to it as a stopping criterion.

    Args:
        turns: what all calls on this machine share.
        stop: ends the call where it is, with [`Stopped`].
    """

    def __init__(self, turns: Turns, stop: threading.Event) -> None:
        self.turns, self.stop = turns, stop
        self.tokens, self.seconds = 0, 0.0  # new tokens so far, and how long they took to compute
        self._since = 0.0

    def __enter__(self) -> Turn:
        self.turns.acquire()
        if self.stop.is_set():
            self.turns.release()
            raise Stopped
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Stopped):  # which is raised where the turn is another's
            self.turns.release()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Let the others compute their next token; ends no row, `[B]` times false."""
        self.tokens += 1
        self.seconds += time.perf_counter() - self._since
        self.turns.release()
        self.__enter__()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
