"""Inspect tasks: the harmless rate on harmful requests, and the refusal rate on safe ones.

inspect eval acd_logits/harmless -T benchmark=advbench --model acd/org/model -M pair=org/pair
inspect eval acd_logits/harmless -T scorer=llm_judge --model-role grader=openai/gpt-4o --model acd/org/model ...
inspect eval acd_logits/overrefusal -T benchmark=xstest --model acd/org/model -M method=base
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import grouped, mean, stderr
from inspect_ai.solver import generate

from ..benchmarks import KNOWN, load_benchmark
from .scorers import invalid, llm_judge, refusal_keywords, safety_classifier

if TYPE_CHECKING:
    from inspect_ai.scorer import Scorer

    from ..benchmarks import Benchmark, Label


@task
def harmless(
    benchmark: str = "starter",
    scorer: str = "refusal_keywords",
    classifier: str | None = None,
    harmless_label: str | None = None,
) -> Task:
    """Harmful requests in, harmless rate out (`mean`; a verdict that cannot be read counts as not harmless).

    Args:
        benchmark: a known benchmark, NAME=FILE for a local copy of one, or a file or Hub id of your own, with :COLUMN.
        scorer: refusal_keywords, safety_classifier or llm_judge.
        classifier: Hub id or folder of the classifier or guard, for safety_classifier.
        harmless_label: its label of a harmless response.
    """
    requests = _load(benchmark, "harmful")
    samples = [sample for sample in _samples(requests) if (sample.metadata or {})["label"] == "harmful"]
    if not samples:
        raise ValueError(f"{requests.title} holds no harmful request: measure it with overrefusal")
    return Task(
        dataset=MemoryDataset(samples, name=requests.name),
        solver=generate(),
        scorer=_scorer(scorer, classifier, harmless_label),
    )


@task
def overrefusal(benchmark: str = "starter") -> Task:
    """Safe requests in, refusal rate out; the harmful ones of a benchmark of both kinds are told apart.

    Args:
        benchmark: as in `harmless`.
    """
    requests = _load(benchmark, "safe")
    return Task(
        dataset=MemoryDataset(_samples(requests), name=requests.name),
        solver=generate(),
        scorer=refusal_keywords(),
        metrics=[
            grouped(mean(), "label", all=False),
            grouped(stderr(), "label", all=False, name_template="{group_name}_stderr"),
            invalid(),
        ],
    )


def _load(spec: str, label: Label) -> Benchmark:
    """A known benchmark with the labels it has, or requests of the user's own."""
    return load_benchmark(spec, None if spec.partition("=")[0] in KNOWN else label)


def _samples(benchmark: Benchmark) -> list[Sample]:
    return [
        Sample(id=number, input=request.text, metadata={"label": request.label})
        for number, request in enumerate(benchmark.requests, start=1)
    ]


def _scorer(name: str, classifier: str | None, harmless_label: str | None) -> Scorer:
    if name == "safety_classifier":
        if classifier is None:
            raise ValueError("safety_classifier needs a model: pass -T classifier=ID")
        return safety_classifier(classifier, harmless_label)
    if name not in ("refusal_keywords", "llm_judge"):
        raise ValueError(f"there is no scorer {name!r}: choose refusal_keywords, safety_classifier or llm_judge")
    return refusal_keywords() if name == "refusal_keywords" else llm_judge()
