r"""Check ACD on a GPU in one command: exactness, speed beside plain generate, memory, CUDA graphs, kernels.

It needs no installed package, network or model, and ends within 570 s on one H100:

    PYTHONPATH=src python scripts/gpu_check.py --output_dir gpu-check

Everything once with tiny models, in a minute on a CPU; some steps again:

    PYTHONPATH=src python scripts/gpu_check.py --output_dir gpu-check --tiny --device cpu
    PYTHONPATH=src python scripts/gpu_check.py --output_dir gpu-check --steps environment exactness

The steps run one after the other, each in a process and with a time limit of its own, so that none stops the others:

- `environment`: versions, the card, its memory bandwidth (a copy, bytes read and written) and its matrix rate.
- `smoke`: every way to decode, in bfloat16, and how often a new token makes the host wait for the device.
- `exactness`: the tests against the slow reference, with `ACD_TEST_DEVICE` set, in float32 without TF32.
- `speed`: a random Llama-2-7B in bfloat16, by benchmark.py. A floor is the least time that the card could take: the
  bytes of weights and cache over the bandwidth, or the operations over the matrix rate, whichever is longer.
- `profile`: kernels of one decode step, the gaps between them, and how long the host takes to queue the step.
- `static_acd`, `static_plain`: half of that Llama's layers on a static cache, compiled by generate itself into CUDA
  graphs. On a CPU a backend that only traces takes the compiler's place.

Results are written to gpu_check.json and gpu_check.md, and output to gpu_check.log, in the folder, as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXACT = [f"tests/decoding/test_{name}.py" for name in ("paired", "shared", "logits_process", "generate")]
# They are about the host (other devices, its memory), or draw hundreds of samples
NOT_EXACT = "not accelerate_device_map and not leak_nothing and not pipeline and not sampled_drafts"
SPEED_ARMS = ["plain", "acd", "frozen", "shared", "horizon", "guidance"]
SPEED_CELLS = [(1, 32), (4, 512), (8, 2048), (8, 32), (1, 2048)]  # the most important first
STATIC_CELLS = [(1, 32), (4, 512)]
SOFT, HORIZON = 100, 16  # tokens of each soft prompt, and of benchmark.py's horizon arms

KEPT_COUNTERS = ("stats", "graph_break", "inductor")  # of what torch.compile counts

Save = Callable[[dict[str, Any]], None]


# ----- the steps -----


def environment(args: argparse.Namespace, save: Save) -> None:
    """Versions, the card, and the two rates that every floor follows from."""
    import peft
    import torch
    import transformers

    import acd_logits

    result: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "acd_logits": acd_logits.__version__,
        "cuda": torch.version.cuda,
        "device": "cpu",
    }
    save(result)
    cuda = args.device == "cuda"
    if cuda:
        card = torch.cuda.get_device_properties(0)
        result |= {"device": card.name, "memory_bytes": card.total_memory, "cudnn": torch.backends.cudnn.version()}
        save(result)
    options = {"device": args.device, "dtype": torch.bfloat16}
    size, side = (4 << 30, 8192) if cuda else (16 << 20, 256)
    source = torch.ones(size // 2, **options)
    target = torch.empty_like(source)
    result["bytes_per_s"] = 2 * size / time_call(args.device, partial(target.copy_, source))
    del source, target
    left, right = (torch.randn(side, side, **options) for _ in range(2))
    result["operations_per_s"] = 2 * side**3 / time_call(args.device, partial(torch.matmul, left, right))
    save(result)


def time_call(device: str, call: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median seconds of a call, until the device is done."""
    import torch

    from benchmark import now

    times = []
    for _ in range(repeats + 3):
        start = now(torch.device(device))
        call()
        times.append(now(torch.device(device)) - start)
    return median(times[3:])  # the first warm up


