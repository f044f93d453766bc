r"""Measure what ACD costs: plain generate, ACD, and transformers' `guidance_scale`, side by side in one process.

The demo model (SmolLM2-135M-Instruct) on 2 CPU threads, as in docs/benchmarks.md:

    python scripts/benchmark.py --num_threads 2 --batch_sizes 1 4 8 --prompt_lengths 30 --new_tokens 40 \
        --repeats 9 --output_file benchmark.json

Random weights in the shapes of Llama-2-7B, and a model of your own:

    python scripts/benchmark.py --device cuda --dtype bfloat16 --random_llama 7b \
        --batch_sizes 1 8 32 --prompt_lengths 30 512 --output_file benchmark-7b.json
    python scripts/benchmark.py --device cuda --dtype bfloat16 --model_name_or_path org/model

The arms answer the same random prompts, greedily and without an end-of-sequence token, so all take equal steps:

- `plain`: the prompt alone.
- `acd`: [SP; prompt] and [AP; prompt] with random soft prompts and the default alpha and beta. Every call computes the
  soft prompts' keys and values anew.
- `frozen`: the same under `frozen_model=True`: the soft prompts' keys and values are computed in the warm-up only.
- `shared`: the same with one copy of the prompt's keys and values for both streams (`share_instruction_kv`).
- `horizon`: ACD that contrasts the first 16 new tokens.
- `shared_horizon`: both of these.
- `key_value`: key-value prompts, which are given as keys and values and always share; those of `--pair`, if named.
- `guidance`: the prompt, and a negative prompt (100 tokens by default, and the prompt), which is as long as ACD's
  adversarial stream. transformers computes it anew in each call, with the logits of all its tokens.

Plain and guidance run while ACD's hooks are on the model, where they pass everything through (some microseconds).

Columns: time to the first token (with the prefill of all streams), decode time per token after the first, wall time
of the whole generate call, the memory of the keys and values it returns (guidance returns one of its two caches), and
its peak memory above the level before it. Times are medians over the repeats. A ratio compares an arm with plain in
the same repeat: median (minimum to maximum). Peak memory (allocated on CUDA, resident on Linux) is measured in the
warm-up, an arm's first call. Own code is the share of the time between the first token and the 40th that is spent in
this package's hooks and processor, under Python's profiler, which slows Python down: it is less without.

`2 rows` is what a second row for each prompt costs the model alone: a forward pass of one token a row over a cache of
random keys, for twice the rows over the rows, in turns. Streams that share the prompt's keys can take less.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import dataclasses
import gc
import json
import platform
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    StoppingCriteria,
)
from transformers.utils.logging import tqdm

from acd_logits import ACDLogitsProcessor, PromptPair, __version__
from acd_logits.cli import CommandError, CommandParser, run_command
from acd_logits.demo_model import DEMO_MODEL, resolve_model_name, resolve_pair_name
from acd_logits.pairs.key_values import check_shareable, embeddings_to_key_values

SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
RANDOM_LLAMAS = {
    "tiny": (512, 64, 128, 2, 4, 2),
    "1b": (128256, 2048, 8192, 16, 32, 8),  # Llama-3.2-1B, but for its tied embeddings
    "7b": (32000, 4096, 11008, 32, 32, 32),  # Llama-2-7B
}
METRICS = ("first_token_s", "decode_s_per_token", "call_s")


@dataclass
class Setup:
    """What all cells have in common."""

    model: PreTrainedModel
    pair: PromptPair
    key_values: PromptPair | None
    new_tokens: int
    repeats: int
    arms: list[str]


def plain_arguments(setup: Setup, prompt: torch.Tensor) -> dict[str, Any]:
    """Plain generation."""
    return {}


def acd_arguments(
    setup: Setup, prompt: torch.Tensor, *, share_instruction_kv: bool = False, **options: Any
) -> dict[str, Any]:
    """ACD with a new processor, as if the pair had been trained with a shared instruction or without."""
    config = dataclasses.replace(setup.pair.config, share_instruction_kv=share_instruction_kv)
    pair = PromptPair(setup.pair.safeguarding, setup.pair.adversarial, config)
    return {"logits_processor": [ACDLogitsProcessor(setup.model, pair, **options)]}


def key_value_arguments(setup: Setup, prompt: torch.Tensor) -> dict[str, Any]:
    """ACD with key-value prompts: those that were named, or the keys and values of the same soft prompts."""
    if setup.key_values:
        return {"logits_processor": [ACDLogitsProcessor(setup.model, setup.key_values)]}
    embeddings = (setup.pair.safeguarding, setup.pair.adversarial)
    safeguarding, adversarial = (embeddings_to_key_values(setup.model, soft) for soft in embeddings)
    return {"logits_processor": [ACDLogitsProcessor(setup.model, PromptPair(safeguarding, adversarial))]}


def guidance_arguments(setup: Setup, prompt: torch.Tensor) -> dict[str, Any]:
    """Classifier-free guidance; generate makes a new processor, and so a new negative cache, for each call."""
    prefix = random_ids(setup.model, len(prompt), len(setup.pair.adversarial))
    negative = torch.cat([prefix, prompt], dim=1)
    return {
        "guidance_scale": 1.5,
        "negative_prompt_ids": negative,
        "negative_prompt_attention_mask": torch.ones_like(negative),
    }


# Each makes an arm's own arguments of generate from the setup and the prompt ids, [batch, length]
ARMS: dict[str, Callable[[Setup, torch.Tensor], dict[str, Any]]] = {
    "plain": plain_arguments,
    "acd": acd_arguments,
    "frozen": partial(acd_arguments, frozen_model=True),
    "shared": partial(acd_arguments, share_instruction_kv=True),
    "horizon": partial(acd_arguments, horizon=16),
    "shared_horizon": partial(acd_arguments, share_instruction_kv=True, horizon=16),
    "key_value": key_value_arguments,
    "guidance": guidance_arguments,
}


class TokenClock(StoppingCriteria):
    """Notes the time at which each new token is ready, and starts a profile at the first one; stops nothing."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self.times: list[float] = []
        self.profile = profile

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: D102
        self.times.append(now(input_ids.device))
        if self.profile and len(self.times) == 1:
            self.profile.enable()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Return the time at which the device has done all that it was given.

    CUDA runs behind the host, whose own clock would tell when a step was queued. Waiting here costs no arm anything:
    right after the stopping criteria, generate reads from the device whether to stop, and so waits itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_ids(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    """Draw token ids on the model's device."""
    return torch.randint(model.get_input_embeddings().num_embeddings, shape, device=model.device)


def generate(
    setup: Setup, prompt: torch.Tensor, arguments: dict[str, Any], profile: cProfile.Profile | None = None
) -> dict[str, float]:
    """Run one generate call, profiled from its first token on, and return its metrics."""
    clock = TokenClock(profile)
    start = now(prompt.device)
    output = setup.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=setup.new_tokens,
        stopping_criteria=[clock],
        return_dict_in_generate=True,
        **arguments,
    )
    end = now(prompt.device)
    new_tokens = output.sequences.shape[1] - prompt.shape[1]
    if not new_tokens == len(clock.times) == setup.new_tokens:
        raise RuntimeError(f"made {new_tokens} tokens in {len(clock.times)} steps instead of {setup.new_tokens}")
    decode = (clock.times[-1] - clock.times[0]) / (new_tokens - 1)
    values = (clock.times[0] - start, decode, end - start)
    layers = output.past_key_values.layers
    stored = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    cache_bytes = sum(kv.untyped_storage().nbytes() for kv in stored if kv is not None)  # recurrent states have none
    return {**dict(zip(METRICS, values, strict=True)), "new_tokens": new_tokens, "cache_bytes": cache_bytes}


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int | None:
    """Make the call and return how far memory rises above its level before, or None where that cannot be read."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed but kept pages would be used again, and not show up as a rise
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present level
        before = resident_bytes("VmHWM")
    except (OSError, AttributeError, TypeError):  # no Linux, no glibc, or no right to reset
        call()
        return None
    call()
    return resident_bytes("VmHWM") - before


def memory_use(device: torch.device, call: Callable[[], Any]) -> dict[str, int | None]:
    """Make the call and return its peak memory and, on CUDA, what the allocator reserved at most and its retries.

    A retry frees all of the allocator's spare memory, and so waits for the device: a sign that memory is short.
    """
    if device.type != "cuda":
        return {"peak_bytes": peak_bytes(device, call), "peak_reserved_bytes": None, "alloc_retries": None}
    torch.cuda.empty_cache()  # what earlier calls left reserved is not this one's
    reserved = torch.cuda.memory_reserved(device)
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    peak = peak_bytes(device, call)
    return {
        "peak_bytes": peak,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) - reserved,
        "alloc_retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0) - retries,
    }


def resident_bytes(field: str) -> int:
    """Read a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def measure_cell(
    setup: Setup, batch_size: int, prompt_length: int, progress: Any, profile: bool = True
) -> dict[str, Any]:
    """Measure every arm at one batch size and prompt length; without `profile`, own shares are `None`."""
    prompt = random_ids(setup.model, batch_size, prompt_length)
    arguments = {arm: ARMS[arm](setup, prompt) for arm in setup.arms}
    memory = {  # of the first calls, which are the warm-up
        arm: memory_use(prompt.device, partial(generate, setup, prompt, arguments[arm])) for arm in setup.arms
    }
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in setup.arms}
    for repeat in range(setup.repeats):
        first = repeat % len(setup.arms)
        for arm in setup.arms[first:] + setup.arms[:first]:
            runs[arm].append(generate(setup, prompt, arguments[arm]))
            progress.update()
    own = {arm: own_share(setup, prompt, arguments[arm]) if profile else None for arm in setup.arms}
    for arm in setup.arms:
        detach(arguments[arm])
    arms = {
        arm: {
            "own_share": own[arm],
            "cache_bytes": runs[arm][-1]["cache_bytes"],
            **memory[arm],
            "summary": {metric: summarise(runs[arm], runs["plain"], metric) for metric in METRICS},
            "runs": runs[arm],
        }
        for arm in setup.arms
    }
    doubling = cost_of_doubling(setup.model, batch_size, prompt_length + setup.new_tokens // 2)
    return {"batch_size": batch_size, "prompt_length": prompt_length, "twice_the_rows": doubling, "arms": arms}


@torch.no_grad()
def cost_of_doubling(
    model: PreTrainedModel, batch_size: int, cached: int, repeats: int = 20
) -> dict[str, float] | None:
    """Time a step of the plain model at twice the rows over one at the rows, in turns: median, least and most.

    `None` for a model whose cache holds something else than all keys and values.
    """
    try:
        check_shareable(model)
    except ValueError:
        return None
    made = model(random_ids(model, 1, 1)).past_key_values.layers
    layers = [
        [kv.new_empty(2 * batch_size, kv.shape[1], cached, kv.shape[3]).normal_() for kv in (m.keys, m.values)]
        for m in made
    ]
    ratios = []
    for _ in range(repeats):
        seconds = []
        for rows in (batch_size, 2 * batch_size):
            cache = DynamicCache([(keys[:rows], values[:rows]) for keys, values in layers])
            start = now(model.device)
            model(random_ids(model, rows, 1), past_key_values=cache)
            seconds.append(now(model.device) - start)
        ratios.append(seconds[1] / seconds[0])
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def own_share(setup: Setup, prompt: torch.Tensor, arguments: dict[str, Any]) -> float:
    """Return the share of the decode time that this package's own code takes, over at most 40 tokens."""
    setup = dataclasses.replace(setup, new_tokens=min(setup.new_tokens, 40))
    profile = cProfile.Profile()
    metrics = generate(setup, prompt, arguments, profile)
    profile.disable()
    hooks = (("attach.py", "pre_forward_hook"), ("attach.py", "forward_hook"), ("logits_process.py", "__call__"))
    own = sum(
        cumulative
        for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        if (Path(file).name, function) in hooks and "acd_logits" in file
    )
    return own / (metrics["decode_s_per_token"] * (setup.new_tokens - 1))


def detach(arguments: dict[str, Any]) -> None:
    """Take an arm's processors off the model."""
    for processor in arguments.get("logits_processor", []):
        processor.detach()


def summarise(runs: list[dict[str, float]], plain: list[dict[str, float]], metric: str) -> dict[str, Any]:
    """Return the median of a metric and its ratios to plain, repeat by repeat."""
    ratios = [run[metric] / base[metric] for run, base in zip(runs, plain, strict=True)]
    ratio = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"median": median(run[metric] for run in runs), "ratio_to_plain": ratio}


