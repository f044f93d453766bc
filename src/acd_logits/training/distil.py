"""Distil a pair's contrast into one key-value prompt, which stock peft runs in a single stream.

distil_data.py    the teacher: the pair's own continuations, with its distributions along them
distil_model.py   the student, and its divergence from the teacher
distil.py         the arguments, and the run
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from ..demo_model import resolve_pair_name
from ..pairs.distilled import DistilledPrompt
from ..pairs.fit import check_fit_unloaded
from ..pairs.key_values import check_shareable
from ..pairs.prompt_pair import PromptPair
from ..responses import check_context
from .arguments import OPOTrainingArguments, RunArguments, check_trainer_arguments, checkpoints_activations
from .distil_data import TeacherSettings, ask_teacher, check_memory, load_prompts
from .distil_model import DISTIL_NAMES, DistilTrainer, StudentModel, student_start
from .model import fast_head
from .run import (
    Run,
    base_facts,
    check_on_one_device,
    check_same_run,
    load_config,
    model_settings,
    place,
    shown_name,
    start_run,
    train_prompts,
    trainer_settings,
    use_one_device,
    what_came_out,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

TEACHER_NAME = "teacher.jsonl"


@dataclasses.dataclass(kw_only=True)
class DistilArguments(RunArguments):
    """Which pair is distilled, on what, and how."""

    _argument_group_name = "distillation"

    pair: str = HfArg(help="distil the pair in this folder or with this Hub id")
    revision: str | None = HfArg(default=None, help="read the pair from this branch, tag or commit on the Hub")
    alpha: float | None = HfArg(default=None, help="contrast the teacher at this strength instead of the pair's")
    beta: float | None = HfArg(
        default=None, help="cut the teacher at this plausibility threshold instead of the pair's"
    )
    divergence: Literal["forward_kl", "reverse_kl", "total_variation"] = HfArg(
        default="forward_kl", help="bring the student closer to the teacher by this measure"
    )
    first_token_weight: float = HfArg(
        default=1.0, help="add the divergence at the first tokens once more, times this: they decide"
    )
    max_response_tokens: int = HfArg(default=64, help="follow the teacher for this many tokens")
    temperature: float = HfArg(
        default=0.7, help="let the teacher sample at this temperature; 0 takes the likeliest tokens"
    )
    teacher_batch_size: int = HfArg(default=32, help="let the teacher answer this many prompts together")
    top_k: int = HfArg(default=64, help="keep this many of the teacher's likeliest tokens, and the sum of all others")
    max_prompts: int | None = HfArg(default=None, help="draw this many of the anchors' prompts instead of taking all")
    balance: bool = HfArg(
        default=True, help="put as many harmful prompts, near misses and everyday ones into every batch"
    )

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: for one out of its range.
        """
        counts = ("max_response_tokens", "teacher_batch_size", "top_k", "max_prompts")
        wanted = dict.fromkeys(counts, "at least 1")
        wanted |= dict.fromkeys(("first_token_weight", "temperature"), "finite and at least 0")
        wanted |= {"beta": "from 0 to 1"} | dict.fromkeys(("held_out_fraction", "alpha"), "at least 0 and below 1")
        self.check_ranges(wanted)

    @functools.cached_property
    def teacher(self) -> PromptPair:
        """The pair, loaded once, with the strength and the threshold of this run.

        Raises:
            OSError, ValueError: it cannot be loaded.
        """
        pair = PromptPair.from_pretrained(resolve_pair_name(self.pair), revision=self.revision)
        given = {name: value for name in ("alpha", "beta") if (value := getattr(self, name)) is not None}
        return PromptPair(pair.safeguarding, pair.adversarial, dataclasses.replace(pair.config, **given))


@dataclasses.dataclass
class DistilTrainingArguments(OPOTrainingArguments):
    """transformers' arguments, with the defaults of training a pair but for those that are named here."""

    output_dir: str = HfArg(default="distilled", help="write the adapter, and the checkpoints, into this folder")
    learning_rate: float = HfArg(default=1e-2, help="train the prompt at this rate")
    # A balanced batch has as many harmful prompts, near misses and everyday ones
    per_device_train_batch_size: int = HfArg(default=30, help="put this many examples into a step on each device")


def parse_distil_arguments(values: dict[str, Any]) -> tuple[DistilArguments, DistilTrainingArguments]:
    """Both groups of arguments, as of `parse_arguments`.

    Raises:
        ValueError: a value is wrong.
    """
    parser = HfArgumentParser((DistilArguments, DistilTrainingArguments))
    options, args = parser.parse_dict(values, allow_extra_keys=True)
    return options, args


