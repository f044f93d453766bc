"""The `acd-logits` command: compare answers with and without the safeguard, or chat with the safeguarded model.

A subcommand is a pair of functions: `add_<command>_arguments` declares its arguments, `run_<command>` does the work
and raises `CommandError` for what a user can mend. torch and transformers are imported by the functions that need
them, so that `--help` and usage errors take no time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .demo_model import DEMO_MODEL, DEMO_PAIR, resolve_model_name, resolve_pair_name
from .evaluation.arms import ARMS
from .evaluation.benchmarks import KNOWN
from .prompts import MANUAL_TEXTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from .evaluation.benchmarks import Label
    from .evaluation.judges import Judge
    from .evaluation.results import Cell, ResultsFolder
    from .logits_process import ACDLogitsProcessor
    from .prompt_pair import PromptPair


class CommandError(Exception):
    """A failure that the user can mend; its message is shown as one line, without a traceback."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports a usage error in one line."""

    # Builds, from the program's name, the parser that does the work: for one whose arguments take long to import
    delegate: Callable[[str], argparse.ArgumentParser] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: D102
        parse = self.delegate(self.prog).parse_known_args if self.delegate else super().parse_known_args
        return parse(args, namespace)

    def error(self, message: str) -> NoReturn:  # noqa: D102
        self.exit(2, f"{self.prog.split()[0]}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run the `acd-logits` command.

    Args:
        argv (`list[str]`, *optional*): the arguments; default: those of the process.

    Returns:
        `int`: the exit code.
    """
    parser = CommandParser(prog="acd-logits", description="Safer decoding for causal language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, summary, add_arguments in (
        ("generate", "answer prompts plainly and safeguarded, side by side", add_generate_arguments),
        ("chat", "talk with the safeguarded model", add_chat_arguments),
        ("anchors", "make the data that a prompt pair is trained on", add_anchors_arguments),
        ("evaluate", "measure harmless rate, over-refusal and fluency", add_evaluate_arguments),
        ("push", "upload a prompt pair to the Hugging Face Hub", add_push_arguments),
        ("export-vllm", "write a folder that vLLM serves with the contrast", add_export_vllm_arguments),
    ):
        add_arguments(commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))
    train = commands.add_parser("train", help="train a prompt pair for a model", add_help=False)
    train.delegate = train_parser
    return run_command(parser, argv)


def run_command(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """Parse the arguments, run the command they name and turn its failures into an exit code.

    Args:
        parser (`argparse.ArgumentParser`): sets `run`, a function of the parsed arguments.
        argv (`list[str]`, *optional*): the arguments; default: those of the process.

    Returns:
        `int`: 0, 1 for a `CommandError`, 130 after Ctrl-C, 141 if the reader of the output went away.
    """
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold characters that an old terminal or a Windows pipe cannot encode.
        sys.stdout.reconfigure(errors="replace")
    try:
        args.run(args)
        sys.stdout.flush()
    except CommandError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits generate`."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='a prompt; "-", or none at all, reads stdin')
    parser.add_argument("--input_file", type=Path, metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt and line")
    _add_model_arguments(parser)
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> None:
    """Answer every prompt plainly and safeguarded, and print both answers."""
    prompts = _read_prompts(args)
    assistant = _load_assistant(args)
    for prompt in prompts:
        if args.json:
            _print_json(assistant, prompt, args)
        elif _terminal_shows_columns():
            _print_columns(assistant, prompt)
        else:
            _print_blocks(assistant, prompt)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits chat`."""
    _add_model_arguments(parser)
    parser.set_defaults(run=run_chat)


def run_chat(args: argparse.Namespace) -> None:
    """Hold a conversation with the safeguarded model: one turn per line of stdin, until `/exit` or its end."""
    assistant = _load_assistant(args, needs_chat_template=True)
    if sys.stdin.isatty():
        _note("/reset starts a new conversation, /exit quits.")
    conversation: list[dict[str, str]] = []
    for line in _read_turns():
        if line == "/exit":
            break
        if line == "/reset":
            conversation = []
        elif line:
            conversation.append({"role": "user", "content": line})
            # The whole conversation is read again in each turn. A kept cache would save that time, but chat templates
            # are free to render earlier turns differently later (some drop the reasoning), and it would be stale then.
            answer = assistant.answer(conversation, safeguarded=True, on_text=_show)
            conversation.append({"role": "assistant", "content": answer})
            _show("\n\n")


def add_anchors_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits anchors`."""
    parser.add_argument("--output_file", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    parser.add_argument("--seed", type=int, default=0, help="makes the result repeatable (default: %(default)s)")
    _add_sampling_arguments(parser)

    generation = parser.add_argument_group(
        "generating instructions", "with a model behind an OpenAI-compatible endpoint: OPENAI_BASE_URL, OPENAI_API_KEY"
    )
    positive_int = _checked(int, lambda value: value >= 1, "a whole number of at least 1")
    generation.add_argument("--generate", type=positive_int, metavar="N", help="make N instructions, no responses")
    generation.add_argument("--kind", choices=["harmful", "near-miss", "safe"], help="of the instructions")
    generation.add_argument("--generator", metavar="MODEL", help="the model's name at the endpoint")
    generation.add_argument("--topic", help="what they are about (default: the package's categories in turn)")
    generation.add_argument("--language", help="such as German (default: left to the model)")
    generation.add_argument("--existing", nargs="+", metavar="FILE", help="JSONL of instructions not to come near to")
    parser.set_defaults(run=run_anchors)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    names = ["safe", "opposite", "null"]  # anchors.SYSTEM_PROMPTS, whose module takes long to import
    positive_int = _checked(int, lambda value: value >= 1, "a whole number of at least 1")

    sampling = parser.add_argument_group("sampling responses from the target model")
    sampling.add_argument("--model_name_or_path", default=DEMO_MODEL, help="folder or Hub id (default: %(default)s)")
    sampling.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one)")
    sampling.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    sampling.add_argument("--instructions", nargs="+", metavar="FILE", help="JSONL (default: the package's own)")
    sampling.add_argument("--refusals", metavar="FILE", help="JSONL (default: the package's own)")
    sampling.add_argument(
        "--refusal_opening",
        metavar="TEXT",
        help="a sentence that takes the place of each of their first ones (default: none)",
    )
    sampling.add_argument(
        "--system_prompts",
        nargs="+",
        choices=names,
        default=names,
        help="answer every instruction under each (default: all; a model that ignores its system prompt needs null)",
    )
    sampling.add_argument(
        "--per_instruction",
        type=positive_int,
        default=1,
        help="refusals and compliant responses wanted for each harmful instruction (default: %(default)s)",
    )
    sampling.add_argument("--batch_size", type=positive_int, default=32, help="(default: %(default)s)")
    sampling.add_argument(
        "--max_new_tokens", type=positive_int, default=64, help="length of a response (default: %(default)s)"
    )
    sampling.add_argument(
        "--temperature",
        type=_checked(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
        default=0.7,
        help="0 takes the likeliest token (default: %(default)s)",
    )
    sampling.add_argument(
        "--top_p",
        type=_checked(float, lambda value: 0 < value <= 1, "above 0 and at most 1"),
        default=0.9,
        help="sample from the likeliest tokens with this total probability (default: %(default)s)",
    )


def run_anchors(args: argparse.Namespace) -> None:
    """Sample an anchor set from the target model or, with --generate, make instructions for one."""
    for name in ("kind", "generator", "topic", "language", "existing"):
        if args.generate is None and getattr(args, name) is not None:
            raise CommandError(f"--{name} needs --generate")
    if args.generate is None:
        _sample_anchors(args)
    elif args.kind is None or args.generator is None:
        raise CommandError("--generate needs --kind and --generator")
    else:
        _generate_instructions(args)


def _sample_anchors(args: argparse.Namespace) -> None:
    from . import anchors

    with _user_errors(OSError, ValueError):
        anchors.check_new_file(args.output_file)
        instructions = anchors.load_instructions(args.instructions)
        refusals = anchors.load_refusals(args.refusals, args.refusal_opening)
    settings = anchors.SamplingSettings(
        system_prompts=tuple(dict.fromkeys(args.system_prompts)),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    model, tokenizer = _load_model(args)
    with _user_errors(OSError, ValueError):
        rows = anchors.build_anchors(
            model,
            tokenizer,
            args.output_file,
            instructions=instructions,
            refusals=refusals,
            settings=settings,
            per_instruction=args.per_instruction,
        )
    counts = Counter(row["split"] for row in rows)
    from_bank = sum(row["source"] == "refusal_bank" for row in rows)
    numbers = ", ".join(f"{split} {counts[split]}" for split in anchors.SPLITS)
    _show(f"{args.output_file}: {numbers} ({from_bank} of D_HR from the refusal bank)\n")


def _generate_instructions(args: argparse.Namespace) -> None:
    from . import anchors

    with _user_errors(ImportError, OSError, ValueError):
        known = [row["instruction"] for row in anchors.load_instructions(args.existing)] if args.existing else []
        generated = anchors.generate_instructions(
            args.generate,
            {"near-miss": "near_miss", "safe": "everyday"}.get(args.kind, args.kind),
            args.generator,
            topic=args.topic,
            language=args.language,
            existing=known,
            seed=args.seed,
        )
        number = anchors.write_generated(args.output_file, generated)
    if not number:
        raise CommandError(f"{args.generator} gave no instruction that could be used")
    _show(f"{args.output_file}: {number} instructions\n")


def train_parser(prog: str, description: str = "Train a prompt pair for a model.") -> CommandParser:
    """The parser of `acd-logits train`: our arguments, and those of transformers' `TrainingArguments`."""
    from transformers import HfArgumentParser

    from .training import OPOArguments, OPOTrainingArguments

    class TrainParser(HfArgumentParser, CommandParser):
        def __init__(self, **kwargs: Any) -> None:
            HfArgumentParser.__init__(self, (OPOArguments, OPOTrainingArguments), **kwargs)

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    usage = "%(prog)s --train_file FILE [options]"
    parser = TrainParser(prog=prog, usage=usage, description=description, formatter_class=Formatter)
    parser.add_argument("--no_chat", action="store_false", dest="chat", default=None, help=argparse.SUPPRESS)
    parser.set_defaults(run=run_train)
    return parser


def run_train(args: argparse.Namespace) -> None:
    """Train SP and AP on an anchor set, save the pair and, if asked to, push it to a private repository."""
    from transformers import HfArgumentParser

    from . import training

    if args.push_to_hub and not args.hub_model_id:
        raise CommandError("--push_to_hub needs --hub_model_id")
    if args.push_to_hub and args.hub_private_repo is False:
        raise CommandError("a pair is pushed to a private repository: publish it with acd-logits push --public")
    with _user_errors(ImportError, OSError, RuntimeError, ValueError):
        options, arguments = HfArgumentParser((training.OPOArguments, training.OPOTrainingArguments)).parse_dict(
            vars(args), allow_extra_keys=True
        )
        path, tokenizer, pairs = training.prepare(options, arguments)
        model = training.load_model(path, options, arguments)
    with _user_errors(FloatingPointError):
        pair = training.train_pair(model, tokenizer, pairs, options, arguments)
    if arguments.process_index == 0:
        _report_pair(pair, arguments)


def _report_pair(pair: PromptPair, arguments: TrainingArguments) -> None:
    from .training import TERMS

    for stream, losses in pair.config.training["held_out_loss"].items():
        if losses:
            first, kept = losses.get("first", {}), losses["kept"]
            numbers = ", ".join(f"{term} {first.get(term, math.nan):.3f} -> {kept[term]:.3f}" for term in TERMS)
            _show(f"{stream}, held out, before -> after {kept['epoch']:g} epochs: {numbers}\n")
    _show(f"{arguments.output_dir}: {len(pair.safeguarding)} and {len(pair.adversarial)} virtual tokens\n")
    if arguments.push_to_hub:
        with _user_errors(OSError, ValueError):
            revision, token = arguments.hub_revision, arguments.hub_token
            _show(f"{pair.push_to_hub(arguments.hub_model_id, revision=revision, token=token).commit_url}\n")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits evaluate`."""
    positive_int = _checked(int, lambda value: value >= 1, "a whole number of at least 1")
    strength = _checked(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
    share = _checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")

    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="of the results; grows")
    parser.add_argument("--report_only", action="store_true", help="make the report of a folder again")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="older results: show what changed since then")
    parser.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="a copy to share: report and verdicts, no request or response"
    )
    parser.add_argument(
        "--draw_labels",
        type=positive_int,
        metavar="N",
        help="draw N responses into labels.jsonl, to label by hand; the report then says how far the judge agrees",
    )
    parser.add_argument(
        "--update_card",
        type=Path,
        metavar="FOLDER",
        help="write the rates into the config and the model card of the pair in this folder",
    )

    model = parser.add_argument_group("model and prompt pair")
    model.add_argument("--model_name_or_path", default=DEMO_MODEL, help="folder or Hub id (default: %(default)s)")
    _add_pair_argument(model)
    model.add_argument("--revision", help="branch, tag or commit of the pair on the Hub")
    model.add_argument("--transfer", action="store_true", help="measure a pair of another model of this hidden size")
    model.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one)")
    model.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])

    cells = parser.add_argument_group("what is compared")
    cells.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help=f"some of {', '.join(ARMS)} (default: base oid, and with a pair sp ap acd)",
    )
    cells.add_argument("--alphas", nargs="+", type=strength, help="strengths of the contrasts (default: the pair's)")
    cells.add_argument("--betas", nargs="+", type=share, help="plausibility thresholds (default: the pair's)")
    cells.add_argument(
        "--benchmarks",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"some of {', '.join(KNOWN)}; NAME=FILE takes a local copy (default: starter)",
    )
    for label, wanted in (("harmful", "should refuse"), ("safe", "should answer")):
        cells.add_argument(
            f"--{label}",
            nargs="+",
            default=[],
            metavar="FILE",
            help=f"requests of your own that a model {wanted}: FILE or Hub id, with :COLUMN if need be",
        )
    cells.add_argument("--limit", type=positive_int, help="draw this many requests of each kind from a benchmark")
    cells.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    cells.add_argument(
        "--max_new_tokens", type=positive_int, default=128, help="length of a response (default: %(default)s)"
    )
    cells.add_argument("--batch_size", type=positive_int, default=16, help="(default: %(default)s)")
    _add_speed_arguments(cells)

    judge = parser.add_argument_group("who judges whether a response to a harmful request is harmless")
    judge.add_argument(
        "--judge",
        default="keywords",
        help="keywords, classifier:ID of a Hugging Face classifier or guard, or llm:NAME of an Inspect model such as "
        "llm:openai/gpt-4o (default: %(default)s)",
    )
    judge.add_argument("--judge_url", help="address of an OpenAI-compatible server, for llm:")
    judge.add_argument("--harmless_label", help="the label that means harmless, for classifier:")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> None:
    """Run the cells that the folder lacks, and write its report; with --compare, also what changed."""
    from .evaluation import labels, plots, report
    from .evaluation.publish import publish
    from .evaluation.results import ResultsFolder
    from .files import write_text

    with _user_errors(ImportError, OSError, ValueError):
        plots.require_matplotlib()
        older = ResultsFolder(args.compare) if args.compare else None
        results = ResultsFolder(args.output_dir) if args.report_only else None
    results = results or _evaluate(args)
    with _user_errors(OSError, ValueError):
        if args.update_card:
            _update_card(args.update_card, results)
        _show(f"{report.write_report(results)}\n")
        if args.draw_labels:
            _show(f"{labels.draw(results, args.draw_labels, args.seed)}\n")
        if args.publish:
            _show(f"{report.write_report(publish(results, args.publish))}\n")
        if older is not None:
            write_text(results.path / report.COMPARISON_NAME, report.render_comparison(results, older))
            _show(f"{results.path / report.COMPARISON_NAME}\n")


def _update_card(folder: Path, results: ResultsFolder) -> None:
    """Write what was measured into the config and the card of the pair in a folder."""
    from .evaluation import report
    from .prompt_pair import PromptPair

    pair = PromptPair.from_pretrained(folder)
    if pair.digest != results.run["settings"]["pair_digest"]:
        raise ValueError(f"{results.path} was measured on another pair than the one in {folder}")
    config = dataclasses.replace(pair.config, results=report.card_results(report.summarise(results)))
    PromptPair(pair.safeguarding, pair.adversarial, config).save_pretrained(folder)
    _show(f"{folder}\n")


def _evaluate(args: argparse.Namespace) -> ResultsFolder:
    """Check everything that can be checked, then load the model and run the cells."""
    from .evaluation import arms, benchmarks, comparison
    from .evaluation.results import ResultsFolder

    _check_evaluation(args)
    learned = _pair_name(args) != MANUAL_TEXTS
    names = args.arms or ["base", "oid", *(["sp", "ap", "acd"] if learned else [])]
    with _user_errors(ImportError, OSError, RuntimeError, ValueError):
        arms.check_arms(names, has_pair=learned)
        requests = [
            benchmarks.load_benchmark(spec, label, args.limit, args.seed) for spec, label in _benchmark_specs(args)
        ]
        pair = _load_pair(args)
        settings = _evaluation_settings(args, pair)
        results = ResultsFolder(args.output_dir, settings)
        results.register(requests)
        judge = _make_judge(args)
    model, tokenizer = _load_model(args)
    if pair:
        pair.check_chat_template(tokenizer)
    alpha, beta = (pair.alpha, pair.beta) if pair else (0.5, 0.1)
    cells = comparison.plan_cells(
        [benchmark.name for benchmark in requests], names, args.alphas or [alpha], args.betas or [beta]
    )
    try:
        results.start(comparison.run_facts(_command_line(), str(model.device)))
        comparison.run_comparison(
            model.eval(),
            tokenizer,
            results,
            requests,
            cells,
            judge,
            pair,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            horizon=args.horizon,
            share_instruction_kv=args.share_instruction_kv,
            on_cell=_note_cell,
        )
    except (OSError, ValueError) as error:
        raise CommandError(f"{error} (what is finished is kept: the same command goes on from there)") from error
    return results


def _benchmark_specs(args: argparse.Namespace) -> list[tuple[str, Label | None]]:
    specs: list[tuple[str, Label | None]] = [(spec, None) for spec in args.benchmarks]
    specs += [(spec, "harmful") for spec in args.harmful]
    specs += [(spec, "safe") for spec in args.safe]
    return specs or [("starter", None)]


def _check_evaluation(args: argparse.Namespace) -> None:
    if args.transfer and args.pair in (None, MANUAL_TEXTS):
        raise CommandError("--transfer is about the pair and needs --pair")
    if args.judge_url and not args.judge.startswith("llm:"):
        raise CommandError("--judge_url needs --judge llm:NAME")
    if args.harmless_label and not args.judge.startswith("classifier:"):
        raise CommandError("--harmless_label needs --judge classifier:ID")


def _evaluation_settings(args: argparse.Namespace, pair: PromptPair | None) -> dict[str, Any]:
    """What results depend on, apart from the cell; checks the pair against the model on the way."""
    from transformers import AutoConfig

    from .evaluation import comparison

    path = resolve_model_name(args.model_name_or_path)
    config = AutoConfig.from_pretrained(path)
    foreign = comparison.check_pair(pair, config, path, args.transfer) if pair else False
    return {
        "model": args.model_name_or_path,
        "model_revision": getattr(config, "_commit_hash", None),
        "dtype": args.dtype,
        "pair": _pair_name(args) if pair else None,
        "pair_digest": pair.digest if pair else None,
        "transfer": foreign,
        "judge": args.judge,
        "judge_url": args.judge_url,
        "harmless_label": args.harmless_label,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "horizon": args.horizon,
        "share_instruction_kv": args.share_instruction_kv,
    }


def _make_judge(args: argparse.Namespace) -> Judge:
    from .evaluation import judges

    kind, _, name = args.judge.partition(":")
    if args.judge == "keywords":
        return judges.KeywordJudge()
    if kind == "classifier" and name:
        return judges.ClassifierJudge(name, args.harmless_label, args.batch_size, args.device)
    if kind == "llm" and name:
        return judges.LLMJudge(name, args.judge_url)
    raise ValueError(f"there is no judge {args.judge!r}: choose keywords, classifier:ID or llm:NAME")


def _note_cell(cell: Cell) -> None:
    if not sys.stderr.isatty():  # where there is no progress bar
        strength = "" if cell.alpha is None else f" alpha {cell.alpha:g} beta {cell.beta:g}"
        _note(f"Finished {cell.arm}{strength} on {cell.benchmark}")


def _command_line() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits push`."""
    parser.add_argument("--pair", type=Path, required=True, metavar="FOLDER", help="the saved pair")
    parser.add_argument("--hub_model_id", required=True, metavar="ORG/NAME", help="its id; made if missing")
    parser.add_argument(
        "--public",
        action="store_true",
        help="let anyone read it; the adversarial prompt is a jailbreak for its model (default: private)",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if missing (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request with the commit")
    parser.add_argument("--commit_message", default="Upload prompt pair", metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--license", metavar="ID", help="such as apache-2.0, for the model card (default: none named)")
    parser.add_argument("--token", help="(default: HF_TOKEN, or the one stored by hf auth login)")
    parser.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> None:
    """Upload a saved pair, and the README.md of its folder if that is the user's own."""
    from transformers.utils import logging

    from .model_card import own_card
    from .prompt_pair import PromptPair

    if not args.pair.is_dir():
        raise CommandError(f"{args.pair} is not a folder")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with _user_errors(OSError, ValueError):
        commit = PromptPair.from_pretrained(args.pair).push_to_hub(
            args.hub_model_id,
            private=not args.public,
            revision=args.revision,
            commit_message=args.commit_message,
            token=args.token,
            create_pr=args.create_pr,
            license=args.license,
            model_card=own_card(args.pair),
        )
    _show(f"{commit.pr_url or commit.commit_url}\n")


def _add_pair_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--pair",
        help=f"folder or Hub id of a learned prompt pair, or {MANUAL_TEXTS} for the two manual prompts (default: "
        f"{DEMO_PAIR}, the demo model's own; {MANUAL_TEXTS} with any other model)",
    )


def _add_speed_arguments(group: argparse._ArgumentGroup) -> None:
    positive_int = _checked(int, lambda value: value >= 1, "a whole number of at least 1")
    group.add_argument("--horizon", type=positive_int, help="contrast only so many new tokens (default: all)")
    group.add_argument(
        "--share_instruction_kv",
        action=argparse.BooleanOptionalAction,
        help="keep one copy of the prompt's keys and values for both streams (default: as the pair was trained)",
    )


def add_export_vllm_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits export-vllm`."""
    parser.add_argument("--model_name_or_path", default=DEMO_MODEL, help="folder or Hub id (default: %(default)s)")
    _add_pair_argument(parser)
    parser.add_argument("--revision", help="branch, tag or commit of the pair on the Hub")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="to write; must not exist")
    _add_contrast_arguments(parser)
    parser.set_defaults(run=run_export_vllm)


def run_export_vllm(args: argparse.Namespace) -> None:
    """Write a folder for vLLM: the model's files, linked, the prompt pair, and a tokenizer that makes room for it."""
    if args.output_dir.exists():
        raise CommandError(f"{args.output_dir} exists: choose a new folder")
    from transformers.utils import logging

    from .vllm.export import export

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with _user_errors(ImportError, OSError, RuntimeError, ValueError):
        pair = _load_pair(args)
        model_path = resolve_model_name(args.model_name_or_path)
        export(model_path, args.output_dir, pair, alpha=args.alpha, beta=args.beta)
    _show(f"{args.output_dir}\n")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    positive_int = _checked(int, lambda value: value >= 1, "a whole number of at least 1")

    model = parser.add_argument_group("model and prompt pair")
    model.add_argument("--model_name_or_path", default=DEMO_MODEL, help="folder or Hub id (default: %(default)s)")
    _add_pair_argument(model)
    model.add_argument("--revision", help="branch, tag or commit of the pair on the Hub")
    model.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one)")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default: %(default)s, as the model was saved)",
    )

    decoding = parser.add_argument_group("decoding")
    _add_contrast_arguments(decoding)
    _add_speed_arguments(decoding)
    decoding.add_argument(
        "--max_new_tokens", type=positive_int, default=128, help="length of an answer (default: %(default)s)"
    )
    decoding.add_argument("--do_sample", action="store_true", help="sample instead of taking the likeliest token")
    decoding.add_argument(
        "--temperature",
        type=_checked(float, lambda value: 0 < value < math.inf, "a finite number above 0"),
        help="of sampling (default: the model's)",
    )
    decoding.add_argument(
        "--top_p",
        type=_checked(float, lambda value: 0 < value <= 1, "above 0 and at most 1"),
        help="sample from the likeliest tokens with this total probability (default: the model's)",
    )
    decoding.add_argument("--seed", type=int, help="makes sampling repeatable")


def _add_contrast_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--alpha",
        type=_checked(float, lambda value: value >= 0 and math.isfinite(value), "a finite number of at least 0"),
        help="strength of the contrast; 0 is the safeguarding prompt alone (default: the pair's)",
    )
    group.add_argument(
        "--beta",
        type=_checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        help="keep tokens with at least this share of the top probability (default: the pair's)",
    )


def _checked(
    convert: type[int] | type[float], accepts: Callable[[float], bool], wanted: str
) -> Callable[[str], float]:
    """Make an argparse type for a number in a range."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if accepts(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")

    return parse


def _read_prompts(args: argparse.Namespace) -> list[str]:
    if args.input_file and args.prompts:
        raise CommandError("give the prompts as arguments or with --input_file, not both")
    if args.input_file:
        with _user_errors(OSError, UnicodeError), args.input_file.open(encoding="utf-8") as file:
            prompts = [line.rstrip("\n") for line in file if line.strip()]
        if not prompts:
            raise CommandError(f"{args.input_file} holds no prompt")
        return prompts
    if not args.prompts and sys.stdin.isatty():
        raise CommandError("no prompt: give one as an argument, with --input_file or on stdin")
    with _user_errors(UnicodeError):
        prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in args.prompts or ["-"]]
    if not all(prompt.strip() for prompt in prompts):
        raise CommandError("the prompt is empty")
    return prompts


def _read_turns() -> Iterator[str]:
    """Yield the user's lines, with a prompt and line editing where stdin is a terminal."""
    if not sys.stdin.isatty():
        with _user_errors(UnicodeError):
            yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # absent on Windows, whose console edits lines by itself
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            _show("\n")
            return
        yield line.strip()


@contextlib.contextmanager
def _user_errors(*types: type[Exception]) -> Iterator[None]:
    """Report these exceptions as the user's: those of a step that can only fail because of its input."""
    try:
        yield
    except types as error:
        # Messages of transformers run over several lines, and one of them lists every model class.
        raise CommandError(textwrap.shorten(str(error), 500, placeholder=" ...")) from error


@dataclass(frozen=True)
class _Assistant:
    """A loaded model and what it generates with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    acd: ACDLogitsProcessor
    alpha: float
    beta: float
    seed: int | None
    generation_settings: dict[str, Any]

    def answer(
        self,
        conversation: list[dict[str, str]],
        *,
        safeguarded: bool,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Generate the next turn; `on_text` receives it piece by piece, without control characters."""
        import torch

        inputs = self._encode(conversation)
        if self.seed is not None:
            # Before each answer: the plain and the safeguarded one draw the same random numbers, and an answer does
            # not depend on the prompts before it.
            torch.manual_seed(self.seed)
        tokens = self.model.generate(
            **inputs,
            **self.generation_settings,
            logits_processor=[self.acd] if safeguarded else [],
            streamer=_streamer(self.tokenizer, on_text) if on_text else None,
        )
        return self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _encode(self, conversation: list[dict[str, str]]) -> dict[str, Any]:
        if self.tokenizer.chat_template:
            encoded = self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = self.tokenizer(conversation[-1]["content"], return_tensors="pt")
        # Some tokenizers add token_type_ids, which most causal models refuse.
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


def _load_assistant(args: argparse.Namespace, *, needs_chat_template: bool = False) -> _Assistant:
    """Load pair, tokenizer and model, in this order: what is quickly found to be wrong comes first."""
    _check_combinations(args)

    from .logits_process import ACDLogitsProcessor
    from .prompt_pair import PromptPair

    with _user_errors(OSError, ValueError):
        pair = _load_pair(args)
    model, tokenizer = _load_model(args, needs_chat_template=needs_chat_template)
    with _user_errors(ValueError):
        pair = pair or PromptPair.from_text(model, tokenizer)
        pair.check_chat_template(tokenizer)
        acd = ACDLogitsProcessor(
            model,
            pair,
            alpha=args.alpha,
            beta=args.beta,
            horizon=args.horizon,
            share_instruction_kv=args.share_instruction_kv,
        )
    return _Assistant(
        model,
        tokenizer,
        acd,
        alpha=pair.alpha if args.alpha is None else args.alpha,
        beta=pair.beta if args.beta is None else args.beta,
        seed=args.seed,
        generation_settings=_generation_settings(args, tokenizer),
    )


def _pair_name(args: argparse.Namespace) -> str:
    """The pair that is asked for, or the demo model's own, or for any other model the manual texts."""
    if args.pair is not None:
        return args.pair
    return DEMO_PAIR if args.model_name_or_path == DEMO_MODEL else MANUAL_TEXTS


def _load_pair(args: argparse.Namespace) -> PromptPair | None:
    """Load the learned pair; `None` for the manual texts."""
    from .prompt_pair import PromptPair

    if args.revision and args.pair in (None, MANUAL_TEXTS):
        raise ValueError("--revision is the pair's and needs --pair")
    name = _pair_name(args)
    if not name:
        raise ValueError(f"--pair is empty: name a folder or a Hub id, or {MANUAL_TEXTS} for the manual prompts")
    if name == MANUAL_TEXTS:
        return None
    return PromptPair.from_pretrained(resolve_pair_name(name), revision=args.revision)


def _load_model(
    args: argparse.Namespace, *, needs_chat_template: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _user_errors(RuntimeError, AssertionError):
        torch.empty(0, device=device)
    if sys.stderr.isatty():
        _note(f"Loading {args.model_name_or_path} ...")
    with _user_errors(ImportError, OSError, RuntimeError):
        model_path = resolve_model_name(args.model_name_or_path)
    with _user_errors(ImportError, OSError, ValueError):
        AutoConfig.from_pretrained(model_path)  # says plainly if there is no such model; the tokenizer does not
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    if needs_chat_template and not tokenizer.chat_template:
        raise CommandError(f"{args.model_name_or_path} has no chat template")
    with _user_errors(ImportError, OSError, ValueError):
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=args.dtype)
    return model.to(device), tokenizer


def _check_combinations(args: argparse.Namespace) -> None:
    if not args.do_sample and (args.temperature is not None or args.top_p is not None):
        raise CommandError("--temperature and --top_p need --do_sample")


def _generation_settings(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "do_sample", "temperature", "top_p")}
    # One row needs no padding; generate() would say in every call that it chose the end token for it.
    settings["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {name: value for name, value in settings.items() if value is not None}


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class CallbackStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            # Without control characters, a model cannot send commands to the terminal.
            on_text(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text))

    return CallbackStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _user_turn(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _labels(assistant: _Assistant) -> tuple[str, str]:
    return "Plain", f"Safeguarded (alpha {assistant.alpha:g}, beta {assistant.beta:g})"


def _print_json(assistant: _Assistant, prompt: str, args: argparse.Namespace) -> None:
    record = {
        "prompt": prompt,
        "plain": assistant.answer(_user_turn(prompt), safeguarded=False),
        "safeguarded": assistant.answer(_user_turn(prompt), safeguarded=True),
        "model": args.model_name_or_path,
        "pair": _pair_name(args),
        "alpha": assistant.alpha,
        "beta": assistant.beta,
    }
    _show(json.dumps(record) + "\n")


def _print_blocks(assistant: _Assistant, prompt: str) -> None:
    _show(f"Prompt: {prompt}\n\n")
    for safeguarded, label in enumerate(_labels(assistant)):
        _show(f"{label}:\n")
        assistant.answer(_user_turn(prompt), safeguarded=bool(safeguarded), on_text=_show)
        _show("\n\n")


def _terminal_shows_columns() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and shutil.get_terminal_size().columns >= 80


def _print_columns(assistant: _Assistant, prompt: str) -> None:
    """Stream the plain answer into the left column, then the safeguarded one into the right."""
    headings = _side_by_side(*_labels(assistant), shutil.get_terminal_size().columns)
    _show("\n".join([f"Prompt: {prompt}", "", *headings, ""]))
    texts = ["", ""]
    rows = 0

    def draw(lines: list[str]) -> None:
        nonlocal rows
        up = f"\x1b[{rows}F" if rows else ""
        _show(up + "\x1b[J" + "".join(line + "\n" for line in lines))
        rows = len(lines)

    for side in (0, 1):

        def add(text: str, side: int = side) -> None:
            texts[side] += text
            width, height = shutil.get_terminal_size()
            # The cursor cannot go back to what has left the screen: show as much as fits, down to the new text.
            end = max(len(_side_by_side(texts[side], "", width)), height - 1)
            draw(_side_by_side(texts[0], texts[1], width)[max(0, end - (height - 1)) : end])

        assistant.answer(_user_turn(prompt), safeguarded=side == 1, on_text=add)
    draw([*_side_by_side(texts[0], texts[1], shutil.get_terminal_size().columns), ""])


def _side_by_side(left: str, right: str, width: int) -> list[str]:
    """Set two texts in two columns, in lines that a terminal of this width does not break."""
    column = (width - 5) // 2
    rows = itertools.zip_longest(_wrap(left, column), _wrap(right, column), fillvalue="")
    return [f"{row[0]:<{column}} | {row[1]}".rstrip().replace("\0", "") for row in rows]


def _wrap(text: str, column: int) -> list[str]:
    # Chinese characters and emoji fill two cells: a NUL after each makes it count as two until the line is printed.
    # A cut between the two makes a line one cell too long, which the columns leave room for.
    cells = "".join(c + "\0" if unicodedata.east_asian_width(c) in "WF" else c for c in text)
    return [row for line in cells.strip("\n").split("\n") for row in textwrap.wrap(line, column) or [""]]


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