def smoke(args: argparse.Namespace, save: Save) -> None:
    """Every way to decode once: the right number of finite scores, and how often it waits for the device."""
    import torch

    setup = load_model(args, "tiny" if args.tiny else "small")
    prompt = torch.randint(3, setup.model.config.vocab_size, (3, 40), device=args.device)
    repeated = torch.randint(3, setup.model.config.vocab_size, (1, 8), device=args.device).repeat(1, 5)
    padded = torch.ones_like(prompt)
    padded[0, :9] = padded[2, :25] = 0
    modes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of generate, and of the processor
        "greedy": ({}, {}),
        "sampling": ({"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9}, {}),
        "beams": ({"num_beams": 3}, {}),
        "prompt_lookup": ({"inputs": repeated, "prompt_lookup_num_tokens": 4}, {}),
        "alpha_per_row": ({}, {"alpha": torch.tensor([0.0, 0.5, 1.0])}),
        "padded": ({"attention_mask": padded}, {}),
        "horizon": ({}, {"horizon": 4}),
        "shared": ({}, {"share_instruction_kv": True}),
        "shared_padded": ({"attention_mask": padded}, {"share_instruction_kv": True}),
        "static": ({"cache_implementation": "static", "disable_compile": True}, {}),
    }
    result: dict[str, Any] = {}
    for mode, (options, ours) in modes.items():
        try:
            result[mode] = smoke_mode(setup, {"inputs": prompt} | options, ours)
        except Exception as error:
            result[mode] = note_error(error)
        save(result)


def smoke_mode(setup: Any, options: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """One way to decode, plain and with ACD."""
    from acd_logits import ACDLogitsProcessor

    options = {"attention_mask": options["inputs"].new_ones(options["inputs"].shape)} | options
    plain, _ = waits_per_token(setup.model, options)
    acd = ACDLogitsProcessor(setup.model, setup.pair, **ours)
    try:
        waits, places = waits_per_token(setup.model, options | {"logits_processor": [acd]})
    finally:
        acd.detach()
    return {"waits_per_token_plain": plain, "waits_per_token_acd": waits, "places": places}


def waits_per_token(model: Any, options: dict[str, Any]) -> tuple[float | None, dict[str, float]]:
    """How often a new token makes the host wait for the device, and where, from the difference of two lengths."""
    import torch

    cuda = model.device.type == "cuda"
    short, long = (8, 24) if cuda else (3, 6)
    found: list[Counter[str]] = []
    for new_tokens in (short, short, long):  # the first warms up
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                out = model.generate(
                    **options, max_new_tokens=new_tokens, return_dict_in_generate=True, output_scores=True
                )
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
        length = options["inputs"].shape[1]
        if out.sequences.shape[1] - length != new_tokens:
            raise RuntimeError(f"made {out.sequences.shape[1] - length} tokens instead of {new_tokens}")
        for scores in out.scores:
            if bool(scores.isnan().any()) or not bool(scores.isfinite().any(-1).all()):
                raise RuntimeError("a row has scores that are not numbers, or none that is finite")
        synchronizing = [w for w in caught if "called a synchronizing" in str(w.message)]
        found.append(Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in synchronizing))
    if not cuda:
        return None, {}
    places = {place: (count - found[1][place]) / (long - short) for place, count in found[2].most_common()}
    return (found[2].total() - found[1].total()) / (long - short), {k: v for k, v in places.items() if v}


def exactness(args: argparse.Namespace, save: Save) -> None:
    """The tests against the slow reference on this device."""
    import pytest

    os.environ["ACD_TEST_DEVICE"] = args.device
    recorder = Recorder(save)
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    options += ["--rootdir", str(ROOT)]
    options += ["-k", "TestContrast or alpha_per_row" if args.tiny else NOT_EXACT]
    if args.device == "cuda" and importlib.util.find_spec("xdist"):
        options += ["-n", "6"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "90"]
    code = pytest.main([*options, *(str(ROOT / test) for test in args.tests)], plugins=[recorder])
    recorder.result["complete"] = True
    save(recorder.result)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}: see gpu_check.log")


class Recorder:
    """A pytest plugin that saves the outcomes so far after every test."""

    def __init__(self, save: Save) -> None:
        self.save = save
        self.result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "complete": False, "failures": {}}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test, whose setup and teardown count where they do not pass."""
        if report.when == "call" or not report.passed:
            self.result[report.outcome] += 1
            self.note(report)

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file that cannot be collected."""
        if report.failed:
            self.result["failed"] += 1
            self.note(report)

    def note(self, report: Any) -> None:
        """Keep the first lines of what went wrong."""
        if report.failed:
            text = str(report.longreprtext).splitlines()
            errors = [line[1:].strip() for line in text if line.startswith("E  ")][:4]
            places = [line for line in text if line.startswith(("src/", "tests/")) and ": in " in line][-3:]
            self.result["failures"][report.nodeid] = [line[:300] for line in errors + places or text[-4:]]
        self.save(self.result)


