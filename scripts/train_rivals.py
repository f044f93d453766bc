r"""Make the rivals of a prompt pair for `acd-logits evaluate --rivals`, from the anchors that the pair is trained on.

For the demo model, and for another one with a guard in front:

    python scripts/train_rivals.py --train_file anchors.jsonl --output_dir rivals
    python scripts/train_rivals.py --train_file anchors.jsonl --output_dir rivals --model_name_or_path org/model \
        --dtype bfloat16 --guard org/guard --harmless_label safe

The LoRA adapter and the directions are made from the training part of the anchors. What there is to choose (layers,
strengths, CAST's condition) is chosen on the held-out part, which is that of `acd-logits train` with the same
--held_out_fraction and --seed: the choice with the largest share of refused harmful requests minus that of refused
safe ones. The same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_LAYERS
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from acd_logits.anchors import load_anchor_data, split_held_out
from acd_logits.cli.command import CommandError, CommandParser, note, run_command, show, user_errors
from acd_logits.cli.loading import load_model
from acd_logits.cli.options import (
    above_zero,
    add_batch_argument,
    add_device_arguments,
    add_length_argument,
    add_model_argument,
    positive_int,
    share,
)
from acd_logits.evaluation.rival_folder import (
    CAST_NAME,
    FORMAT_VERSION,
    LORA_NAME,
    SETTINGS_NAME,
    STEERING_NAME,
    read_settings,
)
from acd_logits.evaluation.rivals import AdaCD, LoRA, SafeDecoding, prompts_of
from acd_logits.evaluation.steering import Condition, Steering, mean_over_tokens, similarity
from acd_logits.files import digest, write_text
from acd_logits.refusal import is_refusal
from acd_logits.responses import as_messages
from acd_logits.training.data import IGNORED, encode_anchors
from acd_logits.training.run import use_one_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from acd_logits.evaluation.rivals import Question, Rival

    Rows = Iterable[dict[str, Any]]

FIT = 256  # requests of each kind that a direction is the difference of
RESPONSE_TOKENS = 64  # of a refusal or an answer that the adapter learns
LAYERS = 3  # that are tried at every strength, after all of them at strength 1
DEPTH = 0.8  # no direction is added behind this share of the layers, as in Arditi et al.
# The papers' own strengths, and some on both sides of them
STRENGTHS = {
    "safedecoding": (1.0, 2.0, 3.0, 5.0),
    "adacd": (1.5, 3.0, 4.5, 6.0),
    "steering": (0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "cast": (0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
}


class Workshop:
    """What the rivals are made of, and what is finished of them in their folder.

    Args:
        args: of the command.
        rows: the training part and the held-out part of the anchors.
        model: the model, in eval mode.
        tokenizer: its tokenizer.

    Raises:
        ValueError: a part of the anchors has no harmful request, or no safe one.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        rows: tuple[Rows, Rows],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.args, self.model, self.tokenizer, self.folder = args, model, tokenizer, args.output_dir
        self.train, held_out = rows
        self.fit = [ask(self.train, harmful, FIT, args.seed) for harmful in (True, False)]
        self.asked = [ask(held_out, harmful, args.num_requests, args.seed) for harmful in (True, False)]
        for part, drawn in (("training", self.fit), ("held-out", self.asked)):
            for kind, questions in zip(("harmful", "safe"), drawn, strict=True):
                if not questions:
                    raise ValueError(
                        f"the {part} part of the anchors has no {kind} request: choose another --held_out_fraction "
                        "or --seed, or add some to --train_file"
                    )

    def gap(self, rival: Rival) -> float:
        """How much more often a rival refuses held-out harmful requests than held-out safe ones."""
        shares = []
        for questions in self.asked:
            responses = rival.answer(
                self.model,
                self.tokenizer,
                questions,
                max_new_tokens=self.args.max_new_tokens,
                batch_size=self.args.batch_size,
            )
            texts = (messages[-1]["content"] for messages, _ in questions)
            refused = [is_refusal(response.text, text) for response, text in zip(responses, texts, strict=True)]
            shares.append(sum(refused) / len(refused))
        return shares[0] - shares[1]

    def choose(self, rivals: Mapping[Any, Rival]) -> tuple[Any, float]:
        """The choice with the largest gap, and that gap; of several, the first one."""
        gaps = {choice: self.gap(rival) for choice, rival in rivals.items()}
        best = max(gaps, key=lambda choice: gaps[choice])
        return best, gaps[best]


