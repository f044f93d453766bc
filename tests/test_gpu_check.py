"""The check that a GPU gets, here with tiny models on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"
STEPS = ["environment", "smoke", "exactness", "speed", "profile", "static_acd", "static_plain"]


def check(folder, *arguments):
    """Run the script; return its exit code, what it wrote as JSON and as Markdown, and what it printed."""
    process = subprocess.run(
        [sys.executable, SCRIPT, "--output_dir", folder, "--tiny", "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        timeout=1000,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    result = json.loads((folder / "gpu_check.json").read_text())
    return process.returncode, result["steps"], (folder / "gpu_check.md").read_text(), process.stdout


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return check(tmp_path_factory.mktemp("gpu_check"), "--seconds", "900")  # for a busy machine


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_step(gpu_check, tmp_path):
    """Run Python code as a step; return its entry and all that was noted on the way."""

    def run(code, limit):
        file, noted = tmp_path / "result.json", []
        command = [sys.executable, "-c", f"import os, pathlib, time; file = pathlib.Path({str(file)!r}); {code}"]
        note = lambda entry: noted.append(dict(entry))  # noqa: E731
        return gpu_check.run_step(command, limit, file, tmp_path / "log", note), noted

    return run


def test_every_step_is_ok(checked):
    code, steps, _, printed = checked
    assert [(step, entry["status"]) for step, entry in steps.items()] == [(step, "ok") for step in STEPS], printed
    assert code == 0


def test_the_table_is_printed_last_and_names_every_arm(checked):
    _, _, markdown, printed = checked
    assert printed.endswith(markdown)
    rows = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    measured = {(row[0].strip("| "), *row[1:3]) for row in rows if len(row) == 16}
    for cell in ("1", "32"), ("4", "512"):
        assert {(*cell, arm) for arm in ("plain", "acd", "shared", "horizon", "guidance")} <= measured
    assert {row[2] for row in rows if len(row) == 14} == {"arm", "---", "plain", "acd"}  # the static cache's


def test_every_way_to_decode_ran(checked):
    modes = checked[1]["smoke"]["result"]
    assert {"greedy", "sampling", "beams", "prompt_lookup", "alpha_per_row", "padded", "horizon", "static"} <= set(
        modes
    )


def test_exactness_ran_the_tests_of_this_checkout(checked):
    seen = checked[1]["exactness"]["result"]
    assert seen["complete"] and seen["passed"] > 4 and not seen["failures"]


def test_static_caches_were_traced(checked):
    for step in ("static_plain", "static_acd"):
        (cell,) = checked[1][step]["result"]["cells"]
        assert cell["counters"]["stats"]["unique_graphs"] > 0


def test_every_time_has_a_floor(checked):
    cells = checked[1]["speed"]["result"]["cells"]
    assert len(cells) == 2
    for arm in (arm for cell in cells for arm in cell["arms"].values()):
        assert arm["floor"].keys() == arm["summary"].keys()
        assert all(seconds > 0 for seconds in arm["floor"].values())


def test_floors_of_a_llama_2_7b(gpu_check, tmp_path, monkeypatch):
    """13.2 GB of weights, without the embeddings, and 0.5 MB for each token of the cache."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    facts = {"environment": {"result": {"bytes_per_s": 1e12, "operations_per_s": 1e18}}}
    (tmp_path / "gpu_check.json").write_text(json.dumps({"steps": facts}))
    args = type("Arguments", (), {"output_dir": tmp_path})
    floors = {arm: gpu_check.floor(args, "7b", arm, 4, 512, 64) for arm in ("plain", "acd", "shared", "guidance")}
    gigabytes = {arm: times["decode_s_per_token"] * 1e3 for arm, times in floors.items()}
    assert gigabytes["plain"] == pytest.approx(13.21 + 4 * 544 * 0.000524288, abs=0.01)
    assert gigabytes["acd"] == pytest.approx(13.21 + 8 * 644 * 0.000524288, abs=0.01)
    assert gigabytes["shared"] == pytest.approx(13.21 + 4 * (511 + 200 + 66) * 0.000524288, abs=0.01)
    assert gigabytes["guidance"] == pytest.approx(2 * 13.21 + 4 * (544 + 644) * 0.000524288, abs=0.01)


def test_a_failing_step_is_reported_and_the_rest_runs(tmp_path):
    test = tmp_path / "test_alpha_per_row.py"
    test.write_text("def test_one():\n    assert 1 == 2\n\ndef test_two():\n    pass\n")
    code, found, markdown, printed = check(tmp_path, "--steps", "exactness", "environment", "--tests", str(test))
    assert code == 1
    assert [entry["status"] for entry in found.values()] == ["failed", "ok"]
    assert "exactness: failed" in printed and "| exactness | failed |" in markdown
    seen = found["exactness"]["result"]
    assert (seen["passed"], seen["failed"], seen["complete"]) == (1, 1, True)
    ((name, lines),) = seen["failures"].items()
    assert name.endswith("::test_one") and lines[0] == "assert 1 == 2"
    assert "test_one: assert 1 == 2" in markdown
    assert any("1 failed, 1 passed" in line for line in found["exactness"]["log"])


def test_no_time_left(tmp_path):
    code, found, _, _ = check(tmp_path, "--steps", "environment", "--seconds", "1")
    assert code == 1
    assert found["environment"]["status"] == "no time left"


def test_a_step_at_its_limit_keeps_what_it_found(run_step):
    entry, noted = run_step("file.write_text('{\"a\": 1}'); time.sleep(60)", limit=2)
    assert (entry["status"], entry["result"]) == ("time limit", {"a": 1})
    assert noted[0]["status"] == "running" and noted[0]["result"] == {"a": 1}
    assert entry["seconds"] < 20


def test_a_step_that_dies(run_step):
    entry, _ = run_step("print('last words', flush=True); os.abort()", limit=20)
    assert (entry["status"], entry["result"], entry["exit_code"]) == ("failed", {}, -6)
    assert "last words" in entry["log"]