def speed(args: argparse.Namespace, save: Save) -> None:
    """All arms of benchmark.py, in as many cells as time allows."""
    import torch
    from transformers.utils.logging import tqdm

    from benchmark import measure_cell

    size = "tiny" if args.tiny else "7b"
    start = time.monotonic()
    setup = load_model(args, size, new_tokens=6 if args.tiny else 64, repeats=1 if args.tiny else 3, arms=SPEED_ARMS)
    result: dict[str, Any] = {"model": size, "load_s": time.monotonic() - start, "cells": []}
    save(result)
    longest = 0.0
    for batch, length in SPEED_CELLS[:2] if args.tiny else SPEED_CELLS:
        start = time.monotonic()
        if args.deadline and time.time() + longest > args.deadline:
            break
        try:
            cell = measure_cell(setup, batch, length, tqdm(disable=True), profile=False)
            for arm, measured in cell["arms"].items():
                measured["floor"] = floor(args, size, arm, batch, length, setup.new_tokens)
        except Exception as error:
            cell = {"batch_size": batch, "prompt_length": length} | note_error(error)
            if args.device == "cuda":
                torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - start)
        result["cells"].append(cell | {"wall_s": time.monotonic() - start})
        save(result)


def floor(
    args: argparse.Namespace, size: str, arm: str, batch: int, length: int, new_tokens: int
) -> dict[str, float] | None:
    """The least seconds to the first token, for a later one and for the call, by the rates that were measured."""
    from benchmark import RANDOM_LLAMAS

    try:
        facts = json.loads((args.output_dir / "gpu_check.json").read_text())["steps"]["environment"]["result"]
        bandwidth, rate = facts["bytes_per_s"], facts["operations_per_s"]
    except (OSError, KeyError):  # that step did not get so far
        return None
    vocab, hidden, inner, layers, heads, kv_heads = RANDOM_LLAMAS[size]
    item, kv = 2, kv_heads * hidden // heads  # bytes of a bfloat16
    body, head = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner), vocab * hidden
    weights, slot = (body + head) * item, layers * 2 * kv * item

    def least(forwards: int, tokens: float, rows: int, read: float, seen: float) -> float:
        """Of forwards over so many tokens and rows of logits, cache slots read, and pairs of query and key."""
        operations = 2 * body * tokens + 2 * head * rows + 4 * hidden * layers * seen
        return max((forwards * weights + read * slot) / bandwidth, operations / rate)

    def later(step: int) -> float:
        held = length + step  # tokens of the prompt and new ones
        if arm == "plain":
            return least(1, batch, batch, batch * held, batch * held)
        if arm == "guidance":
            return least(2, 2 * batch, 2 * batch, batch * (2 * held + SOFT), batch * (2 * held + SOFT))
        if arm == "shared":
            slots = batch * (length - 1 + 2 * SOFT + 2 * (step + 1))
            return least(1, 2 * batch, 2 * batch, slots, 2 * slots)
        rows = batch if arm == "horizon" and step >= HORIZON else 2 * batch
        return least(1, rows, rows, rows * (SOFT + held), rows * (SOFT + held))

    square = batch * length**2 / 2
    first = {
        "plain": least(1, batch * length, batch, 0, square),
        "guidance": least(2, batch * (2 * length + SOFT), 2 * batch, 0, square + batch * (length + SOFT) ** 2 / 2),
        "shared": least(1, batch * (length + 1), 2 * batch, 0, square),
    }.get(arm, least(1, 2 * batch * length, 2 * batch, 0, 2 * (square + batch * length * SOFT)))
    decode = [later(step) for step in range(1, new_tokens)]
    return {
        "first_token_s": first,
        "decode_s_per_token": sum(decode) / len(decode),
        "call_s": first + sum(decode),
    }


def profile(args: argparse.Namespace, save: Save) -> None:
    """Kernels, gaps and host time of a decode step."""
    from benchmark import ARMS, detach, random_ids

    setup = load_model(args, "tiny" if args.tiny else "7b", new_tokens=12)
    prompt = random_ids(setup.model, 1, 32)
    result: dict[str, Any] = {}
    for arm in ("plain", "acd", "shared"):
        arguments = ARMS[arm](setup, prompt)
        try:
            result[arm] = profile_arm(setup, prompt, arguments)
        except Exception as error:
            result[arm] = note_error(error)
        finally:
            detach(arguments)
        save(result)
    counts = {arm: Counter(measured.get("operators", {})) for arm, measured in result.items()}
    result["more_operators_than_plain"] = {arm: counts[arm] - counts["plain"] for arm in ("acd", "shared")}
    save(result)


