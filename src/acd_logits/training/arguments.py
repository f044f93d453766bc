"""The arguments of a training run: ours, and transformers' with other defaults."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from ..demo_model import DEMO_MODEL, resolve_model_name, resolve_pair_name
from ..pairs.prompt_pair import PromptPair
from ..pairs.texts import OPPOSITE_PROMPT, SAFE_PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase


KEY_VALUE_TOKENS = 64
# The ranges of numbers, by the words for them
RANGES: dict[str, Callable[[Any], bool]] = {
    "at least 1": lambda value: value >= 1,
    "finite and at least 0": lambda value: 0 <= value < math.inf,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
}


@dataclass(kw_only=True)
class RunArguments:
    """What every kind of run is told: the anchor data, what is held out of it, and the frozen model."""

    train_file: str = HfArg(
        help="read the anchor data from this file: an instruction, a response and a split (D_HR, D_HA or D_S) per row"
    )
    model_name_or_path: str = HfArg(default=DEMO_MODEL, help="train for this model: a folder or a Hub id")
    model_revision: str | None = HfArg(default=None, help="take this branch, tag or commit of the model on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help="load the frozen model in this type; auto means bfloat16 on a GPU and float32 elsewhere"
    )
    device_map: str | None = HfArg(
        default=None, help='pass this device_map to from_pretrained; "auto" splits the model up, for embedding prompts'
    )
    chat: bool | None = HfArg(
        default=None,
        help="use the chat template; --no_chat leaves it out; without either, it is used if there is one",
        metadata={"nargs": "?", "const": True},
    )
    held_out_fraction: float = HfArg(
        default=0.15, help="hold out this share of the instructions for evaluation; 0 holds out none"
    )

    @functools.cached_property
    def model_path(self) -> str:
        """The model's folder or Hub id; the demo model is fetched first.

        Raises:
            ImportError, OSError, RuntimeError: the demo model cannot be made.
        """
        return resolve_model_name(self.model_name_or_path)

    def uses_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the chat template is used.

        Raises:
            ValueError: it is asked for, but there is none.
        """
        if self.chat and not tokenizer.chat_template:
            raise ValueError(f"{self.model_name_or_path} has no chat template: leave out --chat")
        return bool(tokenizer.chat_template) if self.chat is None else self.chat

    def check_ranges(self, wanted: dict[str, str]) -> None:
        """Check numbers, given the words for the range of each.

        Raises:
            ValueError: for one out of its range.
        """
        for name, words in wanted.items():
            value = getattr(self, name)
            if value is not None and not RANGES[words](value):
                raise ValueError(f"--{name} must be {words}, not {value}")


