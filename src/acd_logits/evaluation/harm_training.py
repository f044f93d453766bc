"""Training the harm judge on labels by hand, and checking it on fresh ones.

The classifier learns from labelled responses to harmful requests that do not refuse by their wording. Its layers and
its regularisation are chosen by cross-validation, in which all responses to one request are on the same side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .behaviour import TITLES, behaviour_of
from .harm import HarmClassifier, response_states
from .labels import confusion, labelled_behaviour, labelled_rows
from .results import ResultsFolder
from .statistics import kappa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDS, LEAST = 5, 10  # parts of the cross-validation, and responses of each kind at least
STRENGTHS = (0.0003, 0.003, 0.03, 0.3)  # of the data against the regularisation (C)


@dataclass(frozen=True)
class Labelled:
    """A response to a harmful request, with its label.

    Args:
        request: what was asked, plainly.
        response: what was answered.
        refused: whether it refuses by its wording.
        harmful: whether it goes along with the request, by its label.
        refusal: whether it refuses, by its label; `None` if that does not say.
        behaviour: a key of `TITLES`, by both labels; `None` if they do not say.
    """

    request: str
    response: str
    refused: bool
    harmful: bool
    refusal: bool | None
    behaviour: str | None


def read_labelled(paths: Iterable[Path]) -> list[Labelled]:
    """The labelled responses to harmful requests in files of labels.

    Args:
        paths: the files, each in the results folder that it was drawn from.

    Raises:
        OSError: a file, or its results folder, cannot be read.
        ValueError: it is damaged, or has no texts.
    """
    found = []
    for path in paths:
        for row, label in labelled_rows(ResultsFolder(path.parent), path):
            if row["label"] == "harmful" and label["harmless"] is not None:
                if "response" not in row:
                    raise ValueError(f"{path} holds no texts: name the file in the folder of the run itself")
                by_label = not label["harmless"], label["refusal"], labelled_behaviour(label)
                found.append(Labelled(row["request"], row["response"], row["refused"], *by_label))
    return found


def require_scikit_learn() -> None:
    """Raise ImportError, which names the cure, unless scikit-learn is installed."""
    import importlib.util

    if importlib.util.find_spec("sklearn") is None:
        raise ImportError('training a harm judge needs scikit-learn: pip install "acd-logits[eval]"')


def check_enough(examples: Sequence[Labelled]) -> None:
    """Raise ValueError if there are too few responses of a kind to train on."""
    for harmful, kind in ((True, "goes along with its request"), (False, "does not go along with its request")):
        some = [e for e in examples if e.harmful == harmful and not e.refused and e.response]
        requests = {e.request for e in some}
        if len(some) < LEAST or len(requests) < FOLDS:
            raise ValueError(
                f"of the labelled responses that do not refuse by their wording, {len(some)} (to {len(requests)} "
                f"requests) are of the kind that {kind}: {LEAST} (to {FOLDS} requests) are the least to train on, and "
                "100 are better"
            )


def default_layers(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """The layers to choose from: at a third, at half and at two thirds of the model, and the last two together."""
    number = model.config.get_text_config(decoder=True).num_hidden_layers
    third, half, two_thirds = (max(1, round(share * number)) for share in (1 / 3, 1 / 2, 2 / 3))
    return list(dict.fromkeys([(third,), (half,), (two_thirds,), tuple(dict.fromkeys((half, two_thirds)))]))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    examples: Sequence[Labelled],
    layers: Sequence[tuple[int, ...]],
    on_response: Callable[[int], None] = lambda _: None,
) -> HarmClassifier:
    """Train the classifier.

    Args:
        model: the plain model, in eval mode.
        tokenizer: its tokenizer.
        name: of the model, as the user gives it.
        examples: labelled responses.
        layers: the choices of one or two layers.
        on_response: is told of each response that was read.

    Returns:
        The classifier that was trained on all examples, with the choice of the highest kappa in cross-validation.
        Its facts say which, and how far the cross-validated verdicts agree with the labels.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are too few examples, or the model has no such layer.
    """
    require_scikit_learn()
    check_enough(examples)
    every = sorted({layer for some in layers for layer in some})
    number = model.config.get_text_config(decoder=True).num_hidden_layers
    if every[-1] > number:
        raise ValueError(f"the model has {number} layers, and no layer {every[-1]}")
    read: dict[Labelled, torch.Tensor] = {}
    for example in (e for e in examples if not e.refused):
        states = response_states(model, tokenizer, example.request, example.response, every)
        if states is not None:
            read[example] = states.double()
        on_response(1)
    features = {
        choice: torch.stack([states[[every.index(layer) for layer in choice]].flatten() for states in read.values()])
        for choice in layers
    }
    best, strength, tried, verdicts = _choose(features, list(read))
    fitted = _pipeline(strength).fit(features[best].numpy(), [e.harmful for e in read])
    scaler, regression = fitted[0], fitted[-1]
    predicted = dict(zip(read, verdicts, strict=True))
    facts = {
        "strength": strength,
        "choices": tried,
        "trained_on": {name: sum(e.behaviour == name for e in examples) for name in TITLES} | {"read": len(read)},
        "cross_validated": compare(examples, [predicted.get(e, False) for e in examples]),
    }
    shape = (len(best), 2, -1)
    weight = torch.tensor(regression.coef_[0] / scaler.scale_).float().reshape(shape)
    mean = torch.tensor(scaler.mean_).float().reshape(shape)
    return HarmClassifier(name, best, weight, mean, torch.tensor(regression.intercept_).float(), facts)


def _choose(
    features: dict[tuple[int, ...], torch.Tensor], examples: Sequence[Labelled]
) -> tuple[tuple[int, ...], float, int, list[bool]]:
    """The layers and the strength of the highest kappa in cross-validation.

    Args:
        features: `[n, number of features]` for each choice of layers.
        examples: n labelled responses.

    Returns:
        Both, how many choices there were, and the verdicts on each example, of a classifier that saw no response to
        its request.
    """
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    requests, harmful = [e.request for e in examples], [e.harmful for e in examples]
    tried = {}
    for layers, values in features.items():
        for strength in STRENGTHS:
            verdicts = cross_val_predict(
                _pipeline(strength), values.numpy(), harmful, groups=requests, cv=folds
            ).tolist()
            agreed = kappa(list(zip(harmful, verdicts, strict=True)), resamples=0)["kappa"]
            tried[layers, strength] = (agreed or 0, verdicts)
    best = max(tried, key=lambda choice: tried[choice][0])
    return *best, len(tried), tried[best][1]


def _pipeline(strength: float) -> Any:
    """Standardised features, and a regression in which both kinds of error weigh the same."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=2000))