def ask(rows: Rows, harmful: bool, number: int, seed: int) -> list[Question]:
    """Draw questions from anchors, each once: harmful ones or safe ones."""
    found: dict[tuple[str, ...], Question] = {}
    for row in rows:
        if (row["split"] != "D_S") == harmful:
            turns = (*row["history"], row["instruction"])
            found[turns] = (as_messages(turns), [])
    questions = list(found.values())
    random.Random(seed).shuffle(questions)
    return questions[:number]


# ----- the adapter -----


def make_lora(shop: Workshop) -> tuple[dict[str, Any], float]:
    """Train the adapter on refusals and on safe answers, with the paper's LoRA settings (SafeDecoding)."""
    arguments = lora_arguments(shop)
    # peft knows for which layers an adapter is usual in some architectures; in the others, it is for all linear ones
    layers = None if shop.model.config.model_type in LORA_LAYERS else "all-linear"
    config = LoraConfig(r=16, lora_alpha=64, lora_dropout=0.1, target_modules=layers, task_type="CAUSAL_LM")
    adapted = get_peft_model(shop.model, config)
    chat = bool(shop.tokenizer.chat_template)
    rows = [row for row in shop.train if row["split"] != "D_HA"]
    Trainer(
        model=adapted,
        args=arguments,
        train_dataset=encode_anchors(rows, shop.tokenizer, chat, RESPONSE_TOKENS),
        data_collator=collate,
    ).train()
    adapted.save_pretrained(shop.folder / LORA_NAME)
    adapted.unload()
    shop.model.eval()
    return {}, shop.gap(LoRA(shop.folder / LORA_NAME))


def lora_arguments(shop: Workshop) -> TrainingArguments:
    """How the adapter is trained: on the model's device alone.

    Raises:
        ValueError: the Trainer would move the model to another device.
    """
    args, device = shop.args, shop.model.device
    arguments = TrainingArguments(
        output_dir=str(shop.folder / "run"),
        learning_rate=args.learning_rate,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.train_batch_size,
        warmup_steps=0.03,
        seed=args.seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    theirs = arguments.device
    if (theirs.type, theirs.index or 0) != (device.type, device.index or 0):
        raise ValueError(
            f"the Trainer takes {theirs}, and the model is on {device}: leave --device out, and name a GPU in "
            "CUDA_VISIBLE_DEVICES"
        )
    use_one_device(arguments)
    return arguments


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of prompts with their responses, padded on the right; the loss is of the responses alone."""
    width = max(len(e["input_ids"]) + len(e["response"]) for e in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        prompt, response = example["input_ids"], example["response"]
        padding = width - len(prompt) - len(response)
        batch["input_ids"].append([*prompt, *response, *[0] * padding])
        batch["attention_mask"].append([1] * (width - padding) + [0] * padding)
        batch["labels"].append([*[IGNORED] * len(prompt), *response, *[IGNORED] * padding])
    return {name: torch.tensor(values) for name, values in batch.items()}


def make_safedecoding(shop: Workshop) -> tuple[dict[str, Any], float]:
    """Choose the strength of SafeDecoding."""
    lora = shop.folder / LORA_NAME
    strength, gap = shop.choose({s: SafeDecoding(lora, strength=s) for s in STRENGTHS["safedecoding"]})
    return {"strength": strength}, gap


def make_adacd(shop: Workshop) -> tuple[dict[str, Any], float]:
    """Choose the strength of AdaCD."""
    strength, gap = shop.choose({s: AdaCD(strength=s) for s in STRENGTHS["adacd"]})
    return {"strength": strength}, gap


# ----- directions -----


@torch.no_grad()
def layer_inputs(shop: Workshop, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into every layer at the last token of each question, and the mean over its tokens.

    Returns:
        Both `[layers, n, hidden_size]`, in float32 on the CPU.
    """
    last, mean = [], []
    prompts = prompts_of(shop.tokenizer, questions)
    for start in range(0, len(prompts), shop.args.batch_size):
        some = prompts[start : start + shop.args.batch_size]
        width = max(map(len, some))
        # Padded on the right, no token sees padding
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in some], device=shop.model.device)
        lengths = torch.tensor([len(prompt) for prompt in some], device=shop.model.device)
        mask = (torch.arange(width, device=shop.model.device) < lengths[:, None]).long()
        states = shop.model.base_model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[:-1]
        rows = torch.arange(len(some), device=shop.model.device)
        last.append(torch.stack([state[rows, lengths - 1].float().cpu() for state in states]))
        mean.append(torch.stack([mean_over_tokens(state, mask).cpu() for state in states]))
    return torch.cat(last, 1), torch.cat(mean, 1)