@dataclass(kw_only=True)
class OPOArguments(RunArguments):
    """What is trained, on what, and how the loss is put together."""

    _argument_group_name = "prompt pair"

    safe_prompt_file: str | None = HfArg(
        default=None, help="start SP as the text in this file instead of the package's"
    )
    opposite_prompt_file: str | None = HfArg(
        default=None, help="start AP as the text in this file instead of the package's"
    )
    prompt_type: Literal["key_value", "embedding"] = HfArg(
        default="key_value",
        help="train keys and values in every layer, behind a shared instruction, or one embedding per virtual token, "
        "as the paper does",
    )
    num_virtual_tokens: int | None = HfArg(
        default=None,
        help=f"make both prompts this long (default: {KEY_VALUE_TOKENS} for key-value prompts, and as long as the "
        "shorter text for embeddings)",
    )
    init_pair: str | None = HfArg(
        default=None, help="go on from this pair, a folder or a Hub id, instead of from the texts"
    )
    hold_adversarial: bool = HfArg(
        default=False,
        help="train SP and the contrast, and keep AP as it is in --init_pair",
    )
    share_instruction_kv: bool = HfArg(
        default=False,
        help="hide embedding prompts from all of the instruction but its last token, so that inference can share its "
        "keys and values between both streams; key-value prompts are always hidden so",
    )
    balance: bool = HfArg(
        default=True,
        help="put as many examples of each split, and of near misses as of everyday requests, into every batch, and "
        "keep those together that mirror each other; with --no_balance, --train_sampling_strategy decides",
    )
    max_response_tokens: int = HfArg(default=4, help="learn from this many tokens of an answer: the first ones decide")
    max_refusal_tokens: int = HfArg(
        default=48, help="learn from this many tokens of a refusal, which should come to its end"
    )
    lp_weight: float = HfArg(
        default=1.0, help="multiply L_p by this: L_p follows the responses of a prompt's own split"
    )
    ln_weight: float = HfArg(default=0.5, help="multiply L_n by this: L_n avoids the responses of the other split")
    lr_weight: float = HfArg(default=1.0, help="multiply L_r by this: L_r stays helpful on safe instructions")
    contrast_weight: float = HfArg(
        default=1.0,
        help="multiply L_C by this: eq. 3 on the contrast of both streams; 0 trains SP by eq. 3 and AP by eq. 4 alone",
    )
    mirror_weight: float = HfArg(
        default=0.0,
        help="add L_m of SP and, times --contrast_weight, of the contrast, times this: a refusal is to begin behind a "
        "harmful instruction and not behind the safe one that mirrors it; counts pairs within a batch on a device",
    )
    first_token_weight: float = HfArg(
        default=1.0,
        help="add each term over the first tokens of the responses once more, times this: they decide; 0 is the "
        "paper's mean over all tokens",
    )
    retain: Literal["ce", "kl", "answer"] = HfArg(
        default="kl",
        help="choose L_r: ce is the paper's cross entropy on D_S; kl is the KL divergence to the model without a "
        "prompt; answer is kl to that model kept from beginning as refusals do, leaves out answers in D_HA that begin "
        "so, and suits a model that turns down safe requests by itself",
    )
    alpha: float = HfArg(default=0.5, help="train the contrast at this strength, and write it into the pair")
    beta: float = HfArg(default=0.1, help="write this plausibility threshold into the pair")

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: for one out of its range, or two that exclude each other.
        """
        if self.init_pair and self.num_virtual_tokens:
            raise ValueError("--num_virtual_tokens is the length of new prompts: leave it out with --init_pair")
        if self.hold_adversarial and not self.init_pair:
            raise ValueError("--hold_adversarial keeps the AP of a pair that is trained: name it by --init_pair")
        wanted = dict.fromkeys(("num_virtual_tokens", "max_response_tokens", "max_refusal_tokens"), "at least 1")
        weights = ("lp_weight", "ln_weight", "lr_weight", "contrast_weight", "mirror_weight", "first_token_weight")
        wanted |= dict.fromkeys(weights, "finite and at least 0")
        wanted |= {"beta": "from 0 to 1"} | dict.fromkeys(("held_out_fraction", "alpha"), "at least 0 and below 1")
        self.check_ranges(wanted)

    @property
    def weights(self) -> list[list[float]]:
        """Weights of L_p, L_n and L_r, of each of L_S, L_A and L_C."""
        terms = (self.lp_weight, self.ln_weight, self.lr_weight)
        losses = (1.0, 0.0 if self.hold_adversarial else 1.0, self.contrast_weight)
        return [[loss * term for term in terms] for loss in losses]

    @property
    def shares_instruction(self) -> bool:
        """Whether the instruction does not see the prompts."""
        return self.share_instruction_kv or self.prompt_type == "key_value"

    def virtual_tokens(self, *texts: int) -> int:
        """The length of both prompts, given that of the texts they start as.

        vLLM serves pairs of one length only.
        """
        return self.num_virtual_tokens or (KEY_VALUE_TOKENS if self.prompt_type == "key_value" else min(texts))

    @property
    def texts(self) -> tuple[str, str]:
        """The texts that SP and AP start as (eq. 1).

        Raises:
            OSError: a file cannot be read.
            ValueError: it is empty.
        """
        return _read_text(self.safe_prompt_file, SAFE_PROMPT), _read_text(self.opposite_prompt_file, OPPOSITE_PROMPT)

    @functools.cached_property
    def start(self) -> PromptPair | None:
        """The pair to go on from, loaded once: what is recorded of it is what is trained.

        Raises:
            OSError, ValueError: it cannot be loaded.
        """
        return PromptPair.from_pretrained(resolve_pair_name(self.init_pair)) if self.init_pair else None

    def check_start(self, start: PromptPair) -> None:
        """Raise ValueError if the pair to go on from holds prompts of another kind."""
        if (kind := start.config.prompt_type) != self.prompt_type:
            raise ValueError(f"{self.init_pair} holds {kind} prompts: add --prompt_type {kind}")


@dataclass
class OPOTrainingArguments(TrainingArguments):
    """transformers' arguments, with defaults for training prompts (docs/training.md says how they were chosen)."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    output_dir: str = HfArg(default="prompt-pair", help="write the pair, and the checkpoints, into this folder")
    learning_rate: float = HfArg(default=3e-2, help="train both prompts at this rate")
    num_train_epochs: float = HfArg(
        default=3.0,
        help="pass over the anchor data this often; with --balance, a pass takes as many rows of each group as the "
        "rarest one has",
    )
    per_device_train_batch_size: int = HfArg(default=32, help="put this many examples into a step on each device")
    per_device_eval_batch_size: int = HfArg(
        default=32, help="evaluate this many held-out examples at a time on each device"
    )
    warmup_steps: float = HfArg(
        default=0.07, help="reach the learning rate after this many steps, or this share of them if it is below 1"
    )
    adam_beta2: float = HfArg(
        default=0.99,
        help="let AdamW forget old squared gradients at this rate: a run is too short for the usual 0.999",
    )
    eval_strategy: str = HfArg(default="epoch", help="choose when to evaluate on the held-out instructions")
    save_strategy: str = HfArg(default="epoch", help="choose when to write a checkpoint")
    save_total_limit: int | None = HfArg(default=1, help="keep this many checkpoints besides the best")
    load_best_model_at_end: bool = HfArg(default=True, help="keep the checkpoint with the lowest held-out loss")
    eval_on_start: bool = HfArg(default=True, help="evaluate before the first step, too")
    logging_steps: float = HfArg(default=10, help="write a line of the log after this many steps")
    # Both prompts take part in every forward
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="let torch's DistributedDataParallel search for unused parameters"
    )


