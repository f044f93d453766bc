"""The harm judge: what refuses is harmless, and what does not is read by the classifier."""

import json

import pytest
import torch

from acd_logits.evaluation.harm import HarmClassifier, HarmJudge, response_states
from acd_logits.evaluation.judges import continuation_judge
from conftest import HIDDEN, build_model

LAYERS = (1, 3)


def build_classifier(seed=0, layers=LAYERS, model="org/tiny", hidden=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    tensors = (torch.randn(len(layers), 2, hidden, generator=generator) for _ in range(2))
    return HarmClassifier(model, layers, *tensors, torch.tensor([0.5]), {"strength": 0.3})


def test_states_are_those_of_the_response(tokenizer):
    model = build_model()
    found = response_states(model, tokenizer, "w5 w6", "w7 w8 w9", LAYERS)
    with torch.no_grad():
        states = model(torch.tensor([[5, 6, 7, 8, 9]]), output_hidden_states=True).hidden_states
    for layer, some in zip(LAYERS, found, strict=True):
        torch.testing.assert_close(some, torch.stack([states[layer][0, 2:].mean(0), states[layer][0, 4]]))
    assert response_states(model, tokenizer, "w5 w6", "", LAYERS) is None


def test_what_does_not_refuse_is_classified(tokenizer):
    model, classifier = build_model(), build_classifier()
    responses = [f"w{i} w{i + 7} w{i + 1}" for i in range(10, 30)]
    verdicts = HarmJudge(classifier, model, tokenizer).judge(["w5 w6"] * 20, responses)
    assert {*verdicts} == {"harmless", "harmful"}
    for response, verdict in zip(responses, verdicts, strict=True):
        states = response_states(model, tokenizer, "w5 w6", response, LAYERS)
        score = ((states - classifier.mean) * classifier.weight).sum() + 0.5
        assert (verdict == "harmful") == (score > 0)


def test_refusals_and_nothing_are_harmless(tokenizer, monkeypatch):
    always = HarmJudge(build_classifier(), build_model(), tokenizer)
    monkeypatch.setattr(HarmClassifier, "goes_along", lambda self, states: True)
    said = ["I can't help with that.", "w7", "", "w9 I can't help with that."]
    assert always.judge(["w5"] * 4, said) == ["harmless", "harmful", "harmless", "harmful"]
    behind = continuation_judge(always)
    assert behind.judge(["w5"] * 4, said) == ["harmless", "harmful", "harmless", "harmless"]
    assert always.judge(["w5"], said[-1:]) == ["harmful"], "the judge itself stays as it is"


def test_a_folder(tmp_path):
    classifier = build_classifier()
    classifier.save(tmp_path)
    found = HarmClassifier.load(tmp_path, "org/tiny")
    assert (found.layers, found.facts, found.digest) == (LAYERS, {"strength": 0.3}, classifier.digest)
    assert torch.equal(found.weight, classifier.weight)
    assert build_classifier(seed=1).digest != classifier.digest
    with pytest.raises(ValueError, match="was trained for org/tiny, not for org/other: train one for this model"):
        HarmClassifier.load(tmp_path, "org/other")


def test_a_model_of_other_sizes(tokenizer):
    for classifier in (build_classifier(layers=(4,)), build_classifier(hidden=24)):
        with pytest.raises(ValueError, match="and this model has 3 layers of 32: train one for this model"):
            HarmJudge(classifier, build_model(), tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"layers": [1]},
        {"layers": 3},
        {"layers": None},
        {"model": None},
    ],
)
def test_damaged_settings(tmp_path, change):
    build_classifier().save(tmp_path)
    content = json.loads((tmp_path / "harm_judge.json").read_text()) | change
    content = {name: value for name, value in content.items() if value is not None}
    (tmp_path / "harm_judge.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is damaged \(.*\): train it again"):
        HarmClassifier.load(tmp_path, "org/tiny")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no harm judge: harm_judge\.json is missing"):
        HarmClassifier.load(tmp_path, "org/tiny")
    build_classifier().save(tmp_path)
    (tmp_path / "harm_judge.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="is damaged"):
        HarmClassifier.load(tmp_path, "org/tiny")
    (tmp_path / "harm_judge.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        HarmClassifier.load(tmp_path, "org/tiny")
