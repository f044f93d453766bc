"""The shape of the package: imports point one way, no circles, and no module outgrows a reader."""

import ast
import graphlib
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "acd_logits"
MAX_LINES = 450

# From the top to the bottom; rooms on one floor do not import each other. What is not named is a leaf
FLOORS = [{"cli"}, {"training", "evaluation", "vllm"}, {"anchors"}, {"decoding"}, {"pairs"}]
LEAVES = len(FLOORS)


def module_name(path):
    """The name inside of the package, such as "training.data"; "" is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name):
    """The modules of the package that a module imports, wherever the import stands: in a function, for types only."""
    path, found = FILES[name], set()
    package = "acd_logits." + name if path.name == "__init__.py" else ("acd_logits." + name).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package.rstrip("."))
            found.update(f"{module}.{alias.name}" for alias in node.names)
    targets = set()
    for target in found - {"acd_logits.__version__"}:
        if target.partition(".")[0] != "acd_logits":
            continue
        inside = target.removeprefix("acd_logits").removeprefix(".")
        # The last part is a module or a name within one
        targets.add(inside if inside in FILES else inside.rpartition(".")[0])
    return targets


GRAPH = {name: imported(name) for name in FILES}
ARROWS = {(name, target) for name, targets in GRAPH.items() for target in targets}


def room(name):
    """The package a module is in, or, at the top of acd_logits, the module itself."""
    return name.partition(".")[0]


def floor(name):
    """0 at the top. The package's own `__init__` shows what is inside: it stands above all."""
    if not name:
        return -1
    return next((i for i, rooms in enumerate(FLOORS) if room(name) in rooms), LEAVES)


def is_wrong(name, target):
    """Whether an arrow points up, or from room to room on one floor; leaves may import leaves."""
    here, there = floor(name), floor(target)
    return here > there or (here == there != LEAVES and room(name) != room(target))


def find_circle(arrows):
    """The modules of a circle, or None."""
    graph = {name: {target for source, target in arrows if source == name} for name in FILES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def count_lines(name):
    return len(FILES[name].read_text(encoding="utf-8").splitlines())


def test_the_package_is_read_whole():
    """Every kind of import is seen: from a package, of a module, in a function, and for types."""
    assert {"cli.train", "training.loss", "anchors", "evaluation.arms", "vllm.models", "files"} <= set(FILES)
    assert ("training.data", "anchors") in ARROWS
    assert ("training.run", "training.trainer") in ARROWS
    assert ("cli.train", "training") in ARROWS, "it stands in a function"
    assert ("training.trainer", "training.arguments") in ARROWS, "it is for types"


def test_imports_point_down():
    assert sorted(arrow for arrow in ARROWS if is_wrong(*arrow)) == []


def test_modules_import_each_other_in_no_circle():
    assert find_circle(ARROWS) is None


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_module_is_too_long(name):
    assert count_lines(name) <= MAX_LINES


@pytest.mark.parametrize(
    ("arrow", "wrong"),
    [
        (("cli.train", "training"), False),
        (("training.run", "files"), False),
        (("training.run", "training.data"), False),
        (("files", "refusal"), False),
        (("training.run", "cli.main"), True),
        (("training.run", "evaluation.arms"), True),
        (("vllm.models", "training"), True),
        (("anchors.splits", "training.data"), True),
        (("files", "anchors"), True),
        (("training.run", ""), True),
    ],
)
def test_what_is_wrong_is_seen(arrow, wrong):
    assert is_wrong(*arrow) is wrong


def test_circles_are_seen():
    assert find_circle({("files", "refusal"), ("refusal", "responses"), ("responses", "files")})
    assert find_circle({("files", "refusal"), ("responses", "refusal")}) is None