def prepare_distillation(options: DistilArguments, args: DistilTrainingArguments) -> Run[DistilArguments]:
    """Do everything that needs no weights: what is wrong with the input shows here.

    Raises:
        ImportError, RuntimeError: as of `prepare`.
        OSError: a file, the pair or the model cannot be read.
        ValueError: the pair cannot be distilled, or not so; the message says what to do.
    """
    check_trainer_arguments(args)
    use_one_device(args)
    if checkpoints_activations(args):
        raise ValueError("a key-value prompt cannot be trained under --gradient_checkpointing: leave it out")
    if args.push_to_hub:
        raise ValueError("--push_to_hub is for pairs: acd-logits push --adapter uploads what was distilled")
    pair = options.teacher
    if pair.alpha >= 1:
        raise ValueError(f"the contrast of alpha {pair.alpha:g} is no distribution to follow: set --alpha below 1")
    if options.divergence == "reverse_kl" and pair.beta:
        raise ValueError(
            f"the reverse KL divergence is infinite where beta {pair.beta:g} cuts the teacher off: add --beta 0, or "
            "choose another --divergence"
        )
    if not len(pair.safeguarding):
        raise ValueError(f"the SP of {options.pair} is empty, and a student starts from it: distil another pair")
    config, tokenizer = load_config(options)
    check_fit_unloaded(pair.config, config, options.model_path, transfer=True)
    chat = options.uses_chat(tokenizer)
    if chat:
        pair.check_chat_template(tokenizer)
    prompts = load_prompts(
        options.train_file, tokenizer, chat, options.held_out_fraction, args.seed, options.max_prompts
    )
    needed = check_memory(len(list(prompts)), options.max_response_tokens, options.top_k)
    logger.info(f"The teacher's distributions take at most {needed / 2**20:.0f} MiB.")
    run = Run(options, args, tokenizer, prompts)
    check_same_run(run.folder, distil_settings(run))
    return run


def distil(model: PreTrainedModel, run: Run[DistilArguments]) -> DistilledPrompt:
    """Let the pair answer, train the student on what it says, and save the adapter to the run's folder.

    A run that was interrupted goes on where it was, within the teacher's answers too. With several processes, the
    first one asks the teacher, and the others wait for it.

    Args:
        model: the model; its weights are frozen and stay as they are.
        run: what to distil, how, and on what, as of [`prepare_distillation`].

    Returns:
        The adapter, as saved.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
        ValueError: the folder holds a run with other settings, or the pair or the model cannot be used.
    """
    model = place(model, run).eval()
    check_shareable(model, key_value=True)
    check_on_one_device(model)
    pair, settings = run.options.teacher, distil_settings(run)
    pair.check(model)
    longest = max(len(e["input_ids"]) for e in run.examples) + run.options.max_response_tokens
    check_context(model, max(len(pair.safeguarding), len(pair.adversarial)) + longest)
    start_run(run, settings)
    with run.args.main_process_first(local=False, desc="the teacher's answers"):
        examples = ask_teacher(
            model, run.tokenizer, run.examples, pair, _teacher_settings(run), run.folder / TEACHER_NAME
        )
    student = StudentModel(model, student_start(model, pair))
    with fast_head(student):
        log = train_prompts(student, dataclasses.replace(run, examples=examples), DistilTrainer)
    model.eval()
    tokens = sum(len(e["response"]) for e in examples.train)
    measured = what_came_out(model, run, log, DISTIL_NAMES) | {"teacher_tokens": tokens}
    teacher = {"pair": settings["pair"], "pair_digest": pair.digest, "alpha": pair.alpha, "beta": pair.beta}
    facts = {**base_facts(run), "teacher": teacher, "training": settings | measured, "results": {}}
    with torch.no_grad():
        distilled = DistilledPrompt(student.prompt().to("cpu", model.dtype), facts)
    if run.args.should_save:
        distilled.save_pretrained(run.folder)
    return distilled


def _teacher_settings(run: Run[DistilArguments]) -> TeacherSettings:
    options, pair = run.options, run.options.teacher
    return TeacherSettings(
        alpha=pair.alpha,
        beta=pair.beta,
        temperature=options.temperature,
        max_response_tokens=options.max_response_tokens,
        top_k=options.top_k,
        batch_size=options.teacher_batch_size,
        seed=run.args.seed,
    )


def distil_settings(run: Run[DistilArguments]) -> dict[str, Any]:
    """What decides how the student comes out."""
    options = run.options
    ours = ("dtype", "held_out_fraction", "max_prompts", "balance", "divergence", "first_token_weight")
    prompts = json.dumps([[e["instruction"], e["split"], e["begun"]] for e in run.examples])
    return {
        **model_settings(run),
        "pair": shown_name(resolve_pair_name(options.pair)),
        "pair_digest": options.teacher.digest,
        "teacher": dataclasses.asdict(_teacher_settings(run)),
        **{name: getattr(options, name) for name in ours},
        **trainer_settings(run.args),
        "prompts": {name: len(getattr(run.examples, name)) for name in ("train", "held_out")},
        "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
    }