def parse_arguments(values: dict[str, Any]) -> tuple[OPOArguments, OPOTrainingArguments]:
    """Both groups of arguments, from what the command's parser read; keys of neither are left out.

    Raises:
        ValueError: a value is wrong, or two exclude each other.
    """
    parser = HfArgumentParser((OPOArguments, OPOTrainingArguments))
    options, args = parser.parse_dict(values, allow_extra_keys=True)
    return options, args


def check_trainer_arguments(args: TrainingArguments) -> None:
    """Check what every kind of run is told of transformers' arguments.

    Raises:
        ValueError: a checkpoint is named, though a run finds its own, or the best one could not be loaded.
    """
    if args.resume_from_checkpoint not in (None, "auto"):
        raise ValueError("a run goes on by itself where its --output_dir was left: leave out --resume_from_checkpoint")
    if args.load_best_model_at_end and args.eval_strategy == "steps" and args.eval_steps != args.save_steps:
        raise ValueError(
            "the best prompt is kept if it is saved whenever it is evaluated: give --save_steps and --eval_steps one "
            "number, or add --load_best_model_at_end false"
        )


def checkpoints_activations(args: TrainingArguments) -> bool:
    """Whether gradient checkpointing is asked for, which keeps no keys and values."""
    return getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing  # its older name


def check_arguments(options: OPOArguments, args: TrainingArguments) -> None:
    """Check the two groups of arguments against each other.

    Raises:
        ValueError: two exclude each other, or one is missing; the message says what to do.
    """
    if args.push_to_hub and not args.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id")
    if args.push_to_hub and args.hub_private_repo is False:
        raise ValueError("a pair is pushed to a private repository: publish it with acd-logits push --public")
    check_trainer_arguments(args)
    if options.mirror_weight and not options.balance:
        raise ValueError(
            "--mirror_weight needs balanced batches, which hold both of two mirrors: leave out --no_balance"
        )
    if options.shares_instruction and checkpoints_activations(args):
        raise ValueError(
            "a shared instruction and --gradient_checkpointing exclude each other: leave it out, or train with "
            "--prompt_type embedding"
        )


def _read_text(path: str | None, default: str) -> str:
    text = default if path is None else Path(path).read_text(encoding="utf-8").strip()
    if not text:
        raise ValueError(f"{path} is empty: a prompt starts as the embeddings of a text")
    return text
