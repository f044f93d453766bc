"""Calls that take turns: in the order in which they asked, and none of them for ever."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from acd_logits.cli.turns import Stopped, Turn, Turns

IDS = torch.zeros(2, 3, dtype=torch.long)


def run(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
        time.sleep(0.01)  # so that they ask in this order
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_calls_alternate_token_by_token(monkeypatch):
    turns, order, clock = Turns(), [], itertools.count()
    monkeypatch.setattr("acd_logits.cli.turns.time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def call(name):
        with Turn(turns, threading.Event()) as turn:
            for _ in range(3):
                time.sleep(0.07)
                order.append(name)
                assert turn(IDS, None).tolist() == [False, False]
        assert turn.tokens == 3
        assert turn.seconds == 3, "the others' time does not count"

    run(lambda: call("a"), lambda: call("b"), lambda: call("c"))
    assert "".join(order) == "abc" * 3


def test_a_stopped_call_ends_at_its_next_token_and_hands_the_turn_on():
    turns, stop = Turns(), threading.Event()
    with pytest.raises(Stopped), Turn(turns, stop) as turn:
        turn(IDS, None)
        stop.set()
        turn(IDS, None)
    with pytest.raises(Stopped), Turn(turns, stop):
        pytest.fail("it was stopped before it began")
    run(turns.acquire)


def test_a_failed_call_hands_the_turn_on():
    turns = Turns()
    with pytest.raises(ValueError), Turn(turns, threading.Event()):
        raise ValueError
    with turns:
        pass
    run(turns.acquire)
