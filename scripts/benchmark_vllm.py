r"""Measure what the contrast costs on vLLM, and what vLLM gains over transformers, side by side.

    python scripts/benchmark_vllm.py --folder served --num_prompts 32 --new_tokens 64 --repeats 3

Three arms answer the same chat prompts, greedily and without an end-of-sequence token, so all write equally much:

- `vllm`: the base model on vLLM, plain.
- `acd_vllm`: the exported folder on vLLM.
- `acd_transformers`: the base model with `ACDLogitsProcessor`, all prompts in one left-padded batch.

They take turns in every repeat; an engine that waits uses no CPU. Each is measured with one prompt (latency) and with
all of them at once (throughput, new tokens of all prompts over wall time). Figures are medians over the repeats, and
ratios are formed within a repeat. vLLM's prefix caching is on, as by default, and no prompt comes twice: what it finds
is what all requests begin with, the start of the chat template and, with the contrast, the soft prompts. `KV tokens`
is how many tokens of requests fit into vLLM's cache, of which both engines get the same memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import tqdm

from acd_logits import ACDLogitsProcessor
from acd_logits.cli import CommandError, CommandParser, run_command
from acd_logits.demo_model import DEMO_MODEL, resolve_model_name
from acd_logits.vllm.exported import read_pair

TOPICS = ("a river", "a birthday party", "the number seven", "a bicycle tour", "learning to cook", "an old clock")
FORMS = (
    "Tell me about {}.",
    "Write a short poem about {}.",
    "Give me three facts on {} for a talk at school.",
)

Times = dict[str, list[dict[str, float]]]  # by arm and repeat: seconds for "one" prompt and for "all"


def make_prompts(count: int, first: int) -> list[list[dict[str, str]]]:
    """Chats of different lengths; those of two different numbers differ from their first words on."""
    texts = []
    for i in range(first, first + count):
        request = FORMS[i % 3].format(TOPICS[i % len(TOPICS)]) + " Be precise." * (i % 5)
        texts.append(f"In {20 + i} to {60 + i} words: {request}")
    return [[{"role": "user", "content": text}] for text in texts]


def vllm_arm(folder: Path, args: argparse.Namespace) -> tuple[Callable[[list[Any]], None], int]:
    """A function that answers chats on an engine of its own, and how many tokens its cache holds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.num_prompts,
        disable_log_stats=True,
    )
    settings = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)

    def answer(chats: list[Any]) -> None:
        for output in llm.chat(chats, settings, use_tqdm=False):
            assert len(output.outputs[0].token_ids) == args.new_tokens

    cache = llm.llm_engine.vllm_config.cache_config
    return answer, cache.num_gpu_blocks * cache.block_size


def transformers_arm(base: str, args: argparse.Namespace) -> Callable[[list[Any]], None]:
    """A function that answers chats in one batch, with the pair of the exported folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype)
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    acd = ACDLogitsProcessor(model, read_pair(args.folder))

    def answer(chats: list[Any]) -> None:
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        output = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False, logits_processor=[acd])
        assert output.shape[1] == inputs["input_ids"].shape[1] + args.new_tokens

    return answer


def measure(arms: dict[str, Callable[[list[Any]], None]], args: argparse.Namespace) -> Times:
    """Seconds of every arm and repeat, for one prompt and for all."""
    times: Times = {name: [] for name in arms}
    with tqdm(total=(args.repeats + 1) * len(arms), unit="run", file=sys.stderr) as progress:
        for repeat in range(args.repeats + 1):
            one, *many = make_prompts(1 + args.num_prompts, repeat * (1 + args.num_prompts))
            for name, answer in arms.items():
                seconds = {}
                for what, batch in (("one", [one]), ("all", many)):
                    start = time.perf_counter()
                    answer(batch)
                    seconds[what] = time.perf_counter() - start
                if repeat:  # the first is the warm-up
                    times[name].append(seconds)
                progress.update()
    return times


def table(times: Times, capacity: dict[str, int], args: argparse.Namespace) -> str:
    """The figures as Markdown."""
    lines = [
        f"| arm | one prompt, s | tokens/s, {args.num_prompts} prompts | x vllm | KV tokens |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, runs in times.items():
        speed = args.num_prompts * args.new_tokens / median(run["all"] for run in runs)
        ratios = [plain["all"] / run["all"] for plain, run in zip(times["vllm"], runs, strict=True)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        one = median(run["one"] for run in runs)
        lines.append(f"| {name} | {one:.2f} | {speed:.1f} | {ratio} | {capacity.get(name, '')} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--folder", type=Path, required=True, help="what acd-logits export-vllm wrote")
    parser.add_argument("--model_name_or_path", default=DEMO_MODEL, help="its base model (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--num_prompts", type=int, default=32, metavar="N")
    parser.add_argument("--new_tokens", type=int, default=64, metavar="N")
    parser.add_argument("--max_model_len", type=int, default=512, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--num_threads", type=int, metavar="N", help="CPU threads of transformers")
    parser.add_argument("--output_file", type=Path, metavar="FILE", help="write all measurements here as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the JSON file."""
    if not (args.folder / "config.json").is_file():
        raise CommandError(f"{args.folder} is no exported folder: acd-logits export-vllm writes one")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    base = resolve_model_name(args.model_name_or_path)
    capacity, arms = {}, {}
    for name, folder in (("vllm", Path(base)), ("acd_vllm", args.folder)):
        arms[name], capacity[name] = vllm_arm(folder, args)
    arms["acd_transformers"] = transformers_arm(base, args)
    times = measure(arms, args)
    print(table(times, capacity, args))
    if args.output_file:
        args.output_file.write_text(json.dumps({"seconds": times, "kv_tokens": capacity}, indent=2) + "\n")


def main() -> int:
    """Parse, measure, print; return the exit code."""
    parser = CommandParser(
        prog="benchmark_vllm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
