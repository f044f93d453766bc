"""One training run: the Trainer's, for SP, AP and their contrast together, and the pair that it leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_NAME

from .. import __version__
from ..demo_model import DEMO_MODEL, DEMO_MODEL_ID
from ..files import write_text
from ..pairs.fit import base_model, chat_template_digest, check_fit_unloaded
from ..pairs.prompt_pair import PromptPair
from ..pairs.texts import system_prompt_ids
from .arguments import RunArguments, check_arguments
from .data import AnchorExamples, check_context, check_mirrors, load_examples
from .model import OPOModel, fast_head
from .prompts import initial_prompts
from .trainer import OPOTrainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from ..pairs.config import PairConfig
    from .arguments import OPOArguments
    from .model import PromptedModel
    from .trainer import PromptTrainer

SETTINGS_NAME = "training_settings.json"
RUN_NAME = "run"  # the Trainer's folder, in the pair's
LOG_NAME = "log_history.json"  # is written last: a run that has it is finished

Options = TypeVar("Options", bound=RunArguments)


@dataclass(frozen=True)
class Run(Generic[Options]):
    """What one run of training is made of: all but the model.

    Args:
        options: what to train.
        args: how to train.
        tokenizer: the model's tokenizer.
        examples: the anchor set as tokens.
    """

    options: Options
    args: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    examples: AnchorExamples

    @property
    def folder(self) -> Path:
        """Where the pair goes, and the checkpoints."""
        return Path(self.args.output_dir)


def prepare(options: OPOArguments, args: TrainingArguments) -> Run[OPOArguments]:
    """Do everything that needs no weights: what is wrong with the input shows here.

    Raises:
        ImportError: a library that the data or the demo model needs is missing.
        OSError: a file, or the model, cannot be read.
        RuntimeError: the demo model could not be made.
        ValueError: the model or the data cannot be trained with; the message says what to do.
    """
    check_arguments(options, args)
    use_one_device(args)
    texts = options.texts
    config, tokenizer = load_config(options)
    if options.start:
        options.check_start(options.start)
        check_fit_unloaded(options.start.config, config, options.model_path, transfer=True)
    run = Run(options, args, tokenizer, load_examples(options, tokenizer, args.seed))
    if start := options.start:
        length = max(len(start.safeguarding), len(start.adversarial))
    else:
        length = options.virtual_tokens(*(len(system_prompt_ids(tokenizer, text)) for text in texts))
    check_context(config, run.examples, length)
    if options.mirror_weight:
        check_mirrors(run.examples)
    check_same_run(run.folder, training_settings(run))
    return run


def use_one_device(args: TrainingArguments) -> None:
    """Train on one device for each process: DataParallel would copy the prompts, and not the model behind them."""
    args._n_gpu = min(args.n_gpu, 1)


def load_config(options: RunArguments) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The model's config, and its tokenizer.

    Raises:
        ImportError, OSError, RuntimeError: one of them cannot be read, or the demo model cannot be made.
        ValueError: it is an encoder-decoder.
    """
    config = AutoConfig.from_pretrained(options.model_path, revision=options.model_revision)
    if config.is_encoder_decoder:
        raise ValueError(f"{options.model_name_or_path} is an encoder-decoder: ACD is for decoder-only models")
    return config, AutoTokenizer.from_pretrained(options.model_path, revision=options.model_revision)


def load_model(run: Run[Any]) -> PreTrainedModel:
    """Load the frozen model.

    Raises:
        ImportError, OSError, ValueError: as of `from_pretrained`.
    """
    options = run.options
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if run.args.device.type == "cuda" else "float32"
    device_map = options.device_map or {"": run.args.device}  # most kinds of quantised weights stay where they land
    return AutoModelForCausalLM.from_pretrained(
        options.model_path, revision=options.model_revision, dtype=dtype, device_map=device_map
    )


