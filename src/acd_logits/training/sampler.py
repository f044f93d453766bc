"""The order of an epoch: balanced batches, in which examples that mirror each other come together."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ..anchors import SPLITS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .data import Example

logger = logging.get_logger(__name__)


class BalancedSampler(torch.utils.data.Sampler[int]):
    """Examples in an order in which every batch has as many of each group: D_HR, D_HA, and in D_S each kind.

    Instructions that mirror each other come together, so that what sets them apart is what a step learns; the topic
    and the form they share cancel out. Batches are of like length. An epoch takes as many examples from each group
    as the smallest one has. It chooses them anew in every epoch, but takes an apology, which has most to learn, before
    any other example of its group.

    Args:
        examples: as of [`encode_anchors`].
        batch_size: examples in a step.
        seed: of the choice and the order.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        groups: dict[tuple[int, str], list[int]] = defaultdict(list)
        for i, example in enumerate(examples):
            groups[example["split"], example["kind"]].append(i)
        ordered = sorted(groups.values(), key=len)
        self.size = len(ordered[0])  # of every group in an epoch
        if len(ordered) > 1 and 4 * self.size < len(ordered[1]):
            counts = {f"{SPLITS[split]} {kind}": len(group) for (split, kind), group in groups.items()}
            logger.warning(
                f"A balanced epoch has {self.size} examples of each group, as many as the rarest one, of {counts}. "
                "Add some of it, or set --num_train_epochs or --max_steps accordingly."
            )
        mirrors = [{examples[i]["mirror"] for i in group} for group in ordered]
        paired = [i for i, own in enumerate(mirrors) if any(own & other for other in mirrors if other is not own)]
        # The first group leads, and the others are put beside it: the smallest one that has mirrors in another
        leader = ordered.pop(paired[0] if paired else 0)
        self.groups = [leader, *ordered]
        self.examples, self.seed, self.epoch = examples, seed, 0
        self.share = max(1, batch_size // len(self.groups))

    def __len__(self) -> int:
        return len(self.groups) * self.size

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, also when a run goes on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self.seed} {self.epoch}")
        leader, *others = (chance.sample(group, len(group)) for group in self.groups)
        for group in (leader, *others):
            group.sort(key=lambda i: not self.examples[i].get("apology"))
        leader = sorted(leader[: self.size], key=self._length)
        rows = list(zip(leader, *(self._beside(leader, group) for group in others), strict=True))
        # Off by a little, so that an instruction does not meet the same ones in every epoch
        rows.sort(key=lambda row: max(map(self._length, row)) + chance.uniform(-2, 2))
        shares = [rows[i : i + self.share] for i in range(0, len(rows), self.share)]
        last = [shares.pop()] if len(shares[-1]) < self.share else []  # a short one would shift those behind it
        chance.shuffle(shares)
        return itertools.chain.from_iterable(itertools.chain.from_iterable([*shares, *last]))

    def _length(self, i: int) -> int:
        return len(self.examples[i]["input_ids"])

    def _beside(self, rows: list[int], group: list[int]) -> list[int]:
        """For each row one of the group: its mirror, or, where there is none, one of the others by length."""
        mirrors = defaultdict(list)
        for i in group:
            mirrors[self.examples[i]["mirror"]].append(i)
        found = [mirrors[self.examples[i]["mirror"]] for i in rows]
        beside = [mirror.pop() if mirror else None for mirror in found]
        rest = list(itertools.chain.from_iterable(mirrors.values()))
        fill = iter(sorted(rest[: beside.count(None)], key=self._length))
        return [next(fill) if i is None else i for i in beside]