def profile_arm(setup: Any, prompt: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """One arm: host and device times of a step without a profiler, and kernels and gaps with it."""
    import torch

    def run(clock: StepClock) -> None:
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": setup.new_tokens}
        setup.model.generate(prompt, **options, stopping_criteria=[clock], **arguments)

    run(StepClock())
    clock = StepClock()
    run(clock)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if prompt.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    steps, first = 4, 5
    profiler = torch.profiler.profile(activities=activities)
    run(StepClock(profiler, first, first + steps))
    events = list(profiler.events())
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type.name == "CUDA"
    )
    gaps, busy, end = [], 0.0, spans[0][0] if spans else 0.0
    for start, stop, _ in spans:
        gaps.append(max(0.0, start - end))
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    time_of: Counter[str] = Counter()
    for start, stop, name in spans:
        time_of[name[:80]] += (stop - start) / steps / 1e6
    operators = Counter(event.name for event in events if event.name.startswith("aten::"))
    host, wait = zip(*clock.steps[2:], strict=True)  # the first new token is the prefill's
    return {
        "host_s": median(host),
        "wait_s": median(wait),
        "step_s": median(h + w for h, w in clock.steps[2:]),
        "kernels": sum(not name.startswith("Mem") for _, _, name in spans) / steps,
        "copies": sum(name.startswith("Mem") for _, _, name in spans) / steps,
        "busy_s": busy / steps / 1e6,
        "gaps_s": sum(gaps) / steps / 1e6,
        "longest_gap_s": max(gaps, default=0.0) / 1e6,
        "slowest_kernels_s": dict(time_of.most_common(8)),
        "operators": {name: count / steps for name, count in operators.most_common()},
    }


def static(args: argparse.Namespace, save: Save, arm: str) -> None:
    """One arm on a static cache, which generate compiles."""
    import torch
    from transformers import CompileConfig

    from benchmark import METRICS, acd_arguments, detach, generate, random_ids

    size = "tiny" if args.tiny else "7b_half"
    setup = load_model(args, size, new_tokens=6 if args.tiny else 64)
    result: dict[str, Any] = {"model": size, "compiler": "CUDA graphs", "cells": []}
    options: dict[str, Any] = {"cache_implementation": "static"}
    if args.device == "cpu":
        config = CompileConfig(backend="eager", mode="default")
        config._compile_all_devices = True
        options["compile_config"], result["compiler"] = config, "a backend that only traces"
    save(result)
    for batch, length in STATIC_CELLS[:1] if args.tiny else STATIC_CELLS:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        cell: dict[str, Any] = {"batch_size": batch, "prompt_length": length, "runs": []}
        result["cells"].append(cell)
        prompt = random_ids(setup.model, batch, length)
        arguments = acd_arguments(setup, prompt) if arm == "acd" else {}
        try:
            for repeat in range(2 if args.tiny else 5):
                metrics = generate(setup, prompt, arguments | options)
                cell["runs"].append(metrics)
                if repeat:  # the first compiles
                    cell["summary"] = {m: median(run[m] for run in cell["runs"][1:]) for m in METRICS}
                cell["counters"] = {k: dict(v) for k, v in torch._dynamo.utils.counters.items() if k in KEPT_COUNTERS}
                save(result)
            cell["floor"] = floor(args, size, arm, batch, length, setup.new_tokens)
        except Exception as error:
            cell |= note_error(error)
        detach(arguments)
        save(result)


def static_acd(args: argparse.Namespace, save: Save) -> None:
    """See [`static`]."""
    static(args, save, "acd")


def static_plain(args: argparse.Namespace, save: Save) -> None:
    """See [`static`]."""
    static(args, save, "plain")


# In the order they run in, with the seconds each may take
STEPS: dict[str, tuple[Callable[[argparse.Namespace, Save], None], int]] = {
    "environment": (environment, 60),
    "smoke": (smoke, 60),
    "exactness": (exactness, 180),
    "speed": (speed, 150),
    "profile": (profile, 50),
    "static_acd": (static_acd, 90),
    "static_plain": (static_plain, 110),
}