def place(model: PreTrainedModel, run: Run[Any]) -> PreTrainedModel:
    """The model itself, on the run's device.

    Trainer sees the prompts alone. What a device map has split up, or is quantised, stays where it is.
    """
    model = base_model(model)
    if not (getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)):
        model.to(run.args.device)
    return model


def check_on_one_device(model: PreTrainedModel) -> None:
    """Raise ValueError if a device map has split the model up: its hooks move no keys and values of a prompt."""
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            "keys and values are trained on one device, and --device_map splits the model up: leave it out, load the "
            "model in a smaller dtype or quantised, or train a pair with --prompt_type embedding"
        )


def train_pair(model: PreTrainedModel, run: Run[OPOArguments]) -> PromptPair:
    """Train SP and AP, and save the pair to the run's folder.

    A run that was interrupted goes on from its last checkpoint, and a finished one is not trained again.

    Args:
        model: the model, of any kind `Trainer` accepts; its weights are frozen and stay as they are.
        run: what to train, how, and on what.

    Returns:
        The pair, as saved.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
        ValueError: the folder holds a run with other settings, the pair to go on from does not fit the model, or the
            model cannot be trained so. Nothing is written then.
    """
    model = place(model, run)
    if run.options.shares_instruction:
        check_on_one_device(model)
    initial = initial_prompts(model, run.tokenizer, run.options)
    settings = training_settings(run)
    start_run(run, settings)
    opo = OPOModel(model, initial, run.options.shares_instruction)
    opo.prompts["adversarial"].requires_grad_(not run.options.hold_adversarial)
    with fast_head(opo):
        log = train_prompts(opo, run, OPOTrainer)
    model.eval()
    measured = what_came_out(model, run, log, OPOTrainer.names)
    # Keys and values are saved as the model was given them, in its own dtype
    dtype = model.dtype if run.options.prompt_type == "key_value" else torch.float32
    prompts = {name: prompt().detach().to("cpu", dtype) for name, prompt in opo.prompts.items()}
    pair = PromptPair(**prompts, config=_pair_config(initial.config, run, settings | measured))
    if run.args.should_save:
        pair.save_pretrained(run.folder)
    return pair


def _pair_config(initial: PairConfig, run: Run[OPOArguments], training: dict[str, Any]) -> PairConfig:
    """What the pair says about itself."""
    options = run.options
    return dataclasses.replace(
        initial,
        **base_facts(run),
        alpha=options.alpha,
        beta=options.beta,
        share_instruction_kv=options.shares_instruction,
        training=training,
    )


def base_facts(run: Run[Any]) -> dict[str, Any]:
    """What is recorded of the model that prompts were trained for."""
    options = run.options
    demo = options.model_name_or_path == DEMO_MODEL
    return {
        "base_model_name_or_path": DEMO_MODEL_ID if demo else options.model_name_or_path,
        "base_model_revision": options.model_revision,
        "chat_template_sha256": chat_template_digest(run.tokenizer) if options.uses_chat(run.tokenizer) else None,
    }


def training_settings(run: Run[OPOArguments]) -> dict[str, Any]:
    """What decides how the prompts come out, for the pair's config: enough to train it again."""
    options = run.options
    ours = ("dtype", "prompt_type", "num_virtual_tokens", "share_instruction_kv", "hold_adversarial")
    data = ("balance", "max_response_tokens", "max_refusal_tokens", "held_out_fraction")
    weights = ("lp_weight", "ln_weight", "lr_weight", "contrast_weight", "mirror_weight", "first_token_weight")
    # The digest is of texts, not of their tokens: some chat templates write the date into those
    anchors = json.dumps([[e["texts"], e["response"], e["split"], e["kind"], e["mirror"]] for e in run.examples])
    return {
        **model_settings(run),
        **dict(zip(("safe_prompt", "opposite_prompt"), options.texts, strict=True)),
        "init_pair": start.digest if (start := options.start) else None,
        **{name: getattr(options, name) for name in (*ours, *data, *weights, "retain", "alpha")},
        **trainer_settings(run.args),
        "pairs": run.examples.counts(),
        "anchors_sha256": hashlib.sha256(anchors.encode()).hexdigest(),
    }


