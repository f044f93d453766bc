r"""Measure what the contrast costs on vLLM, and what vLLM gains over transformers, side by side.

    python scripts/benchmark_vllm.py --folder served --num_prompts 32 --new_tokens 64 --repeats 3
    python scripts/benchmark_vllm.py --folder served --prompt_tokens 512 --max_model_len 1024

Three arms answer the same chat prompts, greedily and without an end-of-sequence token, so all write equally much:

- `vllm`: the base model on vLLM, plain.
- `acd_vllm`: the exported folder on vLLM.
- `acd_transformers`: the base model with `ACDLogitsProcessor`, all prompts in one left-padded batch.

They take turns in every repeat; an engine that waits uses no CPU. Each is measured with one prompt and one new token
(time to the first token), with one prompt (latency), and with all of them at once (throughput, new tokens of all
prompts over wall time). Figures are medians over the repeats, and ratios are formed within a repeat. vLLM's prefix
caching is on, as by default, and no prompt comes twice: what it finds is what all requests begin with, the start of
the chat template and, with an embedding pair, its prompts. `KV tokens` is how many tokens of requests fit into vLLM's
cache, of which both engines get the same memory.
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

Times = dict[str, list[dict[str, float]]]  # by arm and repeat: seconds for the "first" token, "one" prompt and "all"
Answer = Callable[[list[Any], int], None]  # of chats, in so many new tokens


def make_prompts(count: int, first: int, length: int, tokenizer: Any) -> list[list[dict[str, str]]]:
    """Chats of at least `length` tokens; those of two different numbers differ from their first words on."""
    chats = []
    for i in range(first, first + count):
        request = FORMS[i % 3].format(TOPICS[i % len(TOPICS)]) + " Be precise." * (i % 5)
        turn = {"role": "user", "content": f"In {20 + i} to {60 + i} words: {request}"}
        ids = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=True)["input_ids"]
        turn["content"] += " again" * (length - len(ids))
        chats.append([turn])
    return chats


def vllm_arm(folder: Path, args: argparse.Namespace) -> tuple[Answer, int]:
    """A function that answers chats on an engine of its own, and how many tokens its cache holds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.num_prompts,
        disable_log_stats=True,
    )

    def answer(chats: list[Any], new_tokens: int) -> None:
        settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        for output in llm.chat(chats, settings, use_tqdm=False):
            assert len(output.outputs[0].token_ids) == new_tokens

    cache = llm.llm_engine.vllm_config.cache_config
    return answer, cache.num_gpu_blocks * cache.block_size


def transformers_arm(base: str, tokenizer: Any, args: argparse.Namespace) -> Answer:
    """A function that answers chats in one batch, with the pair of the exported folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype)
    model.generation_config.eos_token_id = None
    acd = ACDLogitsProcessor(model, read_pair(args.folder))

    def answer(chats: list[Any], new_tokens: int) -> None:
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, logits_processor=[acd])
        assert output.shape[1] == inputs["input_ids"].shape[1] + new_tokens

    return answer


def measure(arms: dict[str, Answer], tokenizer: Any, args: argparse.Namespace) -> Times:
    """Seconds of every arm and repeat: the first token of one prompt, one prompt, and all of them."""
    times: Times = {name: [] for name in arms}
    count = 2 + args.num_prompts
    with tqdm(total=(args.repeats + 1) * len(arms), unit="run", file=sys.stderr) as progress:
        for repeat in range(args.repeats + 1):
            first, one, *many = make_prompts(count, repeat * count, args.prompt_tokens, tokenizer)
            for name, answer in arms.items():
                seconds = {}
                tasks = (("first", [first], 1), ("one", [one], args.new_tokens), ("all", many, args.new_tokens))
                for what, batch, new_tokens in tasks:
                    start = time.perf_counter()
                    answer(batch, new_tokens)
                    seconds[what] = time.perf_counter() - start
                if repeat:  # the first is the warm-up
                    times[name].append(seconds)
                progress.update()
    return times


def table(times: Times, capacity: dict[str, int], args: argparse.Namespace) -> str:
    """The figures as Markdown."""
    everything = f"tokens/s, {args.num_prompts} prompts"
    lines = [
        f"| arm | first token, s | x vllm | one prompt, s | {everything} | x vllm | KV tokens |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in times.items():
        first, one, every = (median(run[what] for run in runs) for what in ("first", "one", "all"))
        speed = args.num_prompts * args.new_tokens / every
        pairs = list(zip(times["vllm"], runs, strict=True))
        later = spread([run["first"] / plain["first"] for plain, run in pairs])
        faster = spread([plain["all"] / run["all"] for plain, run in pairs])
        lines.append(
            f"| {name} | {first:.3f} | {later} | {one:.2f} | {speed:.1f} | {faster} | {capacity.get(name, '')} |"
        )
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    """Median and range."""
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--folder", type=Path, required=True, help="what acd-logits export-vllm wrote")
    parser.add_argument("--model_name_or_path", default=DEMO_MODEL, help="its base model (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--num_prompts", type=int, default=32, metavar="N")
    parser.add_argument("--prompt_tokens", type=int, default=0, metavar="N", help="fill prompts up to N tokens")
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
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    capacity, arms = {}, {}
    for name, folder in (("vllm", Path(base)), ("acd_vllm", args.folder)):
        arms[name], capacity[name] = vllm_arm(folder, args)
    arms["acd_transformers"] = transformers_arm(base, tokenizer, args)
    times = measure(arms, tokenizer, args)
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