# ----- what they have in common -----


class StepClock:
    """A stopping criterion that notes how long the host takes to queue a step, and then waits for the device.

    With a profiler, that one runs from the new token `first` to the new token `last`.
    """

    def __init__(self, profiler: Any = None, first: int = 0, last: int = 0) -> None:
        self.steps: list[tuple[float, float]] = []
        self.profiler, self.first, self.last = profiler, first, last
        self.ready = time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Stop no row."""
        from benchmark import now

        queued = time.perf_counter()
        done = now(input_ids.device)
        self.steps.append((queued - self.ready, done - queued))
        if self.profiler and len(self.steps) == self.first:
            self.profiler.start()
        if self.profiler and len(self.steps) == self.last:
            self.profiler.stop()
        self.ready = time.perf_counter()
        return input_ids.new_zeros(len(input_ids)).bool()


def load_model(
    args: argparse.Namespace, size: str, new_tokens: int = 2, repeats: int = 1, arms: list[str] | None = None
) -> Any:
    """A random Llama in bfloat16 and a random pair, by benchmark.py."""
    import benchmark

    vocab, hidden, inner, layers, heads, kv_heads = benchmark.RANDOM_LLAMAS["7b"]
    benchmark.RANDOM_LLAMAS["7b_half"] = (vocab, hidden, inner, layers // 2, heads, kv_heads)
    benchmark.RANDOM_LLAMAS["small"] = (4096, 512, 1024, 4, 8, 4)
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    options = ["--random_llama", size, "--device", args.device, "--dtype", "bfloat16"]
    options += ["--num_virtual_tokens", str(SOFT), "--adversarial_tokens", str(SOFT)]
    options += ["--new_tokens", str(new_tokens), "--repeats", str(repeats), "--arms", *(arms or ["plain"])]
    return benchmark.load_setup(parser.parse_args(options))


def note_error(error: BaseException) -> dict[str, str]:
    """Print where it was raised, and return its first lines."""
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {error}"[:500]}


def faulty(result: Any) -> bool:
    """Whether there is an error, or a failed test, in it."""
    if isinstance(result, dict):
        return "error" in result or bool(result.get("failures")) or any(map(faulty, result.values()))
    return isinstance(result, list) and any(map(faulty, result))


# ----- a step in its process -----


def run_here(args: argparse.Namespace) -> int:
    """Run one step, saving what it has found so far; return the exit code."""
    sys.path.insert(0, str(ROOT / "scripts"))
    latest: dict[str, Any] = {}

    def save(result: dict[str, Any]) -> None:
        latest.update(result)
        write(args.result_file, json.dumps(latest, default=str))

    try:
        STEPS[args.step][0](args, save)
    except BaseException as error:  # pytest and torch also raise what is no Exception
        save(note_error(error))
    return int(faulty(latest))


def write(path: Path, text: str) -> None:
    """Replace a file at once, since it may be read at any time."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


# ----- all steps -----


def run_step(command: list[str], limit: float, result_file: Path, log_file: Path, note: Save) -> dict[str, Any]:
    """Run a step in a process of its own.

    Args:
        command: the process.
        limit: seconds after which it is ended.
        result_file: what it writes as it goes.
        log_file: what it prints is appended here.
        note: called with the step's entry whenever there is news.

    Returns:
        The entry: `status` (`ok`, `failed`, `time limit`), `seconds`, `result`, and unless ok the `log`'s end.
    """
    start, entry, known = time.monotonic(), {"status": "running", "seconds": 0.0, "result": {}}, ""
    with log_file.open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=child_environment(), start_new_session=True
        )
        try:
            while entry["status"] == "running":
                left = limit - (time.monotonic() - start)
                try:
                    entry["status"] = "failed" if process.wait(min(1.0, max(0.0, left))) else "ok"
                except subprocess.TimeoutExpired:
                    entry["status"] = "running" if left > 0 else "time limit"
                entry["seconds"] = round(time.monotonic() - start, 1)
                text = result_file.read_text() if result_file.exists() else ""
                if text != known:
                    known, entry["result"] = text, json.loads(text)
                    note(entry)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # compilers and test workers too
            process.wait()
    if entry["status"] != "ok":
        with log_file.open("rb") as log:
            log.seek(begin)
            entry["log"] = log.read().decode(errors="replace").splitlines()[-30:]
        entry["exit_code"] = process.returncode
    note(entry)
    return entry