@functools.cache
def directions(shop: Workshop) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean state of harmful requests minus that of safe ones, at the last token and over all of them.

    Returns:
        Both `[layers, hidden_size]`.
    """
    (last, mean), (safe_last, safe_mean) = (layer_inputs(shop, questions) for questions in shop.fit)
    return last.mean(1) - safe_last.mean(1), mean.mean(1) - safe_mean.mean(1)


def find_condition(candidates: torch.Tensor, harmful: torch.Tensor, safe: torch.Tensor) -> Condition:
    """The condition that tells harmful requests from safe ones best, by F1 as in CAST, in the first half of the model.

    Args:
        candidates: the direction of each layer, `[layers, hidden_size]`.
        harmful: mean states of harmful requests, `[layers, n, hidden_size]`.
        safe: the same of safe ones.
    """
    found = []
    for layer in range(1, len(candidates) // 2 + 1):
        direction = candidates[layer]
        alike, others = (similarity(states[layer], direction) for states in (harmful, safe))
        values = torch.cat([alike, others]).sort().values
        for threshold in ((values[1:] + values[:-1]) / 2).tolist():
            for larger in (True, False):
                met, wrongly = (((some > threshold) == larger).sum().item() for some in (alike, others))
                f1 = 2 * met / (met + wrongly + len(alike))
                found.append((f1, Condition(direction, layer, threshold, larger)))
    return max(found, key=lambda item: item[0])[1]


def choose_steering(
    shop: Workshop, name: str, candidates: torch.Tensor, condition: Condition | None
) -> tuple[dict[str, Any], float]:
    """Choose the layer and the strength: of the layers that are best at strength 1, every strength."""

    def steer(layer: int, strength: float) -> Steering:
        return Steering(candidates[layer], layer, strength, condition)

    first = condition.layer if condition else 1
    layers = range(first, max(first + 1, int(len(candidates) * DEPTH)))
    gaps = {layer: shop.gap(steer(layer, 1.0)) for layer in layers}
    best = sorted(layers, key=lambda layer: -gaps[layer])[:LAYERS]
    choice, gap = shop.choose({(layer, s): steer(layer, s) for layer in best for s in STRENGTHS[name]})
    return dict(zip(("layer", "strength"), choice, strict=True)), gap


def make_steering(shop: Workshop) -> tuple[dict[str, Any], float]:
    """Fit the refusal direction of every layer, and choose one."""
    candidates, _ = directions(shop)
    settings, gap = choose_steering(shop, "steering", candidates, None)
    save_directions(shop.folder / STEERING_NAME, steering=candidates[settings["layer"]])
    return settings, gap


def make_cast(shop: Workshop) -> tuple[dict[str, Any], float]:
    """Fit the directions of CAST, and choose its condition, layer and strength."""
    candidates, over_all = directions(shop)
    condition = find_condition(over_all, *(layer_inputs(shop, questions)[1] for questions in shop.asked))
    settings, gap = choose_steering(shop, "cast", candidates, condition)
    save_directions(shop.folder / CAST_NAME, cast=candidates[settings["layer"]], condition=condition.direction)
    settings["condition"] = {name: getattr(condition, name) for name in ("layer", "threshold", "larger")}
    return settings, gap


def save_directions(path: Path, **tensors: torch.Tensor) -> None:
    """Write the directions of an arm in one step, so that no half of a file is ever there."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


