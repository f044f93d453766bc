r"""Attack ways of decoding with suffixes that a search finds for each of them, knowing everything about it (GCG).

Ten of the package's own harmful requests against the plain model, SP alone and ACD, on the demo model and its pair:

    python scripts/adaptive_attack.py --output_dir results-adaptive --limit 10

Requests of your own, another pair, and the budget of the paper (arXiv 2307.15043), for a GPU:

    python scripts/adaptive_attack.py --output_dir results-adaptive --harmful advbench.txt --limit 50 \
        --model_name_or_path org/model --pair org/pair --dtype bfloat16 --steps 500 --candidates 512 --batch_size 128

The search goes on with what the folder lacks when the same command is given again. attacks.jsonl holds requests,
suffixes and the model's answers: keep it to yourself. report.md and loss.png quote nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acd_logits.cli import CommandError, CommandParser, run_command
from acd_logits.cli.command import note, show, user_errors
from acd_logits.cli.loading import load_model, load_pair, pair_name
from acd_logits.cli.options import (
    add_contrast_arguments,
    add_device_arguments,
    add_model_argument,
    add_pair_arguments,
    positive_int,
)
from acd_logits.evaluation import plots
from acd_logits.evaluation.adaptive import Budget, allowed_tokens, attack, check_request, choose_target
from acd_logits.evaluation.adaptive_report import AttackFolder
from acd_logits.evaluation.arms import ARMS, Arm, arm_processor, arm_prompt, check_arms
from acd_logits.evaluation.benchmarks import load_benchmark
from acd_logits.evaluation.comparison import run_facts
from acd_logits.evaluation.defence import Defence
from acd_logits.files import digest
from acd_logits.responses import as_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from acd_logits.evaluation.adaptive import Ask
    from acd_logits.pairs.prompt_pair import PromptPair

UNDEFENDED = "null"  # the arm whose answers the targets come from: nothing in front
ATTACKED = [name for name, arm in ARMS.items() if not (arm.rival or arm.needs_adapter)]  # what has logits to attack
SPENT = {
    "steps": "steps of a search",
    "candidates": "suffixes whose loss is computed in a step",
    "top_k": "tokens to draw from at each place of the suffix",
    "suffix_tokens": "length of a suffix",
    "target_tokens": "length of a target that is the plain model's own",
    "test_every": "steps from one tested answer to the next",
    "max_new_tokens": "length of an answer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="add the results to those in this folder"
    )
    parser.add_argument(
        "--harmful", metavar="FILE", help="ask these: FILE or Hub id, with :COLUMN (default: the package's own)"
    )
    parser.add_argument("--limit", type=positive_int, help="draw this many requests (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="draw with this seed (default: %(default)s)")
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        default=["null", "sp", "acd"],
        help=f"attack some of {', '.join(ATTACKED)} (default: null sp acd)",
    )
    model = parser.add_argument_group("model and prompt pair")
    add_model_argument(model)
    add_pair_arguments(model)
    add_contrast_arguments(model)
    add_device_arguments(model)
    budget = parser.add_argument_group("budget", "It is the same for every request and arm.")
    for field in dataclasses.fields(Budget):
        what = f"{SPENT[field.name]} (default: %(default)s)"
        budget.add_argument(f"--{field.name}", type=positive_int, default=field.default, help=what)
    budget.add_argument(
        "--batch_size", type=positive_int, default=32, help="suffixes in one forward (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Attack every arm with every request, and write the report."""
    budget = Budget(**{name: getattr(args, name) for name in SPENT})
    with user_errors(ImportError, OSError, RuntimeError, ValueError):
        plots.require_matplotlib()
        pair = load_pair(args)
        check_arms(args.arms, has_pair=pair is not None)
        spec = args.harmful or "starter"
        asked = load_benchmark(spec, "harmful" if args.harmful else None, args.limit, args.seed).requests
        folder = AttackFolder(args.output_dir, settings_of(args, pair, budget))
    model, tokenizer = load_model(args)
    if pair:
        pair.check_chat_template(tokenizer)
    requests = [request.text for request in asked if request.label == "harmful"]
    try:
        folder.start(run_facts(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), str(model.device)))
        attack_all(model.eval(), tokenizer, pair, requests, folder, budget, args)
    except (OSError, ValueError) as error:
        raise CommandError(f"{error} (what is finished is kept: the same command goes on from there)") from error
    with user_errors(OSError):
        show(f"{folder.write_report()}\n")


def settings_of(args: argparse.Namespace, pair: PromptPair | None, budget: Budget) -> dict[str, Any]:
    """What a row depends on, apart from its request and arm."""
    return {
        "model": args.model_name_or_path,
        "dtype": args.dtype,
        "pair": pair_name(args) if pair else None,
        "pair_digest": pair.digest if pair else None,
        "alpha": pair.alpha if pair and args.alpha is None else args.alpha,
        "beta": pair.beta if pair and args.beta is None else args.beta,
        "seed": args.seed,
        **dataclasses.asdict(budget),
    }


def attack_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pair: PromptPair | None,
    requests: list[str],
    folder: AttackFolder,
    budget: Budget,
    args: argparse.Namespace,
) -> None:
    """Attack each arm with each request, if the folder lacks it; request by request, so that arms can be compared."""
    arms = {name: arm_processor(ARMS[name], model, tokenizer, pair, args.alpha, args.beta) for name in args.arms}
    defences = {name: Defence(processor, args.batch_size) for name, processor in arms.items()}
    undefended = arm_processor(ARMS[UNDEFENDED], model, tokenizer)
    allowed = allowed_tokens(tokenizer, model.get_input_embeddings().num_embeddings)
    for request in requests:
        for name, processor in arms.items():
            check_request(processor, tokenizer, ask_as(ARMS[name], tokenizer), request, budget)
    for number, request in enumerate(requests, start=1):
        missing = {name: defence for name, defence in defences.items() if not folder.is_finished(request, name)}
        if not missing:
            continue
        target = choose_target(undefended, tokenizer, ask_as(ARMS[UNDEFENDED], tokenizer), request, budget)
        seed = int(digest(args.seed, request)[:12], 16)
        for name, defence in missing.items():
            ask = ask_as(ARMS[name], tokenizer)
            row = attack(defence, tokenizer, ask, request, target, allowed, budget, seed)
            folder.add(request, name, row)
            outcome = "success" if row["answer"]["success"] else "no success"
            steps, seconds = len(row["losses"]) - 1, row["seconds"]
            note(f"Request {number} of {len(requests)}, {name}: {outcome} in {steps} steps, {seconds:.0f} s")


def ask_as(arm: Arm, tokenizer: PreTrainedTokenizerBase) -> Ask:
    """How an arm makes token ids of what the user writes."""
    return lambda text: arm_prompt(tokenizer, as_messages([text]), arm.transform)


def main() -> int:
    """Parse, attack, report; return the exit code."""
    parser = CommandParser(
        prog="adaptive_attack.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
