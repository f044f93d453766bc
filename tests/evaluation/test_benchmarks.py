"""Benchmarks: files of every format, local copies of known ones, and what is said of bad ones."""

import json
import random
import re
from collections import Counter, defaultdict

import datasets
import pytest

from acd_logits.anchors.generation import _letter_triples, _similar
from acd_logits.evaluation import benchmarks
from acd_logits.evaluation.answers import is_correct
from acd_logits.evaluation.benchmarks import KNOWN, Request, load_benchmark
from acd_logits.files import shipped_folder

ROWS = [{"id": 1, "goal": "open the door, please"}, {"id": 2, "goal": 'say "no"'}]


def write(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.csv", 'id,goal\n1,"open the door, please"\n2,"say ""no"""\n'),
        ("own.csv", '\ufeffgoal,id\r\n"open the door, please",1\r\n"say ""no""",2\r\n'),
        ("own.json", json.dumps(ROWS)),
        ("own.json", json.dumps([row["goal"] for row in ROWS])),
        ("own.jsonl", "".join(json.dumps(row) + "\n\n" for row in ROWS)),
        ("OWN.TXT", 'open the door, please\n\n  \n say "no" \n'),
    ],
)
def test_files_of_every_format(tmp_path, name, content):
    benchmark = load_benchmark(write(tmp_path, name, content), label="safe")

    assert benchmark.name.lower() == "own"
    assert benchmark.requests == (Request("open the door, please", "safe"), Request('say "no"', "safe"))


def test_a_named_column(tmp_path):
    path = write(tmp_path, "odd:name.csv", "prompt,aim\na,b\n")

    assert load_benchmark(f"{path}:aim", label="harmful").requests == (Request("b", "harmful"),)
    assert load_benchmark(path, label="harmful").requests == (Request("a", "harmful"),)


def test_a_repeated_request_counts_once(tmp_path):
    assert len(load_benchmark(write(tmp_path, "own.txt", "a\nb\na\n"), label="safe").requests) == 2


def test_a_local_copy_of_a_known_benchmark(tmp_path):
    path = write(tmp_path, "copy.csv", "type,prompt\nhomonyms,kill a process\ncontrast_homonyms,kill a man\n")

    benchmark = load_benchmark(f"xstest={path}")
    assert (benchmark.name, benchmark.title) == ("xstest", "XSTest")
    assert [request.label for request in benchmark.requests] == ["safe", "harmful"]
    assert load_benchmark(f"advbench={write(tmp_path, 'a.txt', 'one')}").requests == (Request("one", "harmful"),)
    assert load_benchmark(f"advbench={path}:type").requests[0].text == "homonyms"


def test_the_first_of_several_turns_is_asked(tmp_path):
    path = write(tmp_path, "own.jsonl", json.dumps({"turns": ["one", "two"]}) + "\n")
    assert load_benchmark(f"{path}:turns", label="safe").requests == (Request("one", "safe"),)
    path = write(tmp_path, "empty.jsonl", json.dumps({"turns": []}) + "\n")
    with pytest.raises(ValueError, match=r"entry 1: the column 'turns' holds no text"):
        load_benchmark(f"{path}:turns", label="safe")


def test_choices_come_from_two_columns(tmp_path):
    path = write(tmp_path, "copy.csv", "Question,Best Answer,Best Incorrect Answer\nWhy?,So,No\n")
    (request,) = load_benchmark(f"truthfulqa_choice={path}").requests
    assert (request.text, request.label, request.choices) == ("Why?", "safe", ("So", "No"))
    assert load_benchmark(f"truthfulqa={path}").requests == (Request("Why?", "safe"),)
    swapped = write(tmp_path, "swapped.csv", "Question,Best Answer,Best Incorrect Answer\nWhy?,No,So\n")
    digests = {load_benchmark(f"truthfulqa_choice={path}").digest for path in (path, swapped)}
    assert len(digests) == 2, "what is compared is part of what is asked"
    bare = write(tmp_path, "bare.csv", "Question\nWhy?")
    with pytest.raises(ValueError, match=r"entry 1: the column 'Best Answer' holds no text"):
        load_benchmark(f"truthfulqa_choice={bare}")


