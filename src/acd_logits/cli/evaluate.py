"""`acd-logits evaluate`: measure harmless rate, over-refusal and fluency."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo_model import resolve_model_name
from ..evaluation.arms import ARMS
from ..evaluation.attacks import ATTACKS
from ..evaluation.benchmarks import KNOWN
from ..pairs.texts import MANUAL_TEXTS
from .command import CommandError, note, show, user_errors
from .loading import load_adapter, load_model, load_pair, pair_name
from .options import (
    add_adapter_argument,
    add_batch_argument,
    add_device_arguments,
    add_length_argument,
    add_model_argument,
    add_pair_arguments,
    add_speed_arguments,
    finite,
    not_negative,
    positive_int,
    threshold,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ..evaluation.benchmarks import Label
    from ..evaluation.comparison import Decoding
    from ..evaluation.harm import HarmClassifier
    from ..evaluation.judges import Judge
    from ..evaluation.results import Cell, ResultsFolder
    from ..pairs.distilled import DistilledPrompt
    from ..pairs.prompt_pair import PromptPair

SUMMARY = "measure harmless rate, over-refusal and fluency"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits evaluate`."""
    _add_folder_arguments(parser)

    model = parser.add_argument_group("model and prompt pair")
    add_model_argument(model)
    add_pair_arguments(model)
    add_adapter_argument(model)
    model.add_argument(
        "--transfer", action="store_true", help="accept a pair that was made for another model of this hidden size"
    )
    add_device_arguments(model)

    _add_cell_arguments(parser)

    judge = parser.add_argument_group("judge", "It says whether a response to a harmful request is harmless.")
    judge.add_argument(
        "--judge",
        default="keywords",
        help="judge by keywords, by harm:FOLDER of scripts/train_harm_judge.py, by classifier:ID of a Hugging Face "
        "classifier or guard, or by llm:NAME of an Inspect model such as llm:openai/gpt-4o (default: %(default)s)",
    )
    judge.add_argument(
        "--rejudge", type=Path, metavar="FOLDER", help="judge the responses in this folder anew, and ask nothing"
    )
    judge.add_argument("--judge_url", help="find the model of llm: at this address of an OpenAI-compatible server")
    judge.add_argument("--harmless_label", help="read this label of classifier: as harmless")
    parser.set_defaults(run=run)


def _add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="add the results to those in this folder"
    )
    parser.add_argument("--report_only", action="store_true", help="write the report of the folder again")
    parser.add_argument(
        "--compare", type=Path, metavar="FOLDER", help="show what changed since the older results in this folder"
    )
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="FOLDER",
        help="write a copy to share: it has the report and the verdicts, and no request or response",
    )
    parser.add_argument(
        "--draw_labels",
        type=positive_int,
        metavar="N",
        help="draw N responses into labels.jsonl, to label by hand; the report then says how far the judge agrees",
    )
    parser.add_argument(
        "--draw_harmful",
        action="store_true",
        help="draw from the responses to harmful requests, also from those under attack",
    )
    parser.add_argument(
        "--update_card",
        type=Path,
        metavar="FOLDER",
        help="write the rates into the config and the model card of the pair, or of the adapter, in this folder",
    )


