"""Who withdrew consent: a list that only grows, owner-only, and is never taken for empty when it cannot be read."""

import pytest

from clinifed.errors import DataError
from clinifed.privacy.withdrawn import Withdrawn


def test_a_patient_who_is_on_the_list_stays_on_it(tmp_path):
    listed = Withdrawn(tmp_path / "ledger.jsonl.withdrawn")
    assert listed.patients() == frozenset()
    for name in ("b" * 20, "a" * 20, "b" * 20):
        listed.add(name)
    assert listed.patients() == {"a" * 20, "b" * 20}
    assert listed.path.read_text() == "a" * 20 + "\n" + "b" * 20 + "\n"
    assert listed.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("spoil", ["folder", "bytes"])
def test_a_list_that_cannot_be_read_is_an_error_and_never_an_empty_list(tmp_path, spoil):
    listed = Withdrawn(tmp_path / "list")
    if spoil == "folder":
        listed.path.mkdir()
    else:
        listed.path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="who withdrew cannot be read"):
        listed.patients()