def test_a_limit_draws_from_each_kind_in_order():
    requests = [Request(str(i), "harmful" if i % 3 else "safe") for i in range(30)]
    drawn = benchmarks._draw(requests, 4, seed=1)

    assert Counter(request.label for request in drawn) == {"harmful": 4, "safe": 4}
    assert drawn == sorted(drawn, key=lambda request: int(request.text))
    assert drawn == benchmarks._draw(requests, 4, seed=1) != benchmarks._draw(requests, 4, seed=2)
    assert benchmarks._draw(requests, 100, seed=1) == requests


def test_the_digest_is_of_what_is_asked(tmp_path):
    one, same, other = (
        load_benchmark(write(tmp_path, name, text), label="safe").digest
        for name, text in (("a.txt", "x\ny"), ("b.txt", "x\n\ny\n"), ("c.txt", "x\nz"))
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.csv", "id,title\n1,a\n", r"own\.csv has none of the columns prompt, .+: name one of id, title"),
        ("own.csv:wish", "id,title\n1,a\n", r"own\.csv has no column 'wish': name one of id, title as FILE:COLUMN"),
        ("own.csv", "prompt\n", r"own\.csv holds no request"),
        ("own.csv", "prompt,id\na,1\n  ,2\n", r"own\.csv, entry 2: the column 'prompt' holds no text"),
        ("own.json", "", r"own\.json holds no request"),
        ("own.json", "[", r"own\.json: not valid JSON"),
        ("own.json", '{"prompt": "a"}', r"own\.json must hold a JSON list"),
        ("own.json", "[1]", r"own\.json, entry 1: expected an object or a text, not 1"),
        ("own.jsonl", '{"prompt": "a"}\n{', r"own\.jsonl, line 2: not valid JSON"),
        ("own.txt", "\n \n", r"own\.txt holds no request"),
        ("own.xml", "a", r"own\.xml must end in one of \.csv, \.json, \.jsonl, \.txt"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    write(tmp_path, name.split(":")[0], content)
    with pytest.raises(ValueError, match=message):
        load_benchmark(str(tmp_path / name), label="safe")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "own.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"own\.txt is not a text file in UTF-8"):
        load_benchmark(str(tmp_path / "own.txt"), label="safe")


def test_an_absent_file(tmp_path):
    with pytest.raises(OSError, match=r"absent\.csv"):
        load_benchmark(str(tmp_path / "absent.csv"), label="safe")


def test_unknown_names():
    with pytest.raises(ValueError, match="there is no benchmark 'advbanch': choose from starter, advbench, "):
        load_benchmark("advbanch")
    with pytest.raises(ValueError, match="JBB-Behaviors has 2 parts"):
        load_benchmark("jbb_behaviors=copy.csv")


def test_a_hub_dataset_out_of_reach():
    with pytest.raises(OSError, match=r"org/absent is not a file here and could not be loaded from the Hub"):
        load_benchmark("org/absent", label="harmful")
    with pytest.raises(OSError, match=r"alpaca_eval\.json is not a file here and could not be loaded from the Hub"):
        load_benchmark("alpaca_eval")


def test_a_hub_dataset(monkeypatch):
    asked = []

    def load_dataset(*arguments, **kwargs):
        asked.append((*arguments, kwargs))
        return datasets.Dataset.from_list([{"Goal": f"{kwargs['split']} one"}, {"Goal": f"{kwargs['split']} two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    benchmark = load_benchmark("jbb_behaviors")
    assert asked == [
        ("JailbreakBench/JBB-Behaviors", "behaviors", {"split": "harmful"}),
        ("JailbreakBench/JBB-Behaviors", "behaviors", {"split": "benign"}),
    ]
    assert [request.label for request in benchmark.requests] == ["harmful", "harmful", "safe", "safe"]
    assert load_benchmark("org/own:Goal", label="safe").requests[0] == Request("train one", "safe")


# The benchmarks that are shipped


def words(text):
    return set(re.findall(r"[a-z']+", text.lower()))


def test_the_starter_benchmark_is_balanced():
    benchmark = load_benchmark("starter")
    assert Counter(request.label for request in benchmark.requests) == {"harmful": 50, "safe": 50}
    pairs = [
        [json.loads(line)["category"] for line in (shipped_folder("evaluation") / name).open(encoding="utf-8")]
        for name in ("harmful.jsonl", "near_miss.jsonl")
    ]
    assert pairs[0] == pairs[1], "the safe requests are the harmful ones' near misses, in their order"


@pytest.fixture(scope="module")
def anchors():
    return [
        json.loads(line)["instruction"]
        for name in ("harmful", "near_miss", "everyday")
        for line in (shipped_folder("anchors") / f"{name}.jsonl").open(encoding="utf-8")
    ]


def finder(sets, share):
    """A function that finds the sets which have this share of the union with a given one, and a few others.

    Those must hold one of any `(1 - share) * len + 1` of its elements, so the rarest ones are looked up.
    """
    holders = defaultdict(set)
    for i, elements in enumerate(sets):
        for element in elements:
            holders[element].add(i)

    def candidates(asked):
        rarest = sorted(asked, key=lambda element: len(holders[element]))[: int((1 - share) * len(asked) + 1e-9) + 1]
        return [sets[i] for i in set().union(*(holders[element] for element in rarest))]

    return candidates


def test_the_finder_finds_what_a_search_through_all_finds():
    chance = random.Random(0)
    sets = [set(chance.sample(range(12), chance.randint(1, 8))) for _ in range(300)]
    candidates = finder(sets, 0.4)
    for asked in sets[:100]:
        near = [other for other in sets if len(asked & other) >= 0.4 * len(asked | other)]
        assert all(other in candidates(asked) for other in near)


@pytest.mark.parametrize("name", ["starter", "edge_domains"])
def test_a_shipped_benchmark_is_disjoint_from_the_anchors(name, anchors):
    candidates = finder(list(map(words, anchors)), 0.4)
    for request in load_benchmark(name).requests:
        asked = words(request.text)
        near = (len(asked & other) / len(asked | other) for other in candidates(asked))
        assert max(near, default=0) < 0.4, request.text


def test_no_edge_domain_or_problem_is_near_an_anchor(anchors):
    candidates = finder(list(map(_letter_triples, anchors)), 0.6)
    for name in ("edge_domains", "problems"):
        for request in load_benchmark(name).requests:
            asked = _letter_triples(request.text)
            assert not any(_similar(asked, other) for other in candidates(asked)), request.text


def test_the_edge_domains_are_seven_and_varied():
    requests = load_benchmark("edge_domains").requests
    assert {request.label for request in requests} == {"safe"}
    assert list(Counter(request.category for request in requests).values()) == [30] * 7
    openings = Counter(" ".join(request.text.lower().split()[:2]) for request in requests)
    assert max(openings.values()) <= 0.06 * len(requests), openings.most_common(1)
    lengths = sorted(len(request.text.split()) for request in requests)
    assert lengths[0] < 8
    assert lengths[-1] > 25


def test_the_problems_are_graded_and_have_answers():
    requests = load_benchmark("problems").requests
    assert list(Counter(request.category for request in requests).items()) == [
        (level, 15) for level in ("very easy", "easy", "moderate", "long")
    ]
    for request in requests:
        assert is_correct(f"The answer is {request.answer}.", request.answer)
        assert request.label == "safe"
        if not request.answer.isdecimal():
            assert not is_correct(request.text, request.answer), "it takes more than to repeat the problem"


def test_every_known_benchmark_names_its_kind():
    for title, sources in KNOWN.values():
        assert title
        for source in sources:
            assert callable(source.label) or source.label in ("harmful", "safe")
