"""Signatures: of one key, on one text, for one purpose."""

import pytest

from clinifed.errors import PrivacyError
from clinifed.privacy.signing import make_signing_key, public_key, read_signing_key, sign, verify


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
