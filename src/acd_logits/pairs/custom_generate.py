"""What a pair's repository carries for `generate(..., custom_generate="org/pair", trust_remote_code=True)`.

transformers fetches the script, runs it, and calls its `generate`. The script is nothing but a call of the installed
package. transformers raises if the package is missing, or older than the requirements say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import __version__

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = "custom_generate"
_SCRIPT = '''"""Adversarial Contrastive Decoding with the prompt pair of this repository.

All that it does is in the package acd-logits, which must be installed.
"""

from acd_logits.decoding.custom_generate import generate_with_pair


def generate(model, **kwargs):
    """Take what `model.generate` takes, and the options of `ACDLogitsProcessor`: alpha, beta, horizon and so on."""
    return generate_with_pair(model, {repo_id!r}, **kwargs)
'''


def write_custom_generate(folder: Path, repo_id: str) -> None:
    """Write `custom_generate/generate.py` and `custom_generate/requirements.txt` for a repository into a folder."""
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "generate.py").write_text(_SCRIPT.format(repo_id=repo_id), encoding="utf-8")
    (folder / FOLDER / "requirements.txt").write_text(f"acd-logits>={__version__}\n", encoding="utf-8")
