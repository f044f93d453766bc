import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
TINY = ["--random_llama", "tiny", "--num_virtual_tokens", "6", "--new_tokens", "4", "--repeats", "1"]
METRICS = ["first_token_s", "decode_s_per_token", "call_s"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output_file = tmp_path_factory.mktemp("benchmark") / "result.json"
    grid = ["--batch_sizes", "1", "3", "--prompt_lengths", "2", "5", "--num_threads", "1"]
    process = subprocess.run(
        [sys.executable, SCRIPT, *TINY, *grid, "--output_file", output_file],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(output_file.read_text()), process.stdout


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark"]


def test_every_cell_has_every_arm(measured):
    result, _ = measured
    cells = [(cell["batch_size"], cell["prompt_length"]) for cell in result["cells"]]
    assert cells == [(1, 2), (1, 5), (3, 2), (3, 5)]
    for cell in result["cells"]:
        assert list(cell["arms"]) == [
            "plain",
            "acd",
            "frozen",
            "shared",
            "horizon",
            "shared_horizon",
            "key_value",
            "guidance",
        ]
        assert all(arm["cache_bytes"] > 0 for arm in cell["arms"].values())


def test_own_code_is_measured_where_it_runs(measured):
    result, _ = measured
    for cell in result["cells"]:
        shares = {arm: values["own_share"] for arm, values in cell["arms"].items()}
        assert all(0.01 < shares[arm] < 1 for arm in shares if arm not in ("plain", "guidance"))  # of a tiny model
        assert shares["plain"] < shares["acd"]


def test_arms_make_equally_many_tokens(measured):
    result, _ = measured
    for cell in result["cells"]:
        for arm in cell["arms"].values():
            assert [run["new_tokens"] for run in arm["runs"]] == [4]


def test_every_cell_has_the_price_of_twice_the_rows(measured):
    for cell in measured[0]["cells"]:
        ratio = cell["twice_the_rows"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]


def test_named_key_values_are_what_is_decoded(benchmark, tmp_path):
    torch = pytest.importorskip("torch")
    parser = benchmark.CommandParser()
    benchmark.add_arguments(parser)
    shape = (5, 2, 2, 2, 16)  # of the tiny Llama
    safeguarding, adversarial = torch.randn(2, *shape)
    benchmark.PromptPair(safeguarding, adversarial).save_pretrained(tmp_path)
    setup = benchmark.load_setup(parser.parse_args([*TINY, "--adversarial_tokens", "6", "--pair", str(tmp_path)]))
    [acd] = benchmark.ARMS["key_value"](setup, benchmark.random_ids(setup.model, 1, 5))["logits_processor"]
    assert acd.pair.safeguarding.equal(safeguarding)
    acd.detach()


def test_times_fit_together(measured):
    result, _ = measured
    for cell in result["cells"]:
        for arm in cell["arms"].values():
            for run in arm["runs"]:
                assert 0 < run["first_token_s"] + 3 * run["decode_s_per_token"] <= run["call_s"]


def test_ratios_compare_with_plain(measured):
    result, _ = measured
    for cell in result["cells"]:
        plain = cell["arms"]["plain"]
        for metric in METRICS:
            assert plain["summary"][metric]["ratio_to_plain"] == {"median": 1, "min": 1, "max": 1}
            for arm in cell["arms"].values():
                ratio = arm["runs"][0][metric] / plain["runs"][0][metric]
                assert arm["summary"][metric]["ratio_to_plain"]["median"] == ratio


def test_ratios_are_paired_by_repeat(benchmark):
    runs = [{"call_s": 4.0}, {"call_s": 9.0}, {"call_s": 20.0}]
    plain = [{"call_s": 2.0}, {"call_s": 3.0}, {"call_s": 5.0}]
    summary = benchmark.summarise(runs, plain, "call_s")
    assert summary == {"median": 9.0, "ratio_to_plain": {"median": 3.0, "min": 2.0, "max": 4.0}}


def test_result_says_where_it_was_measured(measured):
    environment = measured[0]["environment"]
    assert environment["model"] == "random Llama tiny"
    assert environment["threads"] == 1
    assert {"acd_logits", "torch", "transformers", "device", "cpu", "dtype"} <= set(environment)
    assert measured[0]["settings"]["adversarial_tokens"] == 6


def test_table_is_printed(measured):
    result, printed = measured
    header, *rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 1 + sum(len(cell["arms"]) for cell in result["cells"])
    assert {row.count("|") for row in rows} == {header.count("|")}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory on a CPU is read from /proc")
def test_peak_memory_sees_what_is_freed_again(benchmark):
    torch = pytest.importorskip("torch")
    peak = benchmark.peak_bytes(torch.device("cpu"), lambda: torch.ones(16 << 20).sum())
    if peak is None:
        pytest.skip("no right to reset the high-water mark")
    assert 60 << 20 < peak < 100 << 20


def test_the_call_is_made_where_peak_memory_cannot_be_read(benchmark, monkeypatch):
    torch = pytest.importorskip("torch")
    calls = []
    monkeypatch.setattr(benchmark.ctypes, "CDLL", lambda name: None)
    assert benchmark.peak_bytes(torch.device("cpu"), lambda: calls.append(1)) is None
    assert calls == [1]  # it is the warm-up


def test_negative_prompt_is_as_long_as_the_adversarial_stream(benchmark):
    parser = benchmark.CommandParser()
    benchmark.add_arguments(parser)
    setup = benchmark.load_setup(parser.parse_args([*TINY, "--adversarial_tokens", "9"]))
    prompt = benchmark.random_ids(setup.model, 2, 5)
    arguments = benchmark.guidance_arguments(setup, prompt)
    assert arguments["negative_prompt_ids"].shape == (2, 9 + 5)
    assert arguments["negative_prompt_ids"][:, 9:].equal(prompt)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--batch_sizes", "0"], "--batch_sizes: must be a whole number, at least 1, got '0'"),
        (["--new_tokens", "1"], "--new_tokens: must be a whole number, at least 2, got '1'"),
        (["--random_llama", "9b"], "invalid choice: '9b'"),
        (["--random_llama", "tiny", "--model_name_or_path", "org/model"], "not allowed with"),
        (["--model_name_or_path", "./no-such-model"], "cannot make the model"),
        (["--random_llama", "tiny", "--prompt_lengths", "4096"], "4236 tokens are more than the model's 4096"),
        (["--output_file", "no-such-folder/result.json"], "no such folder: no-such-folder"),
        ([*TINY, "--pair", "./absent"], "cannot take --pair ./absent"),
        ([*TINY, "--pair", "smollm2-135m-instruct"], "made for hidden size 576, the model has 64"),
    ],
)
def test_bad_arguments_give_one_line(benchmark, monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    try:
        code = benchmark.main()
    except SystemExit as exit:
        code = exit.code
    assert code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark.py: error: ")
    assert complaint in line


def test_cuda_is_asked_for_in_vain(benchmark, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *TINY, "--device", "cuda"])
    assert benchmark.main() == 1
    assert capsys.readouterr().err == "benchmark.py: error: no CUDA device is available\n"
