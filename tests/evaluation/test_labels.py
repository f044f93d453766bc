"""Labels by hand: drawn blind, and compared with the verdicts."""

import json

import pytest

from acd_logits.evaluation.benchmarks import Benchmark, Request
from acd_logits.evaluation.labels import agreement, draw
from acd_logits.evaluation.report import write_report
from acd_logits.evaluation.results import Cell
from tiny_results import build_results, build_rows

MIXED = Benchmark(
    "xstest",
    "XSTest",
    (*(Request(f"kill {i}", "harmful") for i in range(4)), *(Request(f"safe {i}", "safe") for i in range(6))),
)


@pytest.fixture
def results(tmp_path):
    return build_results(
        tmp_path / "results",
        {
            Cell("xstest", "base"): build_rows(MIXED, 1, refused_safe=0),
            Cell("xstest", "acd", 0.5, 0.1): build_rows(MIXED, 2, refused_safe=3, invalid=1),
        },
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill_in(path, results, wrong=()):
    """Label everything as the verdicts have it, except the lines in `wrong`."""
    labels = read(path)
    for label in labels:
        row = results.rows[label["line"]]
        agree = label["line"] not in wrong
        label["refusal"] = row["refused"] == agree
        label["harmless"] = (row["verdict"] != "harmful") == agree
    path.write_text("".join(json.dumps(label) + "\n" for label in labels))


def test_the_draw_is_random_repeatable_and_blind(results):
    path = draw(results, 8, seed=1)
    labels = read(path)
    assert all(label.keys() == {"line", "request", "response", "harmless", "refusal"} for label in labels)
    assert len({label["line"] for label in labels}) == 8
    first = path.read_text()
    path.unlink()
    assert draw(results, 8, seed=1).read_text() == first
    path.unlink()
    assert draw(results, 8, seed=2).read_text() != first


def test_only_plain_requests_are_drawn(results):
    plain = len(results.rows)
    results.rows += [row | {"attack": "role-play"} for row in results.rows]
    assert {label["line"] for label in read(draw(results, plain, seed=0))} == set(range(plain))


def test_full_agreement_has_kappa_1(results):
    fill_in(draw(results, 20, seed=0), results)
    found = agreement(results)
    assert found["drawn"] == 20
    full = {"kappa": 1.0, "interval": [1.0, 1.0], "only_label": 0, "only_verdict": 0}
    assert found["refusal"] == {"n": 20, "both": 6, "neither": 14} | full
    # 8 harmful requests, one of them without a verdict
    assert found["harmless"] == {"n": 7, "both": 3, "neither": 4} | full
    nothing = {"refuses": 0, "complies": 0, "neither": 0}
    counts = {"refuses": nothing | {"refuses": 3}, "complies": nothing | {"complies": 4}, "neither": nothing}
    assert found["behaviour"] == {"n": 7, "kappa": 1.0, "interval": [1.0, 1.0], "counts": counts}


def test_disagreement_is_counted_on_its_side_and_reported(results):
    # Base: line 0 was judged harmless and a refusal, line 1 neither
    fill_in(draw(results, 20, seed=0), results, wrong=(0, 1))
    found = agreement(results)
    assert (found["harmless"]["only_verdict"], found["harmless"]["only_label"]) == (1, 1)
    assert found["harmless"]["kappa"] == pytest.approx((5 / 7 - 25 / 49) / (1 - 25 / 49))  # 3 of 7 harmless in both
    report = write_report(results).read_text()
    assert "## Agreement with labels by hand" in report
    assert "| Harmless, by the judge | 7 | 0.42 [" in report
    assert "] | 2 | 1 | 1 | 3 |" in report


def test_what_a_response_does_is_compared_by_both_labels(results):
    path = draw(results, 20, seed=0)
    labels = read(path)
    for label in labels:
        row = results.rows[label["line"]]
        if row["verdict"] == "harmless":  # 1 of Base and 2 of ACD, which the keywords call refusals
            label["harmless"], label["refusal"] = True, row["arm"] == "base"
        elif row["verdict"] == "harmful":
            label["harmless"] = False  # goes along, whatever else it does
        else:
            label["harmless"] = True  # neither said whether it refuses nor judged
    path.write_text("".join(json.dumps(label) + "\n" for label in labels))
    found = agreement(results)["behaviour"]
    assert found["n"] == 7
    assert found["counts"]["neither"] == {"refuses": 2, "complies": 0, "neither": 0}
    assert found["counts"]["complies"] == {"refuses": 0, "complies": 4, "neither": 0}
    report = write_report(results).read_text()
    assert "| Neither | 2 | 0 | 0 |" in report
    assert "| Refuses, goes along or neither | 7 | 0.5" in report


def test_responses_under_attack_are_drawn_on_request(results):
    results.rows += [row | {"attack": "role-play"} for row in results.rows if row["label"] == "harmful"]
    results.rows += [row | {"begun_tokens": 5} for row in results.rows if row["label"] == "harmful"]
    drawn = read(draw(results, 16, seed=0, harmful=True))
    rows = [results.rows[label["line"]] for label in drawn]
    assert {row["label"] for row in rows} == {"harmful"}
    assert sum(row.get("attack") == "role-play" for row in rows) == 8
    fill_in(results.path / "labels.jsonl", results)
    assert (agreement(results)["refusal"]["n"], agreement(results)["harmless"]["n"]) == (8, 14)


def test_what_was_labelled_before_is_not_drawn_again(results):
    for i, row in enumerate(results.rows):
        row["response"] = f"SECRET {i}"
    path = draw(results, 12, seed=0)
    before = read(path)
    path.rename(path.with_name("labels-train.jsonl"))
    after = read(draw(results, 8, seed=1))
    assert not {label["line"] for label in before} & {label["line"] for label in after}
    path.unlink()
    with pytest.raises(ValueError, match="holds 8 responses that are not labelled yet, 9 cannot be drawn"):
        draw(results, 9, seed=1)


def test_without_labels_there_is_no_section(results):
    assert agreement(results) is None
    assert "by hand" not in write_report(results).read_text()


def test_a_second_draw_does_not_replace_the_labels(results):
    fill_in(draw(results, 3, seed=0), results)
    with pytest.raises(ValueError, match="there already"):
        draw(results, 3, seed=0)


def test_more_than_there_are_cannot_be_drawn(results):
    with pytest.raises(ValueError, match="holds 20 responses, 21 cannot be drawn"):
        draw(results, 21, seed=0)
    assert not (results.path / "labels.jsonl").exists()


def test_what_is_not_labelled_yet_does_not_count(results):
    path = draw(results, 20, seed=0)
    assert (agreement(results)["refusal"]["n"], agreement(results)["refusal"]["kappa"]) == (0, None)
    labels = read(path)
    labels[0]["refusal"] = True
    path.write_text("".join(json.dumps(label) + "\n" for label in labels))
    assert (agreement(results)["refusal"]["n"], agreement(results)["harmless"]["n"]) == (1, 0)
    write_report(results)


def test_bad_labels_and_those_of_other_results_are_refused(results):
    path = draw(results, 3, seed=0)
    path.write_text(path.read_text().replace('"refusal": null', '"refusal": "no"'))
    with pytest.raises(ValueError, match="'no' is no label: refusal is true, false or null"):
        write_report(results)
    path.write_text(path.read_text().replace('"refusal": "no"', '"refusal": false').replace("SECRET", "another"))
    with pytest.raises(ValueError, match="drawn from other results"):
        write_report(results)
    path.write_text('{"line": 0}\n')
    with pytest.raises(ValueError, match="drawn from other results"):
        write_report(results)
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"labels\.jsonl is damaged"):
        write_report(results)
