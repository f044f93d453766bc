"""The notebooks of examples/notebooks/, executed from top to bottom.

python tests/notebooks.py [NAME ...]     whole, and their outputs are written into them (make notebooks)
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def execute(path, folder, parameters=None):
    """Execute a notebook in a folder; returns it with its outputs, of which progress and warnings are left out.

    Args:
        path: the notebook.
        folder: where its kernel runs, and what it writes goes.
        parameters: what becomes of names that its cell with the tag "parameters" sets.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        [at] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
        lines = [f"{name} = {value!r}" for name, value in parameters.items()]
        notebook.cells.insert(at + 1, new_code_cell("\n".join(lines)))
    metadata = nbformat.from_dict(notebook.metadata)
    resources = {"metadata": {"path": str(folder)}}
    options = {"record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=resources, **options).execute()
    notebook.metadata = metadata  # the kernel's own would name the version of Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for data in (output.data for output in cell.outputs if "text/html" in output.get("data", {})):
                data.pop("text/plain", None)  # the same at length, as Python writes it
    return notebook


def machine_paths(notebook, *folders):
    """The paths of this machine that stand in a notebook."""
    text = nbformat.writes(notebook)
    known = {str(path) for path in (ROOT, Path.home(), tempfile.gettempdir(), *folders)}
    return sorted(path for path in known if f"{path}/" in text)


def main(names):
    for path in NOTEBOOKS:
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                notebook = execute(path, folder)
                assert not machine_paths(notebook, folder), machine_paths(notebook, folder)
            nbformat.write(notebook, path)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