def model_settings(run: Run[Any]) -> dict[str, Any]:
    """The frozen model, and how it is asked."""
    options = run.options
    return {
        "model": shown_name(options.model_name_or_path),
        "model_revision": options.model_revision,
        "chat": options.uses_chat(run.tokenizer),
    }


def shown_name(name: str) -> str:
    """A model's or a pair's name as it is recorded: the rest of a folder's path is nobody's business."""
    return Path(name).name if Path(name).is_dir() else name


def trainer_settings(args: TrainingArguments) -> dict[str, Any]:
    """What decides among the arguments of transformers how the prompts come out."""
    length = ("num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
    optimiser = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs")
    order = ("seed", "data_seed", "train_sampling_strategy")
    kept = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_steps")
    return {
        **{name: getattr(args, name) for name in (*length, *optimiser, *order, "bf16", "fp16", *kept)},
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "eval_strategy": str(getattr(args.eval_strategy, "value", args.eval_strategy)),
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Compare a run's settings with those of an earlier run in its folder, which would go on.

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


def start_run(run: Run[Any], settings: dict[str, Any]) -> None:
    """Make the run's folder, with the settings in it.

    Raises:
        ValueError: it holds a run with other settings.
    """
    check_same_run(run.folder, settings)
    if run.args.should_save:
        run.folder.mkdir(parents=True, exist_ok=True)
        _write_json(run.folder / SETTINGS_NAME, settings)


def train_prompts(
    prompted: PromptedModel, run: Run[Any], trainer_class: type[PromptTrainer]
) -> list[dict[str, float]]:
    """Train what learns, or load it if it is finished; returns the log of the run."""
    folder = run.folder.absolute() / RUN_NAME
    if (folder / LOG_NAME).is_file():
        prompted.load_state_dict(load_file(folder / SAFE_WEIGHTS_NAME))
        return json.loads((folder / LOG_NAME).read_text(encoding="utf-8"))
    checkpoint = _last_checkpoint(folder)
    trainer = trainer_class(
        run.options,
        model=prompted,
        args=_run_arguments(folder, checkpoint, run),
        train_dataset=run.examples.train,
        eval_dataset=run.examples.held_out or None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if run.args.should_save:
        save_file(prompted.state_dict(), folder / SAFE_WEIGHTS_NAME)
        _write_json(folder / LOG_NAME, trainer.state.log_history)
    return trainer.state.log_history


def _run_arguments(folder: Path, checkpoint: str | None, run: Run[Any]) -> TrainingArguments:
    """The arguments of the Trainer."""
    args = copy.copy(run.args)
    args.output_dir = str(folder)
    args.run_name = args.run_name or folder.parent.name
    args.remove_unused_columns = False  # `collate` needs what the model's forward does not name
    args.push_to_hub = False  # the finished pair is pushed, not the checkpoints
    if checkpoint:
        args.eval_on_start = False  # it is not the start
    if not run.options.held_out_fraction:
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


def what_came_out(
    model: PreTrainedModel, run: Run[Any], log: list[dict[str, float]], terms: Sequence[str]
) -> dict[str, Any]:
    """The held-out losses of a run, beside the model's dtype and the versions of what they were measured with."""
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")}
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "held_out_loss": _held_out_summary(log, run.args, terms),
        "versions": {"acd_logits": __version__} | versions,
    }


def _held_out_summary(
    log: list[dict[str, float]], args: TrainingArguments, terms: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The held-out losses before training, if that was evaluated, and of the prompt that was kept."""
    names = ("epoch", "eval_loss", *(f"eval_{name}" for name in terms))
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


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
