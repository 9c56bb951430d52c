"""Files: whole or absent, one text for equal content, torn lines left out."""

import math

import pytest

from clinifed.files import append_line, canonical_json, file_sha256, read_lines, write_atomic, write_json


def test_equal_content_has_equal_bytes() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == canonical_json({"a": [1.5, "é"], "b": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(tmp_path, value) -> None:
    with pytest.raises(ValueError):
        canonical_json({"epsilon": value})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_owner_only_is_owner_only(tmp_path) -> None:
    write_atomic(tmp_path / "secret", b"", 0o600)
    append_line(tmp_path / "lines", {})
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}


def test_a_reader_sees_whole_lines_only(tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    append_line(path, {"n": 1})
    append_line(path, {"n": 2})
    with path.open("ab") as file:
        file.write(b'{"n": 3')
    assert read_lines(path) == [{"n": 1}, {"n": 2}]


def test_the_hash_is_sha256(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
