import pytest
import transformers
from packaging.version import Version

from families import EXACT, KNOWN, PAGE, UNBUILT, VERSION, build, names, outcome, row, shares

pytestmark = [
    pytest.mark.families,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version(VERSION), reason=f"{PAGE.name} is about transformers {VERSION}"
    ),
]

COMMAND = "run `python tests/families.py --output_file docs/families.md`"


@pytest.mark.parametrize("name", list(names()))
def test_family_does_what_the_table_says(name):
    """ACD equals two forwards per row on every family, or is refused for a reason that is listed."""
    try:
        model = build(name)
    except Exception as error:
        assert name in UNBUILT, (
            f"transformers {transformers.__version__} has a family that no tiny model could be built of, {name} "
            f"({type(error).__name__}: {error}): say what its configuration needs in FAMILIES, or why it is left "
            "out in UNBUILT, both in tests/families.py."
        )
        found = shared = None
    else:
        assert name not in UNBUILT, f"{name} can be built now: take it out of UNBUILT in tests/families.py."
        found = outcome(model)
        assert found == KNOWN.get(name, EXACT), (
            f"{name} is {found!r}, and not {KNOWN.get(name, EXACT)!r}: mend what changed, or change KNOWN in "
            "tests/families.py."
        )
        shared = shares(model, found)
    assert row(name, found, shared) in PAGE.read_text().splitlines(), f"{COMMAND}: {name} is not in it as it is."


def test_table_has_no_family_that_is_gone():
    rows = [line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows == list(names()), COMMAND
    assert not {*KNOWN, *UNBUILT} - set(rows), "tests/families.py lists families that transformers has not."
