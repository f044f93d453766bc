"""Opposite Prompt Optimization (OPO): train the prompt pair of a model (section 3.2 of the paper, eq. 1 to 4).

Two runs of transformers' `Trainer`, first SP, then AP. Each trains one soft prompt in front of the frozen model:

    eq. 1     the soft prompt starts as the embeddings of a text       `initial_prompts`
    eq. 2     [soft prompt; x], placed as in inference                 `OPOModel`, `prompts.place_soft_prompt`
    eq. 3, 4  the losses of SP and AP                                  `opo_loss`

The text is what inference sees: `encode_pair` builds prompt and response tokens. A batch is
`[pad | x | response | pad]`, the prompts padded on the left and the responses on the right: all responses start in
the same column, and the language-model head is computed for them alone. In the model it becomes
`[pad | soft | x | response | pad]`.

"Mean over tokens" in eq. 3 and 4 is the mean over all tokens of a split in one optimiser step, over every process and
every micro-batch: the sum of the losses is divided by a count that was gathered before the step. So gradient
accumulation and the number of processes change nothing but the speed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModelForCausalLM, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from . import __version__
from .anchors import SPLITS, load_anchor_data, split_held_out
from .demo_model import DEMO_MODEL, DEMO_MODEL_ID, resolve_model_name
from .files import write_text
from .paired import reuses_prefix
from .prompt_pair import STREAMS, PromptPair, base_model, chat_template_digest
from .prompts import OPPOSITE_PROMPT, SAFE_PROMPT, place_soft_prompt, system_prompt_ids
from .responses import encode_messages
from .shared import check_shareable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

IGNORED = -100  # a label that is padding
PLAIN_CACHE_BYTES = 2 << 30  # of the plain model's logits that are kept for the KL form of L_r
TERMS = ("L_p", "L_n", "L_r")
SETTINGS_NAME = "training_settings.json"
LOG_NAME = "log_history.json"  # written last: a run that has it is finished

# Of one pair: `input_ids` of the prompt, `response` tokens, how many of them are an `opening` of the opposite split's
# response too, `split` as an index into SPLITS, and `instruction`, `kind` and `mirror` as of the anchor data
Example = dict[str, Any]
Batch = dict[str, torch.Tensor]


# Options


@dataclass(kw_only=True)
class OPOArguments:
    """What is trained, on what, and how the loss is put together."""

    _argument_group_name = "prompt pair"

    train_file: str = HfArg(help="anchor data: instruction, response and split (D_HR, D_HA or D_S) per row")
    model_name_or_path: str = HfArg(default=DEMO_MODEL, help="folder or Hub id")
    model_revision: str | None = HfArg(default=None, help="branch, tag or commit of the model on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help="of the frozen model; auto is bfloat16 on a GPU, float32 elsewhere"
    )
    device_map: str | None = HfArg(default=None, help='of from_pretrained, such as "auto" to split the model up')
    chat: bool | None = HfArg(
        default=None,
        help="use the chat template, or with --no_chat leave it out (default: used if there is one)",
        metadata={"nargs": "?", "const": True},
    )
    safe_prompt_file: str | None = HfArg(default=None, help="text that SP starts as (default: the package's)")
    opposite_prompt_file: str | None = HfArg(default=None, help="text that AP starts as (default: the package's)")
    num_virtual_tokens: int | None = HfArg(default=None, help="length of both prompts (default: of the shorter text)")
    init_pair: str | None = HfArg(default=None, help="folder or Hub id of a pair to go on from, instead of the texts")
    share_instruction_kv: bool = HfArg(
        default=False,
        help="hide the soft prompt from the instruction but for its last token, so that inference can share the "
        "instruction's keys and values between both streams",
    )
    balance: bool = HfArg(
        default=True,
        help="as many rows of each split in every batch, and of near misses and everyday requests, those that mirror "
        "each other together; with --no_balance, --train_sampling_strategy decides",
    )
    max_response_tokens: int = HfArg(default=3, help="responses are cut off there: their first tokens decide")
    held_out_fraction: float = HfArg(default=0.15, help="share of the instructions to evaluate on; 0 for none")
    lp_weight: float = HfArg(default=1.0, help="weight of L_p: follow the split's responses")
    ln_weight: float = HfArg(default=0.5, help="weight of L_n: avoid the other split's responses")
    lr_weight: float = HfArg(default=8.0, help="weight of L_r: stay helpful on safe instructions")
    retain: Literal["ce", "kl", "answer"] = HfArg(
        default="answer",
        help="L_r: cross entropy on D_S (the paper's), KL divergence to the model without a prompt, or to that model "
        "where it does not begin as the refusals do (nor count answers in D_HA that do), for one that turns down safe "
        "requests by itself",
    )
    adversarial_epochs: float = HfArg(
        default=1.0, help="epochs of AP, which starts much nearer to its goal; 0 leaves it as it starts"
    )
    alpha: float = HfArg(default=0.5, help="strength of the contrast, written into the pair")
    beta: float = HfArg(default=0.1, help="plausibility threshold, written into the pair")

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: for one out of its range, or two that exclude each other.
        """
        if self.init_pair and self.num_virtual_tokens:
            raise ValueError("--num_virtual_tokens is the length of new prompts: leave it out with --init_pair")
        ranges: dict[str, Callable[[Any], bool]] = {
            "at least 1": lambda value: value >= 1,
            "finite and at least 0": lambda value: 0 <= value < math.inf,
            "from 0 to 1": lambda value: 0 <= value <= 1,
            "at least 0 and below 1": lambda value: 0 <= value < 1,
        }
        wanted = dict.fromkeys(("num_virtual_tokens", "max_response_tokens"), "at least 1")
        weights = ("lp_weight", "ln_weight", "lr_weight", "adversarial_epochs", "alpha")
        wanted |= dict.fromkeys(weights, "finite and at least 0")
        wanted |= {"beta": "from 0 to 1", "held_out_fraction": "at least 0 and below 1"}
        for name, words in wanted.items():
            value = getattr(self, name)
            if value is not None and not ranges[words](value):
                raise ValueError(f"--{name} must be {words}, not {value}")

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights of L_p, L_n and L_r."""
        return self.lp_weight, self.ln_weight, self.lr_weight

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
        return PromptPair.from_pretrained(self.init_pair) if self.init_pair else None


@dataclass
class OPOTrainingArguments(TrainingArguments):
    """transformers' arguments, with defaults for training prompts (docs/training.md says how they were chosen)."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    output_dir: str = HfArg(default="prompt-pair", help="receives the pair, and the checkpoints of both runs")
    learning_rate: float = HfArg(default=2e-2, help="of both prompts")
    num_train_epochs: float = HfArg(default=10.0, help="passes of SP over the anchor data")
    per_device_train_batch_size: int = HfArg(default=32, help="pairs in a step on each device")
    per_device_eval_batch_size: int = HfArg(default=32, help="held-out pairs at a time on each device")
    warmup_steps: float = HfArg(default=0.07, help="steps until the learning rate is reached; below 1, their share")
    adam_beta2: float = HfArg(default=0.99, help="a run has too few steps for the usual 0.999")
    eval_strategy: str = HfArg(default="epoch", help="when to evaluate on the held-out instructions")
    save_strategy: str = HfArg(default="epoch", help="when to write a checkpoint")
    save_total_limit: int | None = HfArg(default=1, help="checkpoints to keep, besides the best")
    load_best_model_at_end: bool = HfArg(default=True, help="keep the checkpoint with the lowest held-out loss")
    eval_on_start: bool = HfArg(default=True, help="evaluate before the first step, too")
    logging_steps: float = HfArg(default=10, help="steps between two lines of the log")
    # The soft prompt takes part in every forward
    ddp_find_unused_parameters: bool | None = HfArg(default=False, help="see torch's DistributedDataParallel")