def _add_cell_arguments(parser: argparse.ArgumentParser) -> None:
    cells = parser.add_argument_group("comparison", "Every arm answers every benchmark, at every strength.")
    cells.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help=f"compare some of {', '.join(ARMS)} (default: base oid, with a pair sp ap acd, with an adapter "
        "distilled, and with --rivals those in the folder)",
    )
    cells.add_argument(
        "--rivals",
        type=Path,
        metavar="FOLDER",
        help=f"take {', '.join(name for name, arm in ARMS.items() if arm.rival)} from this folder, which "
        "scripts/train_rivals.py writes",
    )
    cells.add_argument(
        "--alphas", nargs="+", type=finite, help="contrast with each of these strengths (default: the pair's)"
    )
    cells.add_argument(
        "--betas",
        nargs="+",
        type=threshold,
        help="contrast with each of these plausibility thresholds (default: the pair's)",
    )
    cells.add_argument(
        "--benchmarks",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"ask some of {', '.join(KNOWN)}; NAME=FILE takes a local copy (default: starter)",
    )
    for label, wanted in (("harmful", "should refuse"), ("safe", "should answer")):
        cells.add_argument(
            f"--{label}",
            nargs="+",
            default=[],
            metavar="FILE",
            help=f"ask requests of your own that a model {wanted}: FILE or Hub id, with :COLUMN if need be",
        )
    cells.add_argument(
        "--attacks",
        nargs="*",
        metavar="NAME",
        help=f"ask harmful requests also under these attacks, of {', '.join(ATTACKS)}; no name means all",
    )
    cells.add_argument(
        "--attack_files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="ask harmful requests also under the attack in each file: a suffix, or a template with {request}, a line",
    )
    cells.add_argument(
        "--attack_safe",
        action="store_true",
        help="ask benchmarks that hold safe requests only under the attacks, too",
    )
    cells.add_argument(
        "--begun_tokens",
        nargs="+",
        type=not_negative,
        default=[],
        metavar="N",
        help="ask harmful requests also with an answer that has begun, with N tokens of the arm base's own",
    )
    cells.add_argument("--limit", type=positive_int, help="draw this many requests of each kind from a benchmark")
    cells.add_argument("--seed", type=int, default=0, help="draw with this seed (default: %(default)s)")
    add_length_argument(cells, default=128)
    add_batch_argument(cells, default=16)
    add_speed_arguments(cells)


def run(args: argparse.Namespace) -> None:
    """Run the cells that the folder lacks, and write its report; with --compare, also what changed."""
    from ..evaluation import changes, labels, plots, report
    from ..evaluation.publish import publish
    from ..evaluation.results import ResultsFolder

    _check_folders(args)
    with user_errors(ImportError, OSError, ValueError):
        plots.require_matplotlib()
        older = ResultsFolder(args.compare) if args.compare else None
        results = ResultsFolder(args.output_dir) if args.report_only else None
    results = results or (_judge_again(args) if args.rejudge else _evaluate(args))
    with user_errors(OSError, ValueError):
        if args.update_card:
            _update_card(args.update_card, results)
        show(f"{report.write_report(results)}\n")
        if args.draw_labels:
            show(f"{labels.draw(results, args.draw_labels, args.seed, args.draw_harmful)}\n")
        if args.publish:
            show(f"{report.write_report(publish(results, args.publish))}\n")
        if older is not None:
            show(f"{changes.write_comparison(results, older)}\n")


def _update_card(folder: Path, results: ResultsFolder) -> None:
    """Write what was measured into the config and the card of the pair, or the adapter, in a folder."""
    from ..evaluation.summary import card_results, summarise
    from ..pairs.distilled import FACTS_NAME, DistilledPrompt
    from ..pairs.prompt_pair import PromptPair

    distilled = (folder / FACTS_NAME).is_file()
    kind, source = ("adapter", DistilledPrompt) if distilled else ("pair", PromptPair)
    old: Any = source.from_pretrained(folder)
    if old.digest != results.run["settings"].get(f"{kind}_digest"):
        raise ValueError(f"{results.path} was measured on another {kind} than the one in {folder}")
    rates = card_results(summarise(results))
    if distilled:
        DistilledPrompt(old.prompt, old.facts | {"results": rates}).save_pretrained(folder)
    else:
        config = dataclasses.replace(old.config, results=rates)
        PromptPair(old.safeguarding, old.adversarial, config).save_pretrained(folder)
    show(f"{folder}\n")