def child_environment() -> dict[str, str]:
    """This process's environment, with the source tree importable and nothing asked of the Hub."""
    paths = [str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    changes = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | changes | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths)))}


def run_all(args: argparse.Namespace) -> int:
    """Run the steps one after the other; return 0 if all are ok."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is ended too
    end = time.monotonic() + args.seconds
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log_file = args.output_dir / "gpu_check.log"
    log_file.write_bytes(b"")
    result: dict[str, Any] = {"device": args.device, "tiny": args.tiny, "steps": {}}

    def note() -> None:
        write(args.output_dir / "gpu_check.json", json.dumps(result, indent=1) + "\n")
        write(args.output_dir / "gpu_check.md", report(result) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        for step in args.steps:
            limit = min(STEPS[step][1] * (4 if args.tiny else 1), end - time.monotonic() - 5)
            command = [sys.executable, str(Path(__file__).resolve()), "--step", step, "--device", args.device]
            command += ["--output_dir", str(args.output_dir.resolve()), "--deadline", str(time.time() + limit)]
            command += ["--result_file", str(Path(folder) / f"{step}.json"), "--tests", *args.tests]
            command += ["--tiny"] if args.tiny else []

            def note_step(entry: dict[str, Any], step: str = step) -> None:
                result["steps"][step] = entry
                note()

            if limit < 5:
                note_step({"status": "no time left", "seconds": 0.0, "result": {}})
            else:
                run_step(command, limit, Path(folder) / f"{step}.json", log_file, note_step)
            entry = result["steps"][step]
            print(f"{step}: {entry['status']} after {entry['seconds']} s", flush=True)
            for line in entry.get("log", [])[-6:]:
                print(f"    {line[:300]}", flush=True)
    print(report(result), flush=True)
    return int(any(entry["status"] != "ok" for entry in result["steps"].values()))


# ----- the report -----


def table(head: str, rows: list[list[str]]) -> str:
    """Markdown of a table whose columns are named in `head`, between bars."""
    names = [name.strip() for name in head.split("|")]
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def report(result: dict[str, Any]) -> str:
    """Everything found so far, as Markdown."""
    found = {step: entry["result"] for step, entry in result["steps"].items()}
    rows = [[step, entry["status"], f"{entry['seconds']} s"] for step, entry in result["steps"].items()]
    parts = [table("step | status | time", rows)]
    for name, write_part in PARTS.items():
        if any(values for step, values in found.items() if step.startswith(name)):
            try:
                parts.append(f"**{name}**\n\n{write_part(found)}")
            except Exception as error:  # a part that is not complete
                parts.append(f"**{name}**: {note_error(error)['error']}\n")
    return "\n".join(parts)


def report_environment(found: dict[str, Any]) -> str:
    """One line."""
    facts = dict(found["environment"])
    facts["copy"] = f"{facts.pop('bytes_per_s', 0) / 1e9:.0f} GB/s (bytes read and written)"
    facts["matrices"] = f"{facts.pop('operations_per_s', 0) / 1e12:.1f} Tflop/s in bfloat16"
    return "; ".join(f"{name} {value}" for name, value in facts.items()) + ".\n"


def report_smoke(found: dict[str, Any]) -> str:
    """How often a new token waits."""
    rows = []
    for mode, seen in found["smoke"].items():
        if isinstance(seen, dict) and "error" not in seen:
            places = ", ".join(f"{place} ({count:.2g})" for place, count in list(seen["places"].items())[:6])
            waits = (seen["waits_per_token_plain"], seen["waits_per_token_acd"])
            rows.append([mode, *("n/a" if wait is None else f"{wait:.2f}" for wait in waits), places])
        else:
            rows.append([mode, "", "", str(seen)])
    return table("mode | waits per token, plain | acd | where under acd", rows)


def report_exactness(found: dict[str, Any]) -> str:
    """Counts, and the first lines of each failure."""
    seen = found["exactness"]
    counts = [f"{seen.get(outcome, 0)} {outcome}" for outcome in ("passed", "failed", "skipped")]
    lines = [", ".join(counts) + ("" if seen.get("complete") else ", ended before all were run") + ".\n"]
    lines += [f"- {name}: {'; '.join(text)}" for name, text in list(seen.get("failures", {}).items())[:40]]
    return "\n".join(lines) + "\n"


TIMES = (("first_token_s", 1e3, 1), ("decode_s_per_token", 1e3, 2), ("call_s", 1, 3))
TIME_COLUMNS = "first token, ms | ratio | floor | decode, ms/token | ratio | floor | call, s | ratio | floor"


def report_speed(found: dict[str, Any]) -> str:
    """One row for each cell and arm."""
    rows = []
    for cell in found["speed"]["cells"]:
        for arm, seen in cell.get("arms", {"": cell}).items():
            row = [str(cell["batch_size"]), str(cell["prompt_length"]), arm or cell.get("error", "")]
            for metric, scale, digits in TIMES if arm else ():
                summary, least = seen["summary"][metric], seen["floor"]
                ratio = summary["ratio_to_plain"]
                row.append(f"{summary['median'] * scale:.{digits}f}")
                row.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
                row.append(f"{least[metric] * scale:.{digits}f}" if least else "n/a")
            for name in ("cache_bytes", "peak_bytes", "peak_reserved_bytes"):
                row.append("n/a" if seen.get(name) is None else f"{seen[name] / 2**20:.0f}")
            rows.append([*row, str(seen.get("alloc_retries"))])
    return table(f"batch | prompt | arm | {TIME_COLUMNS} | cache, MiB | peak, MiB | reserved, MiB | retries", rows)


def report_profile(found: dict[str, Any]) -> str:
    """One row for each arm."""
    names = ("kernels", "copies", "busy_s", "gaps_s", "longest_gap_s", "host_s", "wait_s", "step_s")
    rows = []
    for arm in ("plain", "acd", "shared"):
        seen = found["profile"].get(arm, {})
        values = [f"{seen[n] * 1e3:.3f}" if n.endswith("_s") else f"{seen[n]:.0f}" for n in names if n in seen]
        rows.append([arm, *values] if values else [arm, seen.get("error", "not run"), *[""] * 7])
    columns = "kernels | copies | busy, ms | gaps, ms | longest gap, ms | host queues, ms | then waits, ms | step, ms"
    return table(f"arm | {columns}", rows)


def report_static(found: dict[str, Any]) -> str:
    """Both arms, with the ratios of their medians."""
    rows = []
    cells = {
        arm: {(cell["batch_size"], cell["prompt_length"]): cell for cell in found.get(f"static_{arm}", {})["cells"]}
        for arm in ("plain", "acd")
        if "cells" in found.get(f"static_{arm}", {})
    }
    for arm, measured in cells.items():
        for key, cell in measured.items():
            row = [*map(str, key), arm]
            base = cells.get("plain", {}).get(key, {}).get("summary", {})
            for metric, scale, digits in TIMES if "summary" in cell else ():
                value, least = cell["summary"][metric], cell.get("floor")
                row.append(f"{value * scale:.{digits}f}")
                row.append(f"{value / base[metric]:.2f}" if metric in base else "n/a")
                row.append(f"{least[metric] * scale:.{digits}f}" if least else "n/a")
            row += [""] * (12 - len(row))
            first = f"{cell['runs'][0]['call_s']:.1f}" if cell["runs"] else "n/a"
            notes = {name: value for kind in cell.get("counters", {}).values() for name, value in kind.items()}
            rows.append([*row, first, cell.get("error", json.dumps(notes)[:300])])
    return table(f"batch | prompt | arm | {TIME_COLUMNS} | first call, s | torch.compile counted", rows)


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "environment": report_environment,
    "smoke": report_smoke,
    "exactness": report_exactness,
    "profile": report_profile,
    "static": report_static,
    "speed": report_speed,
}


def main() -> int:
    """Parse, run, print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, two cells and a few tests")
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=list(STEPS), metavar="STEP", help="default: all")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="test files of the step exactness")
    parser.add_argument("--seconds", type=float, default=570, metavar="S", help="time for all steps together")
    for name, kind in (("step", str), ("deadline", float), ("result_file", Path)):  # of a step's own process
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tests = args.tests or (EXACT[2:3] if args.tiny else EXACT)
    return run_here(args) if args.step else run_all(args)


if __name__ == "__main__":
    sys.exit(main())