def load_key_values(name: str, model: PreTrainedModel) -> PromptPair:
    """Load key-value prompts for the model."""
    try:
        pair = PromptPair.from_pretrained(resolve_pair_name(name))
        pair.check(model)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot take --pair {name}: {error}") from error
    if pair.safeguarding.ndim != 5:
        raise CommandError(f"--pair {name} holds embedding prompts: the arm key_value takes key-value prompts")
    return pair


def load_setup(args: argparse.Namespace) -> Setup:
    """Load or make the model, and draw the soft prompts from its embeddings."""
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, args.dtype), "attn_implementation": args.attn_implementation}
    try:
        if args.random_llama:
            shapes = dict(zip(SHAPES, RANDOM_LLAMAS[args.random_llama], strict=True))
            config = LlamaConfig(max_position_embeddings=4096, **shapes)
            with torch.device(args.device):  # a large model is drawn on the GPU, not in the host's memory
                model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(resolve_model_name(args.model_name_or_path), **options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise CommandError(f"cannot make the model: {' '.join(str(error).split())}") from error
    if any(arm.startswith(("shared", "key_value")) for arm in args.arms):
        try:
            check_shareable(model)
        except ValueError as error:
            raise CommandError(f"{error} (choose --arms without shared, shared_horizon and key_value)") from None
    key_values = load_key_values(args.pair, model) if args.pair else None
    model.to(args.device).eval()
    needed = max(args.num_virtual_tokens, args.adversarial_tokens) + max(args.prompt_lengths) + args.new_tokens
    if needed > getattr(model.config, "max_position_embeddings", needed):
        raise CommandError(f"{needed} tokens are more than the model's {model.config.max_position_embeddings}")
    model.generation_config = GenerationConfig(pad_token_id=0)  # greedy, and nothing ends early
    model.generate(random_ids(model, 1, 8), max_new_tokens=2)  # what torch sets up once is in no arm's peak
    embed = model.get_input_embeddings()
    with torch.no_grad():
        safeguarding, adversarial = (
            embed(random_ids(model, length)) for length in (args.num_virtual_tokens, args.adversarial_tokens)
        )
    pair = PromptPair(safeguarding=safeguarding, adversarial=adversarial)
    return Setup(model, pair, key_values, args.new_tokens, args.repeats, args.arms)


def describe_environment(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """Return what the numbers depend on besides the settings."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return {
        "model": f"random Llama {args.random_llama}" if args.random_llama else args.model_name_or_path,
        "dtype": args.dtype,
        "attn_implementation": model.config._attn_implementation,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "acd_logits": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
    }


def table(result: dict[str, Any]) -> str:
    """Write the result as Markdown."""
    facts = [
        f"{key.replace('_', ' ')} {value}"
        for part in ("environment", "settings")
        for key, value in result[part].items()
    ]
    lines = [
        "; ".join(facts) + ".\n",
        "| batch | prompt | arm | first token, ms | ratio | decode, ms/token | ratio | call, s | ratio | cache, MiB "
        "| peak, MiB | own code | 2 rows |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in result["cells"]:
        for arm, measured in cell["arms"].items():
            columns = [str(cell["batch_size"]), str(cell["prompt_length"]), arm]
            for metric, scale, digits in (("first_token_s", 1e3, 1), ("decode_s_per_token", 1e3, 2), ("call_s", 1, 3)):
                summary = measured["summary"][metric]
                ratio = summary["ratio_to_plain"]
                columns.append(f"{summary['median'] * scale:.{digits}f}")
                columns.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
            columns.append(f"{measured['cache_bytes'] / 2**20:.1f}")
            peak = measured["peak_bytes"]
            columns.append("n/a" if peak is None else f"{peak / 2**20:.0f}")
            columns.append(f"{measured['own_share']:.1%}")
            doubling = cell["twice_the_rows"]
            columns.append(f"{doubling['median']:.2f}" if doubling else "n/a")
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `minimum` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {minimum}, got {text!r}")
        return int(text)

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    positive = at_least(1)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model_name_or_path", default=DEMO_MODEL, help=f"default: {DEMO_MODEL}, the demo model")
    model.add_argument("--random_llama", choices=RANDOM_LLAMAS, help="a Llama of this size with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--attn_implementation", metavar="NAME", help="default: transformers' choice")
    parser.add_argument("--num_threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--num_virtual_tokens", type=positive, default=100, metavar="N", help="length of SP")
    parser.add_argument("--adversarial_tokens", type=positive, metavar="N", help="length of AP (default: as SP)")
    parser.add_argument("--pair", help="the key-value prompts of the arm key_value: a folder or a Hub id")
    parser.add_argument("--batch_sizes", type=positive, nargs="+", default=[1, 4, 8], metavar="N")
    parser.add_argument("--prompt_lengths", type=positive, nargs="+", default=[30], metavar="N")
    parser.add_argument(
        "--arms", choices=ARMS, nargs="+", default=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}"
    )
    parser.add_argument("--new_tokens", type=at_least(2), default=40, metavar="N")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N")
    parser.add_argument("--output_file", type=Path, metavar="FILE", help="write all measurements here as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the JSON file."""
    if args.arms[0] != "plain":
        raise CommandError("the first of --arms must be plain, which the others are compared with")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("no CUDA device is available")
    if args.output_file and not args.output_file.parent.is_dir():
        raise CommandError(f"no such folder: {args.output_file.parent}")
    args.adversarial_tokens = args.adversarial_tokens or args.num_virtual_tokens
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    setup = load_setup(args)
    cells = [(batch_size, length) for batch_size in args.batch_sizes for length in args.prompt_lengths]
    names = (
        "pair",
        "num_virtual_tokens",
        "adversarial_tokens",
        "batch_sizes",
        "prompt_lengths",
        "new_tokens",
        "repeats",
    )
    result: dict[str, Any] = {
        "environment": describe_environment(args, setup.model),
        "settings": {name: getattr(args, name) for name in names},
        "cells": [],
    }
    with tqdm(total=len(cells) * args.repeats * len(args.arms), file=sys.stderr, unit="call") as progress:
        for cell in cells:
            result["cells"].append(measure_cell(setup, *cell, progress))
            if args.output_file:  # after each cell: a long run that is cut short leaves what it has
                args.output_file.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def main() -> int:
    """Parse, measure, print; return the exit code."""
    parser = CommandParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
