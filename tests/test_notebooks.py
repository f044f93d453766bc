"""The notebooks run from top to bottom on the demo model, and are committed with what they show."""

import nbformat
import pytest

from notebooks import NOTEBOOKS, execute, machine_paths

# With these, each takes seconds
PARAMETERS = {
    "evaluate_and_plot": {"limit": 1, "max_new_tokens": 4},
    "read_the_token_view": {"max_new_tokens": 3, "alphas": [0.0, 0.5]},
    "train_a_small_pair": {
        "per_kind": 4,
        "steps": (1, 1),
        "num_virtual_tokens": 4,
        "max_new_tokens": 4,
        "held_out": 1,
    },
    "use_a_pair": {"max_new_tokens": 4},
}


def test_every_notebook_is_tested():
    assert sorted(PARAMETERS) == [path.stem for path in NOTEBOOKS]


@pytest.mark.real_model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path):
    notebook = execute(path, tmp_path, PARAMETERS[path.stem])
    assert pictures(notebook) == pictures(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_as_one_run_left_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not machine_paths(notebook)
    assert path.stat().st_size < 400_000


def pictures(notebook):
    """How many pictures the outputs hold."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)
