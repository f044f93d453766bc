"""Another judge on the same responses."""

import json

import pytest

from acd_logits.evaluation.judges import KeywordJudge
from acd_logits.evaluation.labels import agreement
from acd_logits.evaluation.publish import publish
from acd_logits.evaluation.rejudge import check_rejudging, judge_again
from acd_logits.evaluation.report import write_report
from acd_logits.evaluation.results import Cell, ResultsFolder, cell_of
from tiny_results import BOTH, SETTINGS, build_results, build_rows

BASE = Cell("xstest", "base")
NEW = SETTINGS | {"judge": "harm:folder"}


class Half(KeywordJudge):
    """Every second response goes along."""

    def judge(self, requests, responses):
        return ["harmful" if i % 2 else "harmless" for i in range(len(responses))]


@pytest.fixture
def results(tmp_path):
    rows = build_rows(BOTH, 4, refused_safe=1)
    begun = [row for row in build_rows(BOTH, 0) if row["label"] == "harmful"]
    results = build_results(tmp_path / "results", {BASE: build_rows(BOTH, 0)})
    results.add(Cell("xstest", "base", begun_tokens=2), begun)
    results.add(Cell("xstest", "sp"), rows)
    results.add(Cell("xstest", "base", attack="fiction"), begun)
    results.run["attacks"] = {"fiction": {"title": "Fiction", "digest": ""}}
    line = len(results.rows) - 1
    label = {"line": line, "request": results.rows[line]["request"], "response": "SECRET"}
    (results.path / "labels.jsonl").write_text(json.dumps(label | {"harmless": False, "refusal": False}) + "\n")
    return results


def test_verdicts_are_new_and_all_else_stays(results, tmp_path):
    new = check_rejudging(results, tmp_path / "new", NEW)
    done = []
    judge_again(results, new, Half(), {"date": "now"}, done.append)
    assert done == [BASE, Cell("xstest", "sp"), Cell("xstest", "base", attack="fiction")]
    assert not any(cell_of(row).begun_tokens for row in new.rows)
    harmful = [row for row in new.rows if row["label"] == "harmful"]
    assert [row["verdict"] for row in harmful] == ["harmless", "harmful"] * 6
    assert not any(row["refused"] for row in harmful), "SECRET is no refusal"
    safe = [row for row in new.rows if row["arm"] == "sp" and row["label"] == "safe"]
    assert safe == [row for row in results.rows if row["arm"] == "sp" and row["label"] == "safe"]
    assert new.run["runs"][-1] == {"date": "now"}
    assert new.run["settings"] == NEW
    assert agreement(new)["harmless"]["both"] == 0
    assert agreement(new)["harmless"]["neither"] == 1, "the label's line has moved with its response"
    assert ResultsFolder(tmp_path / "new", NEW).rows == new.rows
    new.run["runs"][-1] |= results.run["runs"][0]
    assert "What the responses do" in write_report(new).read_text()


class Tired(Half):
    """Does not answer a second time."""

    asked = 0

    def judge(self, requests, responses):
        self.asked += 1
        if self.asked == 2:
            raise OSError("the judge does not answer")
        return super().judge(requests, responses)


def test_a_judge_that_fails_loses_nothing(results, tmp_path):
    judge_again(results, check_rejudging(results, tmp_path / "whole", NEW), Half(), {"date": "now"})
    with pytest.raises(OSError, match="does not answer"):
        judge_again(results, check_rejudging(results, tmp_path / "new", NEW), Tired(), {"date": "first"})
    assert not (tmp_path / "new" / "labels.jsonl").exists()
    done = []
    new = check_rejudging(results, tmp_path / "new", NEW)
    judge_again(results, new, Half(), {"date": "second"}, done.append)
    assert done == [Cell("xstest", "sp"), Cell("xstest", "base", attack="fiction")]
    assert [run["date"] for run in new.run["runs"][-2:]] == ["first", "second"]
    for name in ("results.jsonl", "labels.jsonl"):
        assert (tmp_path / "new" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_what_cannot_be_judged_anew(results, tmp_path):
    with pytest.raises(ValueError, match="holds what is to be judged anew: choose another folder"):
        check_rejudging(results, results.path, NEW)
    judge_again(results, check_rejudging(results, tmp_path / "new", NEW), Half(), {})
    for row in results.rows:
        row["response"] += " And more."
    with pytest.raises(ValueError, match="holds verdicts on other responses than"):
        check_rejudging(results, tmp_path / "new", NEW)
    copy = publish(results, tmp_path / "copy")
    with pytest.raises(ValueError, match="holds responses without their texts"):
        check_rejudging(copy, tmp_path / "none", NEW)
    with pytest.raises(ValueError, match="holds no finished cell yet"):
        check_rejudging(build_results(tmp_path / "empty", {}), tmp_path / "none", NEW)