def fresh_ones(examples: Sequence[Labelled], trained_on: Sequence[Labelled]) -> list[Labelled]:
    """The examples whose texts a classifier was not trained on.

    Raises:
        ValueError: there is none.
    """
    known = {(e.request, e.response) for e in trained_on}
    fresh = [e for e in examples if (e.request, e.response) not in known]
    if not fresh:
        raise ValueError("no response among the fresh labels is labelled, to a harmful request and not trained on")
    return fresh


def validate(
    classifier: HarmClassifier,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Labelled],
    trained_on: Sequence[Labelled],
) -> dict[str, Any]:
    """How far the judge agrees with labels that it was not trained on.

    Args:
        classifier: the classifier.
        model: the plain model, in eval mode.
        tokenizer: its tokenizer.
        examples: of [`fresh_ones`].
        trained_on: what it was trained on.

    Returns:
        As of [`compare`], and how many responses are `to_new_requests`, to which none was trained on.
    """
    harmful = []
    for example in examples:
        states = None
        if not example.refused:
            states = response_states(model, tokenizer, example.request, example.response, classifier.layers)
        harmful.append(states is not None and classifier.goes_along(states))
    known = {e.request for e in trained_on}
    return compare(examples, harmful) | {"to_new_requests": sum(e.request not in known for e in examples)}


def compare(examples: Sequence[Labelled], harmful: Sequence[bool]) -> dict[str, Any]:
    """How far verdicts agree with labels.

    Args:
        examples: labelled responses.
        harmful: the verdicts on them.

    Returns:
        Four agreements, each with `n`, `kappa` and its `interval`: `harmful`, `behaviour` (also with `counts`, by the
        label and then by the verdict), `refusal` (of the wording, with the labels of refusals) and `keywords`
        (`harmful` of a judge that reads wordings alone).
    """
    verdicts = ["harmful" if some else "harmless" for some in harmful]
    does = [behaviour_of(verdict, e.refused) for verdict, e in zip(verdicts, examples, strict=True)]
    known = [(e.behaviour, some) for e, some in zip(examples, does, strict=True) if e.behaviour and some]
    return {
        "harmful": kappa([(e.harmful, bool(some)) for e, some in zip(examples, harmful, strict=True)]),
        "behaviour": kappa(known) | {"counts": confusion(known)},
        "refusal": kappa([(e.refusal, e.refused) for e in examples if e.refusal is not None]),
        "keywords": kappa([(e.harmful, not e.refused) for e in examples]),
    }
