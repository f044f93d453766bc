"""`acd-logits anchors`: make the data that a prompt pair is trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .command import CommandError, show, user_errors
from .loading import load_model
from .options import (
    add_batch_argument,
    add_device_arguments,
    add_length_argument,
    add_model_argument,
    finite,
    positive_int,
    share,
)

if TYPE_CHECKING:
    import argparse

SUMMARY = "make the data that a prompt pair is trained on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `acd-logits anchors`."""
    parser.add_argument("--output_file", type=Path, required=True, metavar="FILE", help="write this JSONL file")
    parser.add_argument(
        "--seed", type=int, default=0, help="make the result repeatable with this seed (default: %(default)s)"
    )
    _add_sampling_arguments(parser)

    generation = parser.add_argument_group(
        "generating instructions",
        "A model writes them, behind the OpenAI-compatible endpoint that OPENAI_BASE_URL and OPENAI_API_KEY name.",
    )
    generation.add_argument("--generate", type=positive_int, metavar="N", help="make N instructions, and no responses")
    generation.add_argument("--kind", choices=["harmful", "near-miss", "safe"], help="make instructions of this kind")
    generation.add_argument("--generator", metavar="MODEL", help="ask the model of this name at the endpoint")
    generation.add_argument("--topic", help="ask about this topic (default: the package's categories in turn)")
    generation.add_argument("--language", help="ask in this language, such as German (default: left to the model)")
    generation.add_argument(
        "--existing", nargs="+", metavar="FILE", help="stay away from the instructions in these JSONL files"
    )
    parser.set_defaults(run=run)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    names = ["safe", "opposite", "null"]  # anchors.SYSTEM_PROMPTS, whose module takes long to import

    sampling = parser.add_argument_group("sampling responses from the target model")
    add_model_argument(sampling)
    add_device_arguments(sampling)
    sampling.add_argument(
        "--instructions",
        nargs="+",
        metavar="FILE",
        help="answer the instructions in these JSONL files (default: the package's own)",
    )
    sampling.add_argument(
        "--refusals", metavar="FILE", help="take refusals from this JSONL file (default: the package's own)"
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
        help="keep this many refusals and compliant responses for each harmful instruction (default: %(default)s)",
    )
    sampling.add_argument(
        "--bank_refusals",
        action="store_true",
        help="leave out the model's own refusals, so that all are from the refusals above",
    )
    sampling.add_argument(
        "--begun_share",
        type=share,
        default=0.0,
        help="for this share of the answers, add a row in which the answer has begun: a harmful one is turned around, "
        "a safe one goes on (default: %(default)s)",
    )
    sampling.add_argument(
        "--disguised_share",
        type=share,
        default=0.0,
        help="answer this share of the instructions once more, in disguise: inside a story, rules for the reply or "
        "earlier turns (default: %(default)s)",
    )
    sampling.add_argument(
        "--disguises", metavar="FILE", help="take disguises from this JSONL file (default: the package's own)"
    )
    sampling.add_argument(
        "--answer_safe",
        action="store_true",
        help="where the model refuses a safe instruction, sample once more, from other first tokens",
    )
    add_batch_argument(sampling, default=32)
    add_length_argument(sampling, default=64)
    sampling.add_argument(
        "--temperature",
        type=finite,
        default=0.7,
        help="sample at this temperature; 0 takes the likeliest token (default: %(default)s)",
    )
    sampling.add_argument(
        "--top_p",
        type=share,
        default=0.9,
        help="sample from the likeliest tokens with this total probability (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
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
    from .. import anchors

    with user_errors(OSError, ValueError):
        anchors.check_new_file(args.output_file)
        instructions = anchors.load_instructions(args.instructions)
        refusals = anchors.load_refusals(args.refusals)
        if args.disguised_share:
            disguises = anchors.load_disguises(args.disguises)
            instructions += anchors.disguise_instructions(instructions, disguises, args.disguised_share, args.seed)
        elif args.disguises:
            raise CommandError("--disguises needs --disguised_share")
    settings = anchors.SamplingSettings(
        system_prompts=tuple(dict.fromkeys(args.system_prompts)),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    model, tokenizer = load_model(args)
    with user_errors(OSError, ValueError):
        rows = anchors.build_anchors(
            model,
            tokenizer,
            args.output_file,
            instructions=instructions,
            refusals=refusals,
            settings=settings,
            per_instruction=args.per_instruction,
            own_refusals=not args.bank_refusals,
            begun_share=args.begun_share,
            answer_safe=args.answer_safe,
        )
    counts = Counter(row["split"] for row in rows)
    from_bank = sum(row["source"] == "refusal_bank" for row in rows)
    numbers = ", ".join(f"{split} {counts[split]}" for split in anchors.SPLITS)
    show(f"{args.output_file}: {numbers} ({from_bank} of D_HR from the refusal bank)\n")


def _generate_instructions(args: argparse.Namespace) -> None:
    from .. import anchors

    with user_errors(ImportError, OSError, ValueError):
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
    show(f"{args.output_file}: {number} instructions\n")