def _read_text(path: str | None, default: str) -> str:
    text = default if path is None else Path(path).read_text(encoding="utf-8").strip()
    if not text:
        raise ValueError(f"{path} is empty: a prompt starts as the embeddings of a text")
    return text


# Text


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, instruction: str, response: str, *, chat: bool, finished: bool
) -> tuple[list[int], list[int]]:
    """Tokens of the user's prompt as inference sees it, and of the response as the model would write it.

    Args:
        tokenizer: the model's tokenizer.
        instruction: what the user says.
        response: what the model answers.
        chat: use the chat template, as in `apply_chat_template(..., add_generation_prompt=True)`.
        finished: whether the response ended by itself; then the model's end-of-turn token closes it.

    Returns:
        Prompt tokens and response tokens.
    """
    turn = {"role": "user", "content": instruction}
    prompt = encode_messages(tokenizer, [turn]) if chat else tokenizer(instruction)["input_ids"]
    # On its own: the model writes its response from the generation prompt on, token by token
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    end = end_of_turn(tokenizer, chat) if finished else None
    return prompt, tokens if end is None else [*tokens, end]


def end_of_turn(tokenizer: PreTrainedTokenizerBase, chat: bool) -> int | None:
    """The token a model ends its turn with: the first special one that the chat template puts behind an answer."""
    if chat:
        answer = "an-answer"
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if token in special:
                return token
    return tokenizer.eos_token_id


def encode_anchors(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, chat: bool, max_response_tokens: int
) -> list[Example]:
    """Tokens of anchor pairs; responses are cut off after `max_response_tokens`.

    Where a refusal and an answer to one instruction begin alike ("I'm ..."), these tokens are to follow in both, and
    `opening` counts them: eq. 3 and 4 would avoid in L_n what they follow in L_p.
    """

    def encode(row: dict[str, Any]) -> Example:
        prompt, response = encode_pair(
            tokenizer, row["instruction"], row["response"], chat=chat, finished=row["finished"]
        )
        parts = {"input_ids": prompt, "response": response[:max_response_tokens], "split": SPLITS.index(row["split"])}
        return parts | {name: row[name] for name in ("instruction", "kind", "mirror")}

    examples = [encode(row) for row in rows]
    responses = defaultdict(list)
    for example in examples:
        responses[example["instruction"], SPLITS[example["split"]]].append(example["response"])
    opposite = {"D_HR": "D_HA", "D_HA": "D_HR"}
    for example in examples:
        others = responses.get((example["instruction"], opposite.get(SPLITS[example["split"]], "")), [])
        example["opening"] = max((_common_length(example["response"], other) for other in others), default=0)
    return examples


