"""Signatures: of one key, on one text, for one purpose; and the files that keys are kept in."""

import os

import pytest

from clinifed.errors import ConfigError, PrivacyError
from clinifed.signing import (
    make_key_pair,
    make_signing_key,
    public_key,
    read_signing_key,
    sign,
    trusted_keys,
    verify,
)


@pytest.fixture
def key(tmp_path):
    return make_signing_key(tmp_path / "key")


def test_a_signature_is_of_one_key_one_text_and_one_purpose(key, tmp_path):
    other = make_signing_key(tmp_path / "other")
    signature = sign(key, "update", "a" * 64)
    assert verify(public_key(key), "update", "a" * 64, signature)
    assert not verify(public_key(other), "update", "a" * 64, signature)
    assert not verify(public_key(key), "update", "b" * 64, signature)
    assert not verify(public_key(key), "budget increase", "a" * 64, signature)


@pytest.mark.parametrize("public", ["", "zz", "00" * 31, "00" * 32])
@pytest.mark.parametrize("signature", ["", "no", "00" * 64])
def test_what_is_malformed_is_not_valid(public, signature):
    assert not verify(public, "update", "a" * 64, signature)


def test_a_key_survives_its_file_is_its_owners_alone_and_is_never_overwritten(key, tmp_path):
    path = tmp_path / "key"
    assert public_key(read_signing_key(path)) == public_key(key)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(PrivacyError, match="never overwritten"):
        make_signing_key(path)


def test_a_missing_damaged_or_readable_key_is_refused_and_not_shown(tmp_path):
    with pytest.raises(PrivacyError, match="no signing key"):
        read_signing_key(tmp_path / "absent")
    path = tmp_path / "key"
    make_signing_key(path)
    path.chmod(0o644)
    with pytest.raises(PrivacyError, match="owner alone"):
        read_signing_key(path)
    path.chmod(0o600)
    path.write_text("secret nonsense")
    with pytest.raises(PrivacyError, match="64 hexadecimal") as caught:
        read_signing_key(path)
    assert "nonsense" not in str(caught.value)


def test_a_key_pair_is_two_files_of_one_key_and_the_private_one_is_its_owners_alone(tmp_path):
    key = make_key_pair(tmp_path / "coordinator")
    assert public_key(read_signing_key(tmp_path / "coordinator")) == public_key(key)
    assert (tmp_path / "coordinator.pub").read_text() == public_key(key) + "\n"
    assert trusted_keys(tmp_path / "coordinator.pub") == (public_key(key),)
    assert (tmp_path / "coordinator").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("there", ["key", "key.pub"])
def test_neither_half_of_a_pair_is_overwritten_and_no_half_is_left(there, tmp_path):
    (tmp_path / there).write_text("mine")
    with pytest.raises(PrivacyError, match=f"{there} exists; a signing key is never overwritten"):
        make_key_pair(tmp_path / "key")
    assert [p.name for p in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_a_pair_whose_public_half_cannot_be_written_leaves_no_private_one(tmp_path):
    longest = "k" * 253  # the name of the public half is too long for a file system
    with pytest.raises(PrivacyError, match="cannot be written"):
        make_key_pair(tmp_path / longest)
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(PrivacyError, match="No space left"):
        make_signing_key(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


def test_trusted_keys_are_digits_a_file_or_a_folder(tmp_path):
    keys = [public_key(make_key_pair(tmp_path / name)) for name in ("b", "a")]
    assert trusted_keys(keys[0]) == (keys[0],)
    assert trusted_keys(keys[0] + "\n") == (keys[0],)
    assert trusted_keys(str(tmp_path / "b.pub")) == (keys[0],)
    assert set(trusted_keys(tmp_path)) == set(keys)
    (tmp_path / "again.pub").write_text(keys[0])
    assert len(trusted_keys(tmp_path)) == 2


def test_every_file_that_holds_no_public_key_is_named_and_none_is_shown(tmp_path):
    private = make_key_pair(tmp_path / "good").private_bytes_raw().hex()
    wrong = {"empty": "", "short": "ab" * 31, "long": "ab" * 33, "words": "z" * 64, "capitals": "AB" * 32}
    for name, text in wrong.items():
        (tmp_path / f"{name}.pub").write_text(text)
    (tmp_path / "folder.pub").mkdir()
    with pytest.raises(ConfigError) as caught:
        trusted_keys(tmp_path)
    assert len(caught.value.problems) == len(wrong) + 1
    assert all(f"{name}.pub: " in str(caught.value) for name in [*wrong, "folder"])
    for source in (tmp_path / "good", tmp_path / "absent", "ab" * 31, "AB" * 32, ""):
        with pytest.raises(ConfigError) as caught:
            trusted_keys(source)
        assert private not in str(caught.value)


def test_a_folder_without_keys_trusts_nobody(tmp_path):
    with pytest.raises(ConfigError, match="holds no public key"):
        trusted_keys(tmp_path)
