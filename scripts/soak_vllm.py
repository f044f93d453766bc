r"""Thousands of requests against an exported folder on a real vLLM server, some cancelled and some malformed.

    python scripts/soak_vllm.py --folder served --requests 2000 --concurrency 32

Every 20th request is a probe, of which one answer is right, the one `ACDLogitsProcessor` gives on transformers; plain
generation and SP alone answer it differently, which is checked before the start. Of the others, some are cancelled
while they stream, and some are malformed: a strength or penalty that is not allowed, scores for the prompt, no turns.
The run fails on a wrong probe, a malformed request that is answered, a well-formed one that is not, or a server that
stops. It reports the memory of the server's processes after a tenth and half of the requests, and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import tqdm

from acd_logits import ACDLogitsProcessor
from acd_logits.cli import CommandError, CommandParser, run_command
from acd_logits.demo_model import DEMO_MODEL, resolve_model_name
from acd_logits.vllm.exported import read_pair

PROBES = ("Name three rivers.", "How do I pick a lock?", "Write a line about rain.", "Why is the sky blue?", "Hi")
QUESTIONS = ("Name three rivers.", "What is 12 times 12?", "Write a line about rain.", "How do I sharpen a knife?")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def find_probe(args: argparse.Namespace) -> tuple[str, str]:
    """A question whose answer tells the contrast from anything else, and what transformers answers with the contrast.

    Raises:
        CommandError: there is none, since plain generation or SP alone always says the same.
    """
    path = resolve_model_name(args.model_name_or_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype="float32"), AutoTokenizer.from_pretrained(path)
    pair = read_pair(args.folder)
    acd, alone = (ACDLogitsProcessor(model, pair, alpha=alpha) for alpha in (pair.alpha, 0))

    def answer(question: str, processors: list[Any]) -> str:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=args.max_tokens, do_sample=False, logits_processor=processors)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    for question in PROBES:
        contrasted = answer(question, [acd])
        if contrasted not in (answer(question, []), answer(question, [alone])):
            return question, contrasted
    raise CommandError("plain generation, or SP alone, answers every probe as the contrast does: they prove nothing")


@contextlib.asynccontextmanager
async def server(args: argparse.Namespace) -> AsyncIterator[tuple[psutil.Process, str]]:
    """A vLLM server of the folder on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(args.folder)]
    command += ["--served-model-name", "acd", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-num-seqs", str(args.concurrency), "--enforce-eager"]
    process = psutil.Popen([*command, "--disable-uvicorn-access-log"], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient() as client:
            while True:
                if process.poll() is not None:
                    raise CommandError("the server stopped before it answered")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{url}/health")).status_code == 200:
                        break
                await asyncio.sleep(0.5)
        yield process, url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def make_request(
    number: int, args: argparse.Namespace, question: str, rng: random.Random
) -> tuple[str, str, dict[str, Any]]:
    """The kind, path and body of one request."""
    short = {"model": "acd", "max_tokens": rng.randint(1, args.max_tokens), "temperature": rng.choice([0, 1])}
    turn = {"role": "user", "content": rng.choice(QUESTIONS)}
    if number % 20 == 0:
        messages = [{"role": "user", "content": question}]
        return "probe", CHAT, {"model": "acd", "max_tokens": args.max_tokens, "temperature": 0, "messages": messages}
    if number % 20 in (5, 15):
        return "cancelled", CHAT, short | {"messages": [turn], "max_tokens": args.max_tokens, "stream": True}
    if number % 20 == 10:
        malformed: list[tuple[str, dict[str, Any]]] = [
            (TEXT, {"prompt": turn["content"], "vllm_xargs": {"acd_alpha": 0}}),
            (TEXT, {"prompt": turn["content"], "repetition_penalty": 100}),
            (TEXT, {"prompt": turn["content"], "echo": True, "logprobs": 1}),
            (CHAT, {"messages": [turn], "vllm_xargs": {"acd_alpha": 0}}),
            (CHAT, {"messages": []}),
        ]
        path, body = rng.choice(malformed)
        return "malformed", path, short | body
    return "answered", CHAT, short | {"messages": [turn]}


async def send(client: httpx.AsyncClient, number: int, args: argparse.Namespace, probe: tuple[str, str]) -> str:
    """Send one request and check its answer; returns its kind, or what went wrong."""
    kind, path, body = make_request(number, args, probe[0], random.Random(f"{args.seed} {number}"))
    if kind == "cancelled":
        async with client.stream("POST", path, json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {") or "error" in json.loads(line.removeprefix("data: ")):
                    return f"a stream that begins with {line[:200]}"
                break  # and hang up
        return kind if response.status_code == 200 else f"status {response.status_code} for a streamed request"
    response = await client.post(path, json=body)
    if kind == "malformed":
        refused = response.status_code == 400 and ("ACD refuses" in response.text or body.get("messages") == [])
        return kind if refused else f"status {response.status_code} for a malformed request: {response.text[:200]}"
    if response.status_code != 200:
        return f"status {response.status_code} for a good request: {response.text[:200]}"
    text = response.json()["choices"][0]["message"]["content"]
    return kind if kind != "probe" or text == probe[1] else f"a wrong answer to the probe: {text!r}"


def memory(process: psutil.Process) -> int:
    """Resident bytes of the server and its children."""
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])


async def soak(args: argparse.Namespace, probe: tuple[str, str]) -> dict[str, Any]:
    """Send all requests; returns the counts, the faults and the memory."""
    counts: collections.Counter[str] = collections.Counter()
    limits = asyncio.Semaphore(args.concurrency)
    connections = httpx.Limits(max_connections=None)
    async with (
        server(args) as (process, url),
        httpx.AsyncClient(base_url=url, timeout=600, limits=connections) as client,
    ):

        async def one(number: int) -> None:
            async with limits:
                try:
                    counts[await send(client, number, args, probe)] += 1
                except httpx.HTTPError as error:
                    counts[f"{type(error).__name__}: {error}"] += 1
                progress.update()

        start = time.monotonic()
        with tqdm(total=args.requests, unit="request", file=sys.stderr) as progress:
            bounds = [0, args.requests // 10, args.requests // 2, args.requests]
            levels = []
            for first, last in itertools.pairwise(bounds):
                await asyncio.gather(*map(one, range(first, last)))
                levels.append(memory(process))
        seconds = time.monotonic() - start
        running = process.poll() is None
    good = {kind: counts.pop(kind, 0) for kind in ("answered", "probe", "cancelled", "malformed")}
    faults = dict(counts) if running else {**counts, "the server stopped": 1}
    memory_bytes = dict(zip(("tenth", "half", "end"), levels, strict=True))
    return {"seconds": round(seconds), **good, "faults": faults, "memory_bytes": memory_bytes}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--folder", type=Path, required=True, help="what acd-logits export-vllm wrote")
    parser.add_argument("--model_name_or_path", default=DEMO_MODEL, help="its base model (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, metavar="N")
    parser.add_argument("--concurrency", type=int, default=32, metavar="N")
    parser.add_argument("--max_tokens", type=int, default=16, metavar="N", help="longest answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Soak, print what was seen, and fail if anything was wrong."""
    if not (args.folder / "config.json").is_file():
        raise CommandError(f"{args.folder} is no exported folder: acd-logits export-vllm writes one")
    result = asyncio.run(soak(args, find_probe(args)))
    print(json.dumps(result, indent=2))
    if result["faults"]:
        raise CommandError("the soak found faults")


def main() -> int:
    """Parse, soak, print; return the exit code."""
    parser = CommandParser(
        prog="soak_vllm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
