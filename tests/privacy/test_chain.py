"""The chain of records: nothing altered, dropped, moved, cut or rolled back goes unseen."""

import random
from pathlib import Path

import pytest

from clinifed.errors import LedgerError
from clinifed.privacy import chain as module
from clinifed.privacy.chain import GENESIS, Chain

RECORDS = 12
MUTATIONS = 1000


def grow(chain: Chain, count: int) -> None:
    for number in range(count):
        with chain.locked() as (_, append):
            append({"version": 2, "kind": "charge", "units": number})


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    chain = Chain(tmp_path / "ledger.jsonl")
    chain.create({"version": 2, "kind": "open"})
    grow(chain, RECORDS - 1)
    return chain


def test_records_come_back_in_order_and_chained(chain):
    view = Chain(chain.path).read()
    assert [r["seq"] for r in view.records] == list(range(1, RECORDS + 1))
    assert [r["prev"] for r in view.records] == [GENESIS, *(r["hash"] for r in view.records[:-1])]
    assert (view.head, view.torn_bytes, view.ahead) == (view.records[-1]["hash"], 0, False)


def mutate(whole: bytes, dice: random.Random) -> tuple[str, bytes]:
    """One change of the file's bytes, of the kind that a fault or a person makes."""
    lines = whole.splitlines(keepends=True)
    kind = dice.choice(["edit", "flip", "delete", "reorder", "truncate", "roll back", "duplicate", "insert"])
    place = dice.randrange(len(whole))
    line, other = dice.sample(range(len(lines)), 2)
    if kind == "edit":
        return kind, whole[:place] + bytes([dice.choice(b'0123456789abcdef{}", \n')]) + whole[place + 1 :]
    if kind == "flip":
        return kind, whole[:place] + bytes([whole[place] ^ (1 << dice.randrange(8))]) + whole[place + 1 :]
    if kind == "delete":
        return kind, b"".join(lines[:line] + lines[line + 1 :])
    if kind == "reorder":
        lines[line], lines[other] = lines[other], lines[line]
        return kind, b"".join(lines)
    if kind == "truncate":
        return kind, whole[:place]
    if kind == "roll back":
        return kind, b"".join(lines[:line])
    if kind == "duplicate":
        return kind, b"".join(lines[: line + 1] + lines[line:])
    return kind, b"".join([*lines[:line], lines[other], *lines[line:]])


def test_each_of_a_thousand_mutations_is_detected(chain):
    """By a fresh reader, and by one that had verified the file before."""
    whole, dice, unseen, made = chain.path.read_bytes(), random.Random(7), [], 0
    while made < MUTATIONS:
        kind, changed = mutate(whole, dice)
        if changed == whole:
            continue
        made += 1
        chain.path.write_bytes(changed)
        for reader in (Chain(chain.path), chain):
            try:
                reader.read()
            except LedgerError:
                continue
            unseen.append((made, kind))
    chain.path.write_bytes(whole)
    assert unseen == []
    assert len(chain.read().records) == RECORDS  # and the file itself is well


@pytest.mark.parametrize("gone", ["file", "anchor", "both"])
def test_a_missing_file_stops_everything(chain, gone):
    if gone in ("file", "both"):
        chain.path.unlink()
    if gone in ("anchor", "both"):
        chain.anchor.unlink()
    with pytest.raises(LedgerError, match="cannot be opened" if gone != "anchor" else "does not meet"):
        chain.read()


def test_an_anchor_that_names_another_head_is_detected(chain):
    for content in ("f" * 64, "", "no hash", chain.read().records[-3]["hash"]):
        chain.anchor.write_text(content)
        with pytest.raises(LedgerError, match="does not meet"):
            chain.read()


def test_a_chain_one_record_ahead_of_its_anchor_is_accepted(chain):
    anchor = chain.anchor.read_bytes()
    grow(chain, 1)
    chain.anchor.write_bytes(anchor)
    assert (len(Chain(chain.path).read().records), Chain(chain.path).read().ahead) == (RECORDS + 1, True)
    grow(chain, 1)
    assert not chain.read().ahead


def test_a_torn_last_line_is_seen_by_readers_and_cut_off_by_the_next_writer(chain):
    whole = chain.path.read_bytes()
    chain.path.write_bytes(whole + b'{"half": ')
    assert chain.read().torn_bytes == 9
    assert chain.path.read_bytes() != whole
    grow(chain, 1)
    assert len(Chain(chain.path).read().records) == RECORDS + 1


def test_an_existing_chain_or_anchor_is_never_replaced(chain, tmp_path):
    with pytest.raises(LedgerError, match="exists"):
        chain.create({"kind": "open"})
    chain.path.unlink()
    with pytest.raises(LedgerError, match="exists"):
        chain.create({"kind": "open"})


def test_the_anchor_may_lie_elsewhere(tmp_path):
    (tmp_path / "disk").mkdir()
    chain = Chain(tmp_path / "ledger.jsonl", tmp_path / "disk" / "head")
    chain.create({"kind": "open"})
    grow(chain, 1)
    assert (tmp_path / "disk" / "head").read_text() == chain.read().head
    with pytest.raises(LedgerError, match="does not meet"):
        Chain(tmp_path / "ledger.jsonl").read()


def test_files_are_their_owners_alone(chain):
    assert chain.path.stat().st_mode & 0o777 == 0o600
    assert chain.anchor.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("failing", ["fsync", "sync_folder", "write_atomic"])
def test_a_write_that_fails_is_an_error_and_the_chain_stays_whole(chain, monkeypatch, failing):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os if failing == "fsync" else module, failing, full)
        with pytest.raises(LedgerError, match="No space left"):
            grow(chain, 1)
    grow(chain, 1)
    assert len(Chain(chain.path).read().records) in (RECORDS + 1, RECORDS + 2)  # what reached the file counts


def test_crashes_in_a_row_between_record_and_anchor_never_leave_the_chain_two_ahead(chain, monkeypatch):
    real = module.write_atomic

    def die_at_the_end(path: Path, content: bytes, mode: int) -> None:
        if content.decode() != before:
            raise KeyboardInterrupt
        real(path, content, mode)

    monkeypatch.setattr(module, "write_atomic", die_at_the_end)
    for crash in range(3):
        before = Chain(chain.path).read().head  # whose anchor may still be to be moved
        with pytest.raises(KeyboardInterrupt):
            grow(Chain(chain.path), 1)
        assert len(Chain(chain.path).read().records) == RECORDS + crash + 1
    monkeypatch.undo()
    grow(Chain(chain.path), 1)
    assert not Chain(chain.path).read().ahead