def _evaluate(args: argparse.Namespace) -> ResultsFolder:
    """Check everything that can be checked, then load the model and run the cells."""
    from ..evaluation import arms, benchmarks, comparison
    from ..evaluation.attacks import find_attacks
    from ..evaluation.results import ResultsFolder
    from ..evaluation.rival_folder import RivalFolder, check_scoring
    from ..pairs.distilled import DistilledPrompt

    _check_evaluation(args)
    learned = pair_name(args) != MANUAL_TEXTS
    names = args.arms or ["base", "oid", *["sp", "ap", "acd"] * learned, *["distilled"] * bool(args.adapter)]
    with user_errors(ImportError, OSError, RuntimeError, ValueError):
        folder = RivalFolder(args.rivals, args.model_name_or_path) if args.rivals else None
        names += folder.names if folder and not args.arms else []
        arms.check_arms(names, learned, has_adapter=bool(args.adapter), has_rivals=folder is not None)
        requests = [
            benchmarks.load_benchmark(spec, label, args.limit, args.seed) for spec, label in _benchmark_specs(args)
        ]
        check_scoring(names, requests)
        attacks = find_attacks(list(ATTACKS) if args.attacks == [] else args.attacks or [], args.attack_files)
        pair = load_pair(args)
        distilled = DistilledPrompt.from_pretrained(args.adapter) if args.adapter else None
        decoding = comparison.Decoding(args.max_new_tokens, args.batch_size, args.horizon, args.share_instruction_kv)
        harm = _load_harm(args)
        settings = _settings(args, pair, distilled, decoding) | _judge_settings(args, harm)
        results = ResultsFolder(args.output_dir, settings)
        results.register(requests, attacks, folder.digests(names) if folder else {})
        alpha, beta = (pair.alpha, pair.beta) if pair else (0.5, 0.1)
        direct = comparison.plan_cells(
            [benchmark.name for benchmark in requests], names, args.alphas or [alpha], args.betas or [beta]
        )
        attacked = comparison.plan_attacks(requests, direct, list(attacks), args.attack_safe)
        cells = direct + attacked + comparison.plan_depth(results, requests, direct, args.begun_tokens)
        make_judge = _find_judge(args, harm)
        rivals = folder.load(names, args.device, args.batch_size) if folder else {}
    model, tokenizer = load_model(args)
    with user_errors(ValueError):
        judge = make_judge(model, tokenizer)
    if pair:
        pair.check_chat_template(tokenizer)
    adapter = load_adapter(model, tokenizer, args.adapter, distilled) if distilled else None
    try:
        strength = {"alpha": alpha, "beta": beta}  # the pair's own, at which arms are compared
        results.start(comparison.run_facts(_command_line(), str(model.device)) | {"strength": strength})
        comparison.run_comparison(
            model.eval(),
            tokenizer,
            results,
            requests,
            cells,
            judge,
            pair,
            decoding,
            adapter=adapter,
            attacks=attacks,
            rivals=rivals,
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


def _check_folders(args: argparse.Namespace) -> None:
    if args.rejudge and args.report_only:
        raise CommandError("--rejudge writes new results: leave --report_only out")
    if args.draw_harmful and not args.draw_labels:
        raise CommandError("--draw_harmful is about --draw_labels N and needs it")


def _check_evaluation(args: argparse.Namespace) -> None:
    if args.transfer and args.pair in (None, MANUAL_TEXTS):
        raise CommandError("--transfer is about the pair and needs --pair")
    if args.judge_url and not args.judge.startswith("llm:"):
        raise CommandError("--judge_url needs --judge llm:NAME")
    if args.harmless_label and not args.judge.startswith("classifier:"):
        raise CommandError("--harmless_label needs --judge classifier:ID")
    if max(args.begun_tokens, default=0) > args.max_new_tokens:
        raise CommandError("--begun_tokens is more than an answer has: raise --max_new_tokens, or lower it")


def _settings(
    args: argparse.Namespace, pair: PromptPair | None, distilled: DistilledPrompt | None, decoding: Decoding
) -> dict[str, Any]:
    """What results depend on, apart from the cell; checks the pair against the model on the way."""
    from transformers import AutoConfig

    from ..pairs.fit import check_fit_unloaded

    path = resolve_model_name(args.model_name_or_path)
    config = AutoConfig.from_pretrained(path)
    foreign = check_fit_unloaded(pair.config, config, path, args.transfer) if pair else False
    return {
        "model": args.model_name_or_path,
        "model_revision": getattr(config, "_commit_hash", None),
        "dtype": args.dtype,
        "pair": pair_name(args) if pair else None,
        "pair_digest": pair.digest if pair else None,
        "adapter": args.adapter,
        "adapter_digest": distilled.digest if distilled else None,
        "transfer": foreign,
        **dataclasses.asdict(decoding),
    }


def _load_harm(args: argparse.Namespace) -> HarmClassifier | None:
    """The classifier of harm:FOLDER; `None` with any other judge."""
    from ..evaluation.harm import HarmClassifier

    kind, _, name = args.judge.partition(":")
    return HarmClassifier.load(Path(name), args.model_name_or_path) if kind == "harm" and name else None


def _judge_settings(args: argparse.Namespace, harm: HarmClassifier | None) -> dict[str, Any]:
    """What verdicts depend on."""
    return {
        "judge": args.judge,
        "judge_digest": harm.digest if harm else None,
        "judge_url": args.judge_url,
        "harmless_label": args.harmless_label,
    }


def _find_judge(args: argparse.Namespace, harm: HarmClassifier | None) -> Callable[..., Judge]:
    """A function that makes the judge from model and tokenizer; what can be checked without them is checked."""
    from ..evaluation import judges
    from ..evaluation.harm import HarmJudge

    kind, _, name = args.judge.partition(":")
    judge: Judge
    if harm:
        return lambda model, tokenizer: HarmJudge(harm, model, tokenizer)
    if args.judge == "keywords":
        judge = judges.KeywordJudge()
    elif kind == "classifier" and name:
        judge = judges.ClassifierJudge(name, args.harmless_label, args.batch_size, args.device)
    elif kind == "llm" and name:
        judge = judges.LLMJudge(name, args.judge_url)
    else:
        raise ValueError(f"there is no judge {args.judge!r}: choose keywords, harm:FOLDER, classifier:ID or llm:NAME")
    return lambda *_: judge


def _judge_again(args: argparse.Namespace) -> ResultsFolder:
    """Judge the responses of a folder anew, into another one."""
    from ..evaluation.comparison import run_facts
    from ..evaluation.rejudge import check_rejudging, judge_again
    from ..evaluation.results import ResultsFolder

    with user_errors(ImportError, OSError, ValueError):
        old = ResultsFolder(args.rejudge)
        harm, model_name = _load_harm(args), old.run["settings"]["model"]
        if harm and harm.model != model_name:
            raise ValueError(f"{args.rejudge} holds responses of {model_name}, and the harm judge reads {harm.model}")
        settings = old.run["settings"] | _judge_settings(args, harm)
        new = check_rejudging(old, args.output_dir, settings)
        make_judge = _find_judge(args, harm)
    model, tokenizer = load_model(args) if harm else (None, None)
    with user_errors(OSError, ValueError):
        judge = make_judge(model and model.eval(), tokenizer)
        facts = run_facts(_command_line(), str(model.device) if model else "cpu")
        last = old.run["runs"][-1]
        facts |= {name: last[name] for name in ("strength",) if name in last}
        judge_again(old, new, judge, facts, on_cell=_note_cell)
    return new


def _note_cell(cell: Cell) -> None:
    if not sys.stderr.isatty():  # where there is no progress bar
        strength = "" if cell.alpha is None else f" alpha {cell.alpha:g} beta {cell.beta:g}"
        under = f" under {cell.attack}" if cell.attack else ""
        begun = f" behind {cell.begun_tokens} tokens" if cell.begun_tokens else ""
        note(f"Finished {cell.arm}{strength}{under}{begun} on {cell.benchmark}")


def _command_line() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
