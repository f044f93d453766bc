"""Files that appear in one step."""

import pytest

from acd_logits.files import write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old\n")
    write_text(path, "new, \u2014\n")
    assert path.read_bytes() == "new, \u2014\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it" + "\ud800")
    assert path.read_bytes() == "new, \u2014\n".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
