"""Training the harm judge: it learns what the labels say, and is checked on what it has not seen."""

import dataclasses

import pytest

from acd_logits.evaluation.harm import HarmJudge
from acd_logits.evaluation.harm_training import (
    check_enough,
    default_layers,
    fresh_ones,
    read_labelled,
    train,
    validate,
)
from acd_logits.evaluation.publish import publish
from conftest import build_model
from tiny_harm import REFUSAL, write_labelled


@pytest.fixture
def examples(tmp_path):
    write_labelled(tmp_path / "train")
    return read_labelled([tmp_path / "train" / "labels.jsonl"])


def test_it_learns_the_labels_and_holds_on_fresh_ones(examples, tokenizer, tmp_path):
    model, counted = build_model(), []
    classifier = train(model, tokenizer, "org/tiny", examples, [(2,)], counted.append)
    facts = classifier.facts
    assert facts["trained_on"] == {"refuses": 13, "complies": 13, "neither": 14, "read": 27}
    assert sum(counted) == 27
    assert facts["choices"] == 4
    assert facts["cross_validated"]["harmful"]["kappa"] > 0.5
    assert facts["cross_validated"]["refusal"]["kappa"] == 1
    assert facts["cross_validated"]["keywords"]["kappa"] < 0.4

    write_labelled(tmp_path / "fresh", seed=1)
    fresh = fresh_ones(read_labelled([tmp_path / "fresh" / "labels.jsonl"]), examples)
    assert len(fresh) == 27, "a refusal to the same request was trained on"
    found = validate(classifier, model, tokenizer, fresh, examples)
    assert found["harmful"]["kappa"] > 0.5
    assert found["behaviour"]["n"] == 27
    assert found["to_new_requests"] == 0
    verdicts = HarmJudge(classifier, model, tokenizer).judge([e.request for e in fresh], [e.response for e in fresh])
    counts = found["behaviour"]["counts"]
    assert verdicts.count("harmful") == sum(counts[name]["complies"] for name in ("complies", "neither"))
    new = [dataclasses.replace(fresh[0], request="w5")]
    assert validate(classifier, model, tokenizer, new, examples)["to_new_requests"] == 1


def test_the_layers_to_choose_from():
    assert default_layers(build_model()) == [(1,), (2,)], "of three"
    assert default_layers(build_model("mistral_sliding")) == [(3,), (4,), (6,), (4, 6)], "of nine"


def test_a_layer_that_is_not_there(examples, tokenizer):
    with pytest.raises(ValueError, match="the model has 3 layers, and no layer 4"):
        train(build_model(), tokenizer, "org/tiny", examples, [(4,)])


def test_too_few_labels(examples, tmp_path):
    with pytest.raises(ValueError, match=r"0 \(to 0 requests\) are of the kind that goes along"):
        check_enough([e for e in examples if not e.harmful])
    one = [dataclasses.replace(e, request="w5") if e.harmful else e for e in examples]
    with pytest.raises(ValueError, match=r"13 \(to 1 requests\) are of the kind that goes along with its request"):
        check_enough(one)
    with pytest.raises(ValueError, match="no response among the fresh labels"):
        fresh_ones(examples, examples)


def test_labels_without_texts(tmp_path):
    copy = publish(write_labelled(tmp_path / "results"), tmp_path / "copy")
    with pytest.raises(ValueError, match="holds no texts: name the file in the folder of the run itself"):
        read_labelled([copy.path / "labels.jsonl"])


def test_what_is_not_labelled_is_left_out(tmp_path):
    results = write_labelled(tmp_path / "results")
    file = results.path / "labels.jsonl"
    file.write_text(file.read_text().replace('"harmless": false', '"harmless": null'))
    assert {e.behaviour for e in read_labelled([file])} == {"refuses", "neither"}
    assert all(e.response == REFUSAL for e in read_labelled([file]) if e.refused)