def refusal_openings(examples: Iterable[Example]) -> list[int]:
    """The first tokens of refusals."""
    return sorted({e["response"][0] for e in examples if SPLITS[e["split"]] == "D_HR"})


def leave_out_apologies(examples: Iterable[Example], openings: Sequence[int]) -> list[Example]:
    """Examples without the answers that begin as refusals do: where a model apologises, there is nothing to follow.

    Those of D_HA are left out. Those of D_S keep their first token, at which the model may still say something else,
    and are marked as `apology`.
    """
    kept = []
    for example in examples:
        if SPLITS[example["split"]] == "D_HR" or example["response"][0] not in openings:
            kept.append(example)
        elif SPLITS[example["split"]] == "D_S":
            kept.append(example | {"response": example["response"][:1], "apology": True})
    return kept


def _common_length(one: list[int], other: list[int]) -> int:
    """How many tokens two responses begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def collate(examples: Sequence[Example]) -> Batch:
    """A batch `[pad | x | response | pad]`.

    Returns:
        `input_ids` and `attention_mask` `[B, T]`; `labels` `[B, R]`, the response tokens, which end every row;
        `avoided` `[B, R]`, those of them that L_n is about; `splits` `[B]`.
    """
    prompt_length, response_length = (max(len(e[part]) for e in examples) for part in ("input_ids", "response"))
    ids, labels, avoided, mask = [], [], [], []
    for example in examples:
        left = [0] * (prompt_length - len(example["input_ids"]))
        right = [0] * (response_length - len(example["response"]))
        ids.append([*left, *example["input_ids"], *example["response"], *right])
        mask.append([*left, *[1] * (len(ids[-1]) - len(left) - len(right)), *right])
        labels.append([*example["response"], *[IGNORED] * len(right)])
        avoided.append([IGNORED] * example["opening"] + labels[-1][example["opening"] :])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "avoided": avoided}
    batch["splits"] = [example["split"] for example in examples]
    return {name: torch.tensor(values) for name, values in batch.items()}


# Model and loss


class OPOModel(PeftModelForCausalLM):
    """A frozen model with a trainable soft prompt in front of its input (eq. 2).

    A peft model, so that `Trainer` saves, resumes and restores the soft prompt alone. Only `forward` is our own.
    """

    share_instruction_kv = False

    @classmethod
    def from_prompt(cls, model: PreTrainedModel, prompt: torch.Tensor, share_instruction_kv: bool = False) -> OPOModel:
        """Freeze a model and put a soft prompt in front of it.

        Args:
            model: the base model, which is shared, not copied.
            prompt: `[n, hidden_size]`, what the soft prompt starts as; it is trained in fp32 whatever the model is.
            share_instruction_kv: hide the soft prompt from the instruction, as `shared.py` does.

        Raises:
            ValueError: the model cannot share.
        """
        if share_instruction_kv:
            check_shareable(model)
        shape = {"num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1], "num_transformer_submodules": 1}
        # Prompt tuning does not use the last two, but peft wants them, and some models have no attention heads
        config = PromptTuningConfig(task_type="CAUSAL_LM", **shape, num_layers=1, num_attention_heads=1)
        opo = cls(model, config)
        with torch.no_grad():
            opo.soft_prompt.copy_(prompt)
        opo.share_instruction_kv = share_instruction_kv
        return opo

    @property
    def soft_prompt(self) -> torch.nn.Parameter:
        """`[n, hidden_size]`, fp32."""
        return self.prompt_encoder[self.active_adapter].embedding.weight

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_length: int, prompted: bool = True
    ) -> torch.Tensor:
        """Logits for the last `response_length` tokens, `[B, response_length, vocab]`.

        Args:
            input_ids: `[B, T]`, as of [`collate`].
            attention_mask: `[B, T]`.
            response_length: number of tokens that belong to the responses.
            prompted: `False` leaves the soft prompt out.
        """
        model = self.get_base_model()
        soft = self.soft_prompt if prompted else self.soft_prompt[:0]
        if self.share_instruction_kv:
            if _checkpoints_gradients(model):  # which keeps no keys and values: the soft prompt would be lost
                raise ValueError("a shared instruction cannot be trained under gradient checkpointing")
            return _forward_behind_instruction(model, soft, input_ids, attention_mask, response_length)
        if self.shares_prefix():
            return _forward_behind_prefix(model, soft, input_ids, attention_mask, response_length)
        x = model.get_input_embeddings()(input_ids)
        embeds, mask, positions = place_soft_prompt(soft, x, attention_mask)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
        optional = {"position_ids": positions, "logits_to_keep": response_length + 1}
        accepted = inspect.signature(model.forward).parameters
        inputs |= {name: value for name, value in optional.items() if name in accepted}
        # The logits at a token predict the next one
        return model(**inputs).logits[:, -response_length - 1 : -1]

    def shares_prefix(self) -> bool:
        """Whether the rows' common prefix is computed once; gradient checkpointing keeps no keys and values."""
        model = self.get_base_model()
        return reuses_prefix(model) and not _checkpoints_gradients(model)

    def train(self, mode: bool = True) -> OPOModel:
        """Switch to training; the base model stays in eval mode, since dropout is for weights that learn."""
        super().train(mode)
        # Except that gradient checkpointing works in train mode only, and that bitsandbytes, on a CPU, repacks the
        # weights of a model in eval mode into a form that has no gradient
        checkpointing = mode and _checkpoints_gradients(self.base_model)
        self.base_model.train(checkpointing or getattr(self.base_model, "is_quantized", False))
        return self

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the soft prompt as a stock peft adapter."""
        # "auto" would ask the Hub, at every checkpoint, whether the vocabulary was resized
        super().save_pretrained(save_directory, **{"save_embedding_layers": False, **kwargs})


def _checkpoints_gradients(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _forward_behind_prefix(
    model: PreTrainedModel, soft: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, response_length: int
) -> torch.Tensor:
    """The logits of `OPOModel.forward`, with what all rows begin with computed once for all of them.

    A row's soft prompt and the start of its chat template see nothing of what follows, so their keys and values, and
    the gradients through them, are the same for every row: `[prefix | pad | rest of x | response | pad]`.
    """
    x = model.get_input_embeddings()(ids)
    pads = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    shared = _common_prefix(ids, mask, response_length)
    prefix = torch.cat([soft.to(x), x[0, pads[0, 0] : pads[0, 0] + shared]])
    # The row's padding, moved behind the prefix, hides what is left of the prefix's tokens
    columns = torch.arange(mask.shape[1] - shared, device=mask.device)
    mask = mask[:, shared:] * (columns >= pads)
    cache = None
    if len(prefix):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(inputs_embeds=prefix[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(ids))
    logits = model(
        inputs_embeds=x[:, shared:],
        attention_mask=torch.cat([mask.new_ones(len(ids), len(prefix)), mask], dim=1),
        position_ids=len(prefix) + (mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=response_length + 1,
    ).logits
    return logits[:, -response_length - 1 : -1]


def _forward_behind_instruction(
    model: PreTrainedModel, soft: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, response_length: int
) -> torch.Tensor:
    """The logits of `OPOModel.forward` where x does not see the soft prompt.

    `[pad | x | soft | last token of x | response | pad]`: the keys and values of x are those of the plain model, and
    no gradient goes through them.
    """
    x = model.get_input_embeddings()(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last, n = ids.shape[1] - response_length - 1, len(soft)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if last:
        part = {"inputs_embeds": x[:, :last], "attention_mask": mask[:, :last], "position_ids": positions[:, :last]}
        with torch.no_grad():
            model(**part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if n:
        prompt = DynamicCache(config=model.config.get_text_config(decoder=True))
        positions_of_soft = torch.arange(-n, 0, device=ids.device)[None]
        model(
            inputs_embeds=soft[None].to(x),
            position_ids=positions_of_soft,
            past_key_values=prompt,
            use_cache=True,
            logits_to_keep=1,
        )
        for index, layer in enumerate(prompt.layers):
            cache.update(*(kv.expand(len(ids), -1, -1, -1) for kv in (layer.keys, layer.values)), index)
    logits = model(
        inputs_embeds=x[:, last:],
        attention_mask=torch.cat([mask[:, :last], mask.new_ones(len(ids), n), mask[:, last:]], dim=1),
        position_ids=positions[:, last:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=response_length + 1,
    ).logits
    return logits[:, -response_length - 1 : -1]


def _common_prefix(ids: torch.Tensor, mask: torch.Tensor, response_length: int) -> int:
    """How many tokens all prompts begin with; the last token of a prompt, which predicts the response, is not one."""
    prompts = [
        row[kept.bool()] for row, kept in zip(ids[:, :-response_length], mask[:, :-response_length], strict=True)
    ]
    longest = min(map(len, prompts)) - 1
    same = torch.stack([prompt[:longest] == prompts[0][:longest] for prompt in prompts]).all(0)
    return int(same.long().cumprod(0).sum())


def opo_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    avoided: torch.Tensor,
    splits: torch.Tensor,
    stream: str,
    plain_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 3 (SP) and eq. 4 (AP), L_p + L_n + L_r, as sums over the response tokens y of each row.

    Args:
        logits: `[B, R, vocab]`.
        labels: `[B, R]`, the response tokens.
        avoided: `[B, R]`, those that L_n is about, as of [`collate`].
        splits: `[B]`, indices into SPLITS.
        stream: "safeguarding" follows D_HR and avoids D_HA, "adversarial" the other way round.
        plain_logits: `[rows of D_S, R, vocab]` of the model without a soft prompt, for the KL forms of L_r.

    Returns:
        `[B, 3]`: what each row adds to L_p, L_n and L_r; divide by the number of tokens for the means.
    """
    follow, avoid = ("D_HR", "D_HA") if stream == "safeguarding" else ("D_HA", "D_HR")

    def total(
        split: str, labels: torch.Tensor, token_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        rows = splits == SPLITS.index(split)
        y = labels[rows]
        losses = token_loss(logits[rows].float(), y.clamp(min=0)[..., None]).masked_fill(y == IGNORED, 0.0)
        return torch.zeros(rows.shape, device=losses.device).masked_scatter(rows, losses.sum(-1))

    l_p = total(follow, labels, lambda z, y: -log_p(z, y))
    l_n = total(avoid, avoided, lambda z, y: -log_1_minus_p(z, y))
    if plain_logits is None:
        l_r = total("D_S", labels, lambda z, y: -log_p(z, y))
    else:
        l_r = total("D_S", labels, lambda z, y: kl_divergence(plain_logits.float(), z))
    return torch.stack([l_p, l_n, l_r], dim=-1)


def log_p(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Log P(y), `[...]`, of tokens y, `[..., 1]`."""
    return logits.gather(-1, y).squeeze(-1) - logits.logsumexp(-1)


def log_1_minus_p(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log(1 - P(y)), as the probability of all other tokens: exact where P(y) rounds to 1."""
    return logits.scatter(-1, y, -math.inf).logsumexp(-1) - logits.logsumexp(-1)


def kl_divergence(plain_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(P_plain || P) over the vocabulary, `[...]`."""
    log_plain, log_prompted = plain_logits.log_softmax(-1), logits.log_softmax(-1)
    return (log_plain.exp() * (log_plain - log_prompted)).sum(-1)


def count_tokens(labels: torch.Tensor, avoided: torch.Tensor, splits: torch.Tensor, stream: str) -> torch.Tensor:
    """Response tokens in each row that L_p, L_n and L_r are means over, `[B, 3]`."""
    order = SPLITS if stream == "safeguarding" else ("D_HA", "D_HR", "D_S")
    chosen = splits[:, None] == torch.tensor([SPLITS.index(split) for split in order], device=splits.device)
    return torch.stack([(tokens != IGNORED).sum(-1) for tokens in (labels, avoided, labels)], dim=-1) * chosen


class BalancedSampler(torch.utils.data.Sampler[int]):
    """Pairs in an order in which every batch has as many of each group: D_HR, D_HA, and in D_S each kind.

    Instructions that mirror each other come together, so that what sets them apart is what a step learns; the topic
    and the form they share cancel out. Batches are of like length. An epoch takes as many pairs from each group as the
    smallest one has, chosen anew in every epoch; but an apology, which has most to learn, before any other pair.

    Args:
        examples: as of [`encode_anchors`].
        batch_size: pairs in a step.
        seed: of the choice and the order.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        groups: dict[tuple[int, str], list[int]] = defaultdict(list)
        for i, example in enumerate(examples):
            groups[example["split"], example["kind"]].append(i)
        self.groups = sorted(groups.values(), key=len)
        self.examples, self.seed, self.epoch = examples, seed, 0
        self.share = max(1, batch_size // len(self.groups))

    def __len__(self) -> int:
        return len(self.groups) * len(self.groups[0])

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, also when a run goes on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self.seed} {self.epoch}")
        smallest, *others = (chance.sample(group, len(group)) for group in self.groups)
        for group in others:
            group.sort(key=lambda i: not self.examples[i].get("apology"))
        smallest.sort(key=self._length)
        rows = list(zip(smallest, *(self._beside(smallest, group) for group in others), strict=True))
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


class OPOTrainer(Trainer):
    """transformers' Trainer with the loss of eq. 3 or 4, each of its terms in the log.

    Args:
        stream: "safeguarding" or "adversarial".
        options: weights of the terms and the form of L_r.
        kwargs: as of `Trainer`; the model is an [`OPOModel`].
    """

    def __init__(self, stream: str, options: OPOArguments, **kwargs: Any) -> None:
        self._refused = refusal_openings(kwargs["train_dataset"]) if options.retain == "answer" else []
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = kwargs[name] and leave_out_apologies(kwargs[name], self._refused)
        super().__init__(data_collator=collate, compute_metrics=self._held_out_loss, **kwargs)
        self.stream, self.options = stream, options
        self.model_accepts_loss_kwargs = True  # our mean is over all micro-batches: nothing is left to divide
        self._plain: dict[tuple[int, ...], torch.Tensor] = {}
        # Sums and token counts of the three terms since the last line of the log
        self._logged = torch.zeros(2, len(TERMS), device=self.args.device)

    def _get_train_sampler(
        self, train_dataset: Sequence[Example] | None = None
    ) -> torch.utils.data.Sampler[int] | None:
        """The order of an epoch."""
        if not self.options.balance:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BalancedSampler(self.train_dataset, batch_size, seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """Fetch the micro-batches of one step, and count each term's tokens in them over all processes, `[3]`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        loader = self.accelerator.gradient_state
        if batches and loader.end_of_dataloader and loader.remainder > 0:
            # accelerate fills the last batches of an epoch up with rows from its start: they must not count twice
            first = max(0, loader.remainder - self.args.process_index * len(batches[-1]["labels"]))
            batches[-1]["labels"][first:] = batches[-1]["avoided"][first:] = IGNORED
        counts = torch.zeros(len(TERMS), device=device)
        for batch in batches:
            tokens = count_tokens(batch["labels"], batch["avoided"], batch["splits"], self.stream)
            counts += tokens.sum(0).to(device)
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
        sums, counts = self._sums(model, inputs)
        self._logged += torch.stack([sums.detach().sum(0), counts.sum(0)])
        loss = self._weighted(sums.sum(0) / num_items_in_batch.clamp(min=1))
        _check_finite(loss.item(), self.state.global_step)
        # The gradients of several processes are averaged, but each process has only its share of the sum
        return loss * self.accelerator.num_processes

    def prediction_step(
        self, model: torch.nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Sums and token counts of each row, `[B, 3]`, in the places of logits and labels."""
        with torch.no_grad():
            return None, *self._sums(model, self._prepare_inputs(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add L_p, L_n and L_r, over the tokens since the last line, to a line of the training log."""
        if "loss" in logs:
            logs = logs | _means(*self.accelerator.reduce(self._logged, reduction="sum"))
            self._logged.zero_()
        super().log(logs, start_time)

    def _sums(self, model: torch.nn.Module, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
        avoided, splits = inputs["avoided"], inputs["splits"]
        plain = None
        if self.options.retain != "ce":
            safe = splits == SPLITS.index("D_S")
            plain = self._plain_logits(ids[safe], mask[safe], labels[safe]) if safe.any() else None
        logits = model(ids, mask, labels.shape[1])
        sums = opo_loss(logits, labels, avoided, splits, self.stream, plain)
        return sums, count_tokens(labels, avoided, splits, self.stream)

    def _plain_logits(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits `[B, R, vocab]` without the soft prompt: a row's stay as they are, and are computed once.

        With `--retain answer`, the tokens that refusals begin with are out of the question as first ones.
        """
        rows = zip(ids, mask.bool(), labels != IGNORED, strict=True)
        keys = [(int(response.sum()), *row[kept].tolist()) for row, kept, response in rows]
        new = [i for i, key in enumerate(keys) if key not in self._plain]
        found = {key: self._plain[key] for key in keys if key in self._plain}
        if new:
            # Past the wrapper of several processes, which would wait for one that has no such rows
            with torch.no_grad():
                logits = self.model(ids[new], mask[new], labels.shape[1], prompted=False)
            for i, row in zip(new, logits, strict=True):
                row[0, self._refused] = torch.finfo(row.dtype).min
                found[keys[i]] = row[labels[i] != IGNORED].cpu()
            if sum(logits.nbytes for logits in self._plain.values()) < PLAIN_CACHE_BYTES:
                self._plain |= found
        padded = torch.nn.utils.rnn.pad_sequence([found[key] for key in keys], batch_first=True)
        missing = labels.shape[1] - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, 0, 0, missing)).to(ids.device)

    def _weighted(self, terms: torch.Tensor) -> torch.Tensor:
        return (terms * torch.tensor(self.options.weights, device=terms.device)).sum()

    def _held_out_loss(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means over all held-out tokens; "loss" chooses the best checkpoint."""
        sums, counts = (torch.from_numpy(rows).sum(0) for rows in (prediction.predictions, prediction.label_ids))
        loss = self._weighted(sums / counts.clamp(min=1)).item()
        _check_finite(loss, self.state.global_step)
        return {"loss": loss} | _means(sums, counts)


def _means(sums: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    return {name: (s / n).item() for name, s, n in zip(TERMS, sums, counts, strict=True) if n > 0}


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} after {step} steps: lower --learning_rate")


# Runs


@dataclass
class AnchorTokens:
    """Training and held-out pairs as tokens, as of [`encode_anchors`]; the held-out part may be empty."""

    train: list[Example]
    held_out: list[Example]

    def counts(self) -> dict[str, dict[str, int]]:
        """Pairs per split."""
        return {
            part: {split: sum(SPLITS[e["split"]] == split for e in getattr(self, part)) for split in SPLITS}
            for part in ("train", "held_out")
        }


def prepare(options: OPOArguments, args: TrainingArguments) -> tuple[str, PreTrainedTokenizerBase, AnchorTokens]:
    """Do everything that needs no weights: what is wrong with the input shows here.

    Returns:
        The model's folder or Hub id, its tokenizer and the anchor data.

    Raises:
        ImportError: a library that the data or the demo model needs is missing.
        OSError: a file, or the model, cannot be read.
        RuntimeError: the demo model could not be made.
        ValueError: the model or the data cannot be trained with; the message says what to do.
    """
    if args.resume_from_checkpoint not in (None, "auto"):
        raise ValueError("a run goes on by itself where its --output_dir was left: leave out --resume_from_checkpoint")
    if options.share_instruction_kv and args.gradient_checkpointing:
        raise ValueError("--share_instruction_kv and --gradient_checkpointing exclude each other")
    texts = options.texts
    path = resolve_model_name(options.model_name_or_path)
    config = AutoConfig.from_pretrained(path, revision=options.model_revision)
    if config.is_encoder_decoder:
        raise ValueError(f"{options.model_name_or_path} is an encoder-decoder: ACD is for decoder-only models")
    tokenizer = AutoTokenizer.from_pretrained(path, revision=options.model_revision)
    chat = uses_chat(options, tokenizer)

    rows = load_anchor_data(options.train_file)
    parts = split_held_out(rows, options.held_out_fraction, args.seed) if options.held_out_fraction else (rows, [])
    pairs = AnchorTokens(*(encode_anchors(part, tokenizer, chat, options.max_response_tokens) for part in parts))
    pairs.held_out.sort(key=lambda e: len(e["input_ids"]))  # prompts of like length in a batch save padding
    _check_splits(pairs)
    if start := options.start:
        length = max(len(start.safeguarding), len(start.adversarial))
    else:
        length = min(len(system_prompt_ids(tokenizer, text)) for text in texts)
    _check_context(config, pairs, options.num_virtual_tokens or length)
    check_same_run(Path(args.output_dir), training_settings(tokenizer, pairs, options, args))
    return path, tokenizer, pairs


def load_model(path: str, options: OPOArguments, args: TrainingArguments) -> PreTrainedModel:
    """Load the frozen model.

    Raises:
        ImportError, OSError, ValueError: as of `from_pretrained`.
    """
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if args.device.type == "cuda" else "float32"
    placement = {"device_map": options.device_map} if options.device_map else {}
    return AutoModelForCausalLM.from_pretrained(path, revision=options.model_revision, dtype=dtype, **placement)


def train_pair(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: AnchorTokens,
    options: OPOArguments,
    args: TrainingArguments,
) -> PromptPair:
    """Train SP, then AP, and save the pair to `args.output_dir`.

    A run that was interrupted goes on from its last checkpoint, and a prompt that is finished is not trained again.

    Args:
        model: the model, of any kind `Trainer` accepts; its weights are frozen and stay as they are.
        tokenizer: its tokenizer.
        pairs: the anchor data.
        options: what to train.
        args: how to train.

    Returns:
        The pair, as saved.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
        ValueError: `args.output_dir` holds a run with other settings.
    """
    model = base_model(model)
    settings = training_settings(tokenizer, pairs, options, args)
    check_same_run(Path(args.output_dir), settings)
    if args.should_save:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        _write_json(Path(args.output_dir, SETTINGS_NAME), settings)
    initial = initial_prompts(model, tokenizer, options)
    prompts, losses = {}, {}
    for stream in STREAMS:
        if stream == "adversarial" and not options.adversarial_epochs:
            prompts[stream] = initial.adversarial
            continue
        prompts[stream], log = _train_prompt(stream, model, getattr(initial, stream), pairs, options, args)
        losses[stream] = _held_out_summary(log, args)
    model.eval()
    demo = options.model_name_or_path == DEMO_MODEL
    config = dataclasses.replace(
        initial.config,
        base_model_name_or_path=DEMO_MODEL_ID if demo else options.model_name_or_path,
        base_model_revision=options.model_revision,
        alpha=options.alpha,
        beta=options.beta,
        share_instruction_kv=options.share_instruction_kv,
        chat_template_sha256=chat_template_digest(tokenizer) if uses_chat(options, tokenizer) else None,
        training=settings
        | {"dtype": str(model.dtype).removeprefix("torch."), "held_out_loss": losses, "versions": _versions()},
    )
    pair = PromptPair(**prompts, config=config)
    if args.should_save:
        pair.save_pretrained(args.output_dir)
    return pair


def uses_chat(options: OPOArguments, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template is used.

    Raises:
        ValueError: it is asked for, but there is none.
    """
    if options.chat and not tokenizer.chat_template:
        raise ValueError(f"{options.model_name_or_path} has no chat template: leave out --chat")
    return bool(tokenizer.chat_template) if options.chat is None else options.chat


def initial_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: OPOArguments) -> PromptPair:
    """What both prompts start as.

    By eq. 1, the embeddings of their texts, cut off or repeated to `num_virtual_tokens`, by default to the length of
    the shorter one (vLLM serves pairs of one length only); or another pair.

    Raises:
        OSError: the other pair cannot be loaded.
        ValueError: it does not fit the model.
    """
    if start := options.start:
        start.check(model)
        config = dataclasses.replace(start.config, results={})  # which were measured on that pair
        return PromptPair(start.safeguarding.float(), start.adversarial.float(), config)

    pair = PromptPair.from_text(model, tokenizer, *options.texts)
    length = options.num_virtual_tokens or min(len(pair.safeguarding), len(pair.adversarial))

    def fit(prompt: torch.Tensor) -> torch.Tensor:
        return prompt.float().repeat(math.ceil(length / len(prompt)), 1)[:length]

    return PromptPair(fit(pair.safeguarding), fit(pair.adversarial), pair.config)


def training_settings(
    tokenizer: PreTrainedTokenizerBase, pairs: AnchorTokens, options: OPOArguments, args: TrainingArguments
) -> dict[str, Any]:
    """What decides how the prompts come out, for the pair's config: enough to train it again."""
    ours = ("dtype", "num_virtual_tokens", "share_instruction_kv")
    data = ("balance", "max_response_tokens", "held_out_fraction")
    weights = ("lp_weight", "ln_weight", "lr_weight", "retain", "adversarial_epochs")
    run = ("num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
    optimiser = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs")
    order = ("seed", "data_seed", "train_sampling_strategy")
    kept = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_steps")
    # Not of the prompts' tokens, since some chat templates write the date into them
    anchors = json.dumps([[e["instruction"], e["response"], e["split"]] for e in [*pairs.train, *pairs.held_out]])
    local = Path(options.model_name_or_path).is_dir()  # the rest of a folder's path is nobody's business
    return {
        "model": Path(options.model_name_or_path).name if local else options.model_name_or_path,
        "model_revision": options.model_revision,
        "chat": uses_chat(options, tokenizer),
        **dict(zip(("safe_prompt", "opposite_prompt"), options.texts, strict=True)),
        "init_pair": start.digest if (start := options.start) else None,
        **{name: getattr(options, name) for name in (*ours, *data, *weights)},
        **{name: getattr(args, name) for name in (*run, *optimiser, *order, "bf16", "fp16", *kept)},
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "eval_strategy": str(getattr(args.eval_strategy, "value", args.eval_strategy)),
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "pairs": pairs.counts(),
        "anchors_sha256": hashlib.sha256(anchors.encode()).hexdigest(),
    }


def _train_prompt(
    stream: str,
    model: PreTrainedModel,
    initial: torch.Tensor,
    pairs: AnchorTokens,
    options: OPOArguments,
    args: TrainingArguments,
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Train one prompt, or load it if it is finished; returns it with the log of its run."""
    folder = Path(args.output_dir).absolute() / f"{stream}-run"
    if (folder / LOG_NAME).is_file():
        prompt = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        return prompt, json.loads((folder / LOG_NAME).read_text(encoding="utf-8"))
    opo = OPOModel.from_prompt(model, initial, share_instruction_kv=options.share_instruction_kv)
    checkpoint = _last_checkpoint(folder)
    trainer = OPOTrainer(
        stream,
        options,
        model=opo,
        args=_run_arguments(stream, folder, checkpoint, options, args),
        train_dataset=pairs.train,
        eval_dataset=pairs.held_out or None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.should_save:
        opo.save_pretrained(str(folder))
        _write_json(folder / LOG_NAME, trainer.state.log_history)
    return opo.soft_prompt.detach().cpu().clone(), trainer.state.log_history


def _run_arguments(
    stream: str, folder: Path, checkpoint: str | None, options: OPOArguments, args: TrainingArguments
) -> TrainingArguments:
    """The arguments of one of the two runs."""
    args = copy.copy(args)
    args.output_dir = str(folder)
    args.run_name = f"{args.run_name or Path(args.output_dir).parent.name}-{stream}"
    args.remove_unused_columns = False  # `collate` needs what the model's forward does not name
    args.push_to_hub = False  # the finished pair is pushed, not the checkpoints
    if stream == "adversarial":
        args.num_train_epochs = options.adversarial_epochs
    if checkpoint:
        args.eval_on_start = False  # it is not the start
    if not options.held_out_fraction:
        args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
    return args


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; the Trainer's state is the last file it writes into one."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in reversed(checkpoints):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Compare the settings with those of an earlier run in this folder, which would go on.

    Raises:
        ValueError: if they differ.
    """
    path = folder / SETTINGS_NAME
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise ValueError(
                f"{folder} holds a run with another {name} ({earlier.get(name)}, now {value}): choose another "
                "--output_dir, or remove that one to start again"
            )


def _check_splits(pairs: AnchorTokens) -> None:
    for part, counts in pairs.counts().items():
        for split, count in counts.items():
            if getattr(pairs, part) and not count:
                raise ValueError(
                    f"the {part.replace('_', '-')} pairs have no {split} ({counts}): add some to the training file, "
                    "or choose another --held_out_fraction or --seed"
                )


def _check_context(config: PretrainedConfig, pairs: AnchorTokens, num_virtual_tokens: int) -> None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(len(e["input_ids"]) + len(e["response"]) for e in [*pairs.train, *pairs.held_out])
    if limit is not None and num_virtual_tokens + longest > limit:
        raise ValueError(
            f"{num_virtual_tokens} virtual tokens and the longest pair's {longest} do not fit into the model's "
            f"context of {limit}: lower --num_virtual_tokens or --max_response_tokens, or shorten the instructions"
        )


def _held_out_summary(log: list[dict[str, float]], args: TrainingArguments) -> dict[str, dict[str, float]]:
    """The held-out losses before training, if that was evaluated, and of the prompt that was kept."""
    names = ("epoch", "eval_loss", *(f"eval_{term}" for term in TERMS))
    evaluations = [
        {n.removeprefix("eval_"): line[n] for n in names if n in line} for line in log if "eval_loss" in line
    ]
    before = [line for line in evaluations if line["epoch"] == 0]
    after = evaluations[len(before) :]
    if not after:
        return {}
    kept = after[-1]
    if args.load_best_model_at_end:
        metric = args.metric_for_best_model.removeprefix("eval_")
        choose = max if args.greater_is_better else min
        kept = choose(after, key=lambda line: line[metric])
    return {**({"first": before[0]} if before else {}), "kept": kept}


def _versions() -> dict[str, str]:
    return {"acd_logits": __version__} | {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")}


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