MAKE: dict[str, Callable[[Workshop], tuple[dict[str, Any], float]]] = {
    "lora": make_lora,
    "safedecoding": make_safedecoding,
    "adacd": make_adacd,
    "steering": make_steering,
    "cast": make_cast,
}


# ----- the command -----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--train_file", required=True, metavar="FILE", help="the anchor data, as of acd-logits train")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="write the rivals here")
    add_model_argument(parser)
    add_device_arguments(parser)
    parser.add_argument("--held_out_fraction", type=share, default=0.15, help="as of acd-logits train (0.15)")
    parser.add_argument("--seed", type=int, default=42, help="as of acd-logits train (42)")
    choice = parser.add_argument_group("choosing on held-out requests")
    choice.add_argument("--num_requests", type=positive_int, default=50, help="ask this many of each kind (50)")
    add_length_argument(choice, default=16)
    add_batch_argument(choice, default=50)
    lora = parser.add_argument_group("training the LoRA adapter")
    lora.add_argument("--learning_rate", type=above_zero, default=5e-4, help="train at this rate (0.0005)")
    lora.add_argument("--num_train_epochs", type=above_zero, default=1.0, help="make this many passes (1)")
    lora.add_argument("--train_batch_size", type=positive_int, default=16, help="put this many rows into a step (16)")
    guard = parser.add_argument_group("a guard in front")
    guard.add_argument("--guard", metavar="ID", help="a classifier or guard model: a Hub id or a folder")
    guard.add_argument("--harmless_label", metavar="LABEL", help="the guard's label of a harmless request")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make what the folder lacks, and show what was chosen."""
    if args.harmless_label and not args.guard:
        raise CommandError("--harmless_label needs --guard ID")
    with user_errors(ImportError, OSError, ValueError):
        rows = load_anchor_data(args.train_file)
        parts = split_held_out(rows, args.held_out_fraction, args.seed)
        content = _open(args, digest(rows.to_list()))
    if args.guard:
        content["rivals"]["guard"] = {"model": args.guard, "harmless_label": args.harmless_label}
        _write(args.output_dir, content)
    missing = [name for name in MAKE if name not in content["rivals"]]
    if missing:
        model, tokenizer = load_model(args)
        with user_errors(ValueError):
            shop = Workshop(args, parts, model.eval(), tokenizer)
        _write(args.output_dir, content)  # what an interruption leaves is known as rivals
        for name in missing:
            start = time.perf_counter()
            with user_errors(OSError, ValueError):
                settings, gap = MAKE[name](shop)
            minutes = (time.perf_counter() - start) / 60
            content["rivals"][name] = settings
            content["made"][name] = {"minutes": round(minutes, 2), "held_out_gap": round(gap, 3)}
            _write(args.output_dir, content)
            note(f"{name}: {minutes:.1f} minutes")
    for name, made in content["made"].items():
        show(f"{name}: {json.dumps(content['rivals'][name])}, held-out gap {made['held_out_gap']:.2f}\n")


def _open(args: argparse.Namespace, anchors: str) -> dict[str, Any]:
    """What the folder holds; raise ValueError if that was made in another way."""
    choice = ("held_out_fraction", "seed", "num_requests", "max_new_tokens", "dtype")
    lora = ("learning_rate", "num_train_epochs", "train_batch_size")
    settings = {"anchors_sha256": anchors, **{name: getattr(args, name) for name in (*choice, *lora)}}
    empty = {"format_version": FORMAT_VERSION, "model": args.model_name_or_path, "settings": settings}
    path = args.output_dir / SETTINGS_NAME
    if not path.is_file():
        if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
            raise ValueError(f"{args.output_dir} holds something other than rivals: choose another folder")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        return {**empty, "rivals": {}, "made": {}}
    content = read_settings(args.output_dir)
    for name, value in empty.items():
        if content.get(name) != value:
            raise ValueError(f"{path} was made with other {name}: choose another --output_dir")
    return content


def _write(folder: Path, content: dict[str, Any]) -> None:
    write_text(folder / SETTINGS_NAME, json.dumps(content, indent=2) + "\n")


def main() -> int:
    """Parse, make, print; return the exit code."""
    parser = CommandParser(
        prog="train_rivals.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
