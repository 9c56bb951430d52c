"""The outbox: whole or absent, the same bytes as often as asked, never replaced."""

import numpy as np
import pytest

from clinifed.errors import PrivacyError
from clinifed.messages import Update, release_sha256
from clinifed.privacy.outbox import Outbox, pack, unpack

META = {"job": "j", "nonce": "0" * 32, "claim": {"epsilon": 0.1}, "ledger_head": "a" * 64, "signature": "b" * 128}


@pytest.fixture
def update() -> Update:
    params = {"heads.b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "heads.a.bias": np.float32([1, -2])}
    return Update("alder", 4, params, META)


def test_an_update_survives_the_disk_to_the_bit(update, tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    outbox.put("j", update)
    again = Outbox(tmp_path / "outbox").get("j", 4)
    assert again is not None
    assert release_sha256(again) == release_sha256(update)
    assert pack(again) == pack(update)
    assert (again.site, again.round, again.meta) == ("alder", 4, META)


def test_order_of_parameters_changes_nothing(update):
    turned = Update("alder", 4, dict(reversed(update.params.items())), META)
    assert pack(turned) == pack(update)
    assert release_sha256(turned) == release_sha256(update)


@pytest.mark.parametrize("part", ["site", "round", "meta", "params", "shape"])
def test_the_hash_covers_everything_but_the_signature(update, part):
    bias = update.params["heads.a.bias"]
    other = {
        "site": Update("birch", 4, update.params, META),
        "round": Update("alder", 5, update.params, META),
        "meta": Update("alder", 4, update.params, {**META, "nonce": "1" * 32}),
        "params": Update("alder", 4, {**update.params, "heads.a.bias": bias + 1}, META),
        "shape": Update("alder", 4, {**update.params, "heads.a.bias": bias.reshape(2, 1)}, META),
    }[part]
    assert release_sha256(other) != release_sha256(update)
    unsigned = Update("alder", 4, update.params, {**META, "signature": "c" * 128})
    assert release_sha256(unsigned) == release_sha256(update)


def test_a_release_is_never_replaced(update, tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put("j", update)
    with pytest.raises(PrivacyError, match="never replaced"):
        outbox.put("j", update)


def test_other_jobs_and_rounds_have_none(update, tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put("j", update)
    assert outbox.get("j", 3) is None
    assert outbox.get("k", 4) is None
    outbox.clean(["k"])
    assert outbox.get("j", 4) is not None
    outbox.clean(["j"])
    assert outbox.get("j", 4) is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"no safetensors at all"])
def test_a_damaged_release_is_never_sent(update, tmp_path, content):
    outbox = Outbox(tmp_path)
    path = outbox.put("j", update)
    path.write_bytes(content)
    with pytest.raises(PrivacyError, match="damaged"):
        outbox.get("j", 4)
    with pytest.raises(PrivacyError, match="damaged"):
        unpack(pack(update)[:-1])


def test_files_are_their_owners_alone_and_their_names_say_nothing(update, tmp_path):
    path = Outbox(tmp_path / "outbox").put("job of MILLER^ANNA", update)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    assert "MILLER" not in str(path)
