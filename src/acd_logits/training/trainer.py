"""transformers' Trainer for losses that are means over tokens, and the one for SP, AP and their contrast.

"Mean over tokens" in eq. 3 and 4 is the mean over all tokens of a split in one optimiser step, over every process and
every micro-batch: the sum of the losses is divided by a count that was gathered before the step. So gradient
accumulation and the number of processes change nothing but the speed, save for L_m, which needs both rows of a pair in
one micro-batch.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from ..anchors import SPLITS
from ..decoding.contrast import contrast
from .data import IGNORED, collate, leave_out_apologies, refusal_openings
from .loss import TERMS, count_tokens, joint_loss, mirror_loss, mirrored_rows
from .model import trim
from .sampler import BalancedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import EvalPrediction, TrainerState

    from .arguments import OPOArguments, RunArguments
    from .data import Batch, Example

PLAIN_CACHE_BYTES = 2 << 30  # so much of the plain model's logits is kept for the KL forms of L_r
# Each term of each loss as it stands in the log: over all tokens of the responses, and over their first ones
NAMES = [f"{stream}_{term}{which}" for which in ("", "_first") for stream in ("SP", "AP", "ACD") for term in TERMS]
MIRROR_NAMES = ["SP_L_m", "ACD_L_m"]  # over the instructions that mirror each other in a batch


class PromptTrainer(Trainer):
    """transformers' Trainer with a loss made of means over tokens, each of its terms in the log.

    Args:
        options: what the run is told; with `balance`, batches are balanced.
        kwargs: as of `Trainer`.
    """

    names: list[str]  # of the terms, in the log
    shape: tuple[int, ...]  # of the terms, as `sums` and `counts` have them behind the rows

    def __init__(self, options: RunArguments, **kwargs: Any) -> None:
        super().__init__(compute_metrics=self._held_out_loss, **kwargs)
        self.options: Any = options
        self.model_accepts_loss_kwargs = True  # our mean is over all micro-batches: nothing is left to divide
        # Sums and token counts of the terms since the last line of the log
        self._logged = torch.zeros(2, *self.shape, device=self.args.device)
        self.add_callback(_SetEpoch(self))

    @abstractmethod
    def sums(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """What each row adds to the terms, `[B, *shape]`."""

    @abstractmethod
    def counts(self, inputs: Batch) -> torch.Tensor:
        """Tokens of each row that the terms are means over, `[B, *shape]`."""

    @abstractmethod
    def weighted(self, means: torch.Tensor) -> torch.Tensor:
        """The loss, from the terms' means, `[*shape]`."""

    def _get_train_sampler(
        self, train_dataset: Sequence[Example] | None = None
    ) -> torch.utils.data.Sampler[int] | None:
        """The order of an epoch."""
        return self.balanced if self.options.balance else super()._get_train_sampler(train_dataset)

    @functools.cached_property
    def balanced(self) -> BalancedSampler:
        """The order of an epoch with balanced batches."""
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BalancedSampler(self.train_dataset, batch_size, seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """Fetch the micro-batches of one step, and count each term's tokens in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rebalanced = not self.options.balance and self.args.train_sampling_strategy == "batch_rebalance"
        filled_up = self.accelerator.num_processes > 1 and not (self.args.dataloader_drop_last or rebalanced)
        if batches and filled_up and self.accelerator.gradient_state.end_of_dataloader:
            # accelerate fills the last batches of an epoch up with rows from its start: they must not count twice.
            # It counts the rows of the data, of which a balanced epoch has fewer
            order: Any = self._get_train_sampler()
            of_process = self.args.train_batch_size
            if left := len(order) % (of_process * self.accelerator.num_processes):
                first = max(0, left - self.args.process_index * of_process)
                batches[-1]["labels"][first:] = batches[-1]["avoided"][first:] = IGNORED
        counts = torch.zeros(self.shape, device=device)
        for batch in batches:
            counts += self.counts(batch).sum(0).to(device)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of the step's loss."""
        assert num_items_in_batch is not None
        sums, counts = self.sums(model, inputs), self.counts(inputs)
        self._logged += torch.stack([sums.detach().sum(0), counts.sum(0)])
        loss = self.weighted(sums.sum(0) / num_items_in_batch.clamp(min=1))
        _check_finite(loss.item(), self.state.global_step)
        # The gradients of several processes are averaged, but each process has only its share of the sum
        return loss * self.accelerator.num_processes

    def prediction_step(
        self, model: torch.nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Sums and token counts of each row, `[B, *shape]`, in the places of logits and labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return None, self.sums(model, inputs), self.counts(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, over the tokens since the last line, to a line of the training log."""
        if "loss" in logs:
            logs = logs | self._means(*self.accelerator.reduce(self._logged, reduction="sum"))
            self._logged.zero_()
        super().log(logs, start_time)

    def _held_out_loss(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means over all held-out tokens; "loss" chooses the best checkpoint."""
        sums, counts = (torch.from_numpy(rows).sum(0) for rows in (prediction.predictions, prediction.label_ids))
        loss = self.weighted(sums / counts.clamp(min=1)).item()
        _check_finite(loss, self.state.global_step)
        return {"loss": loss} | self._means(sums, counts)

    def _means(self, sums: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
        values = zip(self.names, sums.flatten(), counts.flatten(), strict=True)
        return {name: (s / n).item() for name, s, n in values if n > 0}


class _SetEpoch(TrainerCallback):
    """Tells the balanced order its epoch: where several processes go on, no one else reaches it."""

    def __init__(self, trainer: PromptTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer.options.balance:
            self.trainer.balanced.set_epoch(int(state.epoch or 0))


class OPOTrainer(PromptTrainer):
    """The losses of eq. 3, 4 and 5.

    Sums and counts are flat: 18 of tokens (`[2, 3, 3]`: all tokens and first tokens; SP, AP and the contrast; L_p, L_n
    and L_r), then L_m of SP and of the contrast.

    Args:
        options: weights of the terms and the form of L_r.
        kwargs: as of `Trainer`; the model is an [`OPOModel`].
    """

    names, shape = [*NAMES, *MIRROR_NAMES], (len(NAMES) + len(MIRROR_NAMES),)

    def __init__(self, options: OPOArguments, **kwargs: Any) -> None:
        self._openings = refusal_openings(kwargs["train_dataset"])
        self._refused = self._openings if options.retain == "answer" else []
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = kwargs[name] and leave_out_apologies(kwargs[name], self._refused)
        super().__init__(options, data_collator=collate, **kwargs)
        self._plain: dict[tuple[int, ...], torch.Tensor] = {}

    def sums(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """What each row adds to the terms, `[B, terms]`; L_m is added by the harmful row of a pair."""
        labels, avoided, splits = (inputs[name] for name in ("labels", "avoided", "splits"))
        sums = torch.zeros(len(labels), 2, 3, 3, device=labels.device)
        first: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows, and logits of their first tokens
        for rows, logits in model(inputs["input_ids"], inputs["attention_mask"], labels):
            safe, adversarial = logits["safeguarding"], logits["adversarial"]
            y, y_avoided = (tokens[rows, : safe.shape[1]] for tokens in (labels, avoided))
            plain = None if self.options.retain == "ce" else self._plain_logits(inputs, rows, safe.shape[1])
            stops = {safe.shape[1], 1}  # all tokens, and the first ones
            of_stop = {
                stop: joint_loss(
                    safe[:, :stop],
                    adversarial[:, :stop],
                    y[:, :stop],
                    y_avoided[:, :stop],
                    splits[rows],
                    self.options.alpha,
                    None if plain is None else plain[:, :stop],
                )
                for stop in stops
            }
            of_part = [of_stop[stop] for stop in (safe.shape[1], 1)]
            sums = sums.index_put((rows,), torch.stack(of_part, 1))
            if self.options.mirror_weight:
                contrasted = contrast(safe[:, 0].float(), adversarial[:, 0].float(), self.options.alpha)
                first.append((rows, torch.stack([safe[:, 0].float(), contrasted], 1)))
        return torch.cat([sums.flatten(1), self._mirror_sums(first, inputs)], 1)

    def _mirror_sums(self, first: list[tuple[torch.Tensor, torch.Tensor]], inputs: Batch) -> torch.Tensor:
        """L_m of SP and of the contrast, `[B, 2]`."""
        sums = torch.zeros(len(inputs["splits"]), 2, device=inputs["splits"].device)
        if not first:
            return sums
        safe, harmful = mirrored_rows(inputs)
        rows, logits = (torch.cat(parts) for parts in zip(*first, strict=True))
        logits = logits[rows.argsort()]
        openings = torch.tensor(self._openings, dtype=torch.long, device=logits.device)
        return sums.index_add(0, harmful, mirror_loss(logits[safe], logits[harmful], openings))

    def _plain_logits(self, inputs: Batch, rows: torch.Tensor, response_length: int) -> torch.Tensor:
        """Logits `[b, response_length, vocab]` without a prompt, of those of the rows that are of D_S.

        A row's stay as they are, and are computed once. With `--retain answer`, no response begins with a token that
        refusals begin with, unless it goes on with an answer that has begun.
        """
        rows = rows[inputs["splits"][rows] == SPLITS.index("D_S")]
        if not len(rows):
            return torch.zeros(0, response_length, 1, device=rows.device)
        ids, mask, labels = (inputs[name][rows] for name in ("input_ids", "attention_mask", "labels"))
        responses = labels != IGNORED
        keys = [
            (int(response.sum()), *row[kept].tolist())
            for row, kept, response in zip(ids, mask.bool(), responses, strict=True)
        ]
        new = [i for i, key in enumerate(keys) if key not in self._plain]
        found = {key: self._plain[key] for key in keys if key in self._plain}
        if new:
            part = trim(ids[new], mask[new], labels[new])
            # This goes past the wrapper of several processes, which would wait for one that has no such rows
            for i, row in zip(new, self.model.plain_logits(*part), strict=True):
                if not inputs["begun"][rows[i]]:
                    row[0, self._refused] = torch.finfo(row.dtype).min
                found[keys[i]] = row[responses[i, : len(row)]].cpu()
            if sum(logits.nbytes for logits in self._plain.values()) < PLAIN_CACHE_BYTES:
                self._plain |= found
        padded = torch.nn.utils.rnn.pad_sequence([found[key] for key in keys], batch_first=True)
        missing = response_length - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, 0, 0, missing)).to(ids.device)

    def counts(self, inputs: Batch) -> torch.Tensor:
        """Of each row the tokens, and for L_m the pairs, that the terms are means over, `[B, terms]`."""
        labels, avoided, splits = (inputs[name] for name in ("labels", "avoided", "splits"))
        tokens = torch.stack([count_tokens(labels[:, :s], avoided[:, :s], splits) for s in (None, 1)], dim=1)
        pairs = torch.zeros(len(splits), 2, dtype=tokens.dtype, device=splits.device)
        if self.options.mirror_weight:
            _, harmful = mirrored_rows(inputs)
            pairs = pairs.index_add(0, harmful, pairs.new_ones(len(harmful), 2))
        return torch.cat([tokens.flatten(1), pairs], 1)

    def weighted(self, means: torch.Tensor) -> torch.Tensor:
        """L_S + L_A + L_C, with L_m, from the terms' means."""
        weights = torch.tensor(self.options.weights, device=means.device)
        every, first = means[: len(NAMES)].view(2, *weights.shape)
        mirrored = (means[len(NAMES) :] * means.new_tensor([1.0, self.options.contrast_weight])).sum()
        tokens = ((every + self.options.first_token_weight * first) * weights).sum()
        return tokens + self.options.mirror_weight * mirrored


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} after {step} steps: lower --learning_rate")
