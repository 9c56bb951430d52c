import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinifed.data.duplicates import REMEDY, Person, Sighting, contradictions, duplicates
from clinifed.data.fingerprint import Fingerprint
from clinifed.data.manifest import Record


def seen(file, patient="p1", *, pixels="", uid="", label="normal", split="train", issuer="A", number=None, path=None):
    record = Record(f"images/{file}", patient, "radiology", label, "", split, file)
    return Sighting(Path(path or file), record, Person(issuer, number or patient), Fingerprint(file, pixels, uid))


@pytest.mark.parametrize("key", ["pixels", "uid"])
def test_copies_within_a_patient_are_one_and_the_least_file_stays(key):
    rows = [seen("b", **{key: "1"}), seen("a", **{key: "1"}), seen("c"), seen("d", "p2")]
    for order in itertools.permutations(rows):
        assert contradictions(order) == {}
        left = duplicates(order)
        assert [order[i].record.image for i in left] == ["images/b"]
        assert set(left.values()) == {"duplicate of another image"}


def test_copies_are_found_through_a_third():
    rows = [seen("a", uid="1"), seen("b", uid="1", pixels="2"), seen("c", pixels="2"), seen("d", pixels="3")]
    assert sorted(duplicates(rows)) == [1, 2]


def test_a_file_listed_again_is_told_as_such():
    assert duplicates([seen("a"), seen("a")]) == {1: "listed twice"}
    assert duplicates([seen("a"), seen("a", path="copy")]) == {1: "duplicate of another image"}


def test_no_uid_and_no_picture_are_nothing_in_common():
    rows = [seen("a"), seen("b"), seen("c", "p2")]
    assert contradictions(rows) == duplicates(rows) == {}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([seen("a", "p1", pixels="1"), seen("b", "p2", pixels="1")], "same picture in two patients"),
        ([seen("a", "p1", uid="1"), seen("b", "p2", uid="1")], "same SOPInstanceUID in two patients"),
        ([seen("a", "p1"), seen("a", "p2")], "listed for two patients"),
        ([seen("a", "p1"), seen("b", "p1", split="holdout")], "patient is in two splits"),
        ([seen("a", uid="1"), seen("b", uid="1", label="abnormal")], "copies of one image have different labels"),
        ([seen("a", "p1", number="7"), seen("b", "p2", number="7", issuer="")], "patient's number also occurs"),
    ],
)
def test_what_contradicts_is_told_of_every_row_of_it_and_of_no_other(rows, reason):
    others = [seen("y", "p8", pixels="y", uid="y"), seen("z", "p9", pixels="z", uid="z")]
    found = contradictions([others[0], *rows, others[1]])
    assert sorted(found) == [1, 2]
    assert all(why.startswith(reason) for why in found.values())
    assert set(found.values()) <= set(REMEDY)


def test_labels_in_another_order_are_the_same_labels():
    rows = [seen("a", uid="1", label="x|y"), seen("b", uid="1", label="y|x")]
    assert contradictions(rows) == {}
    assert contradictions([*rows, seen("c", uid="1", label="x")]) == dict.fromkeys(
        range(3), "copies of one image have different labels"
    )


ROWS = st.lists(
    st.builds(
        seen,
        st.sampled_from("abcdef"),
        st.sampled_from(["p1", "p2", "p3"]),
        pixels=st.sampled_from(["", "1", "2", "3"]),
        uid=st.sampled_from(["", "1", "2", "3"]),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(ROWS)
def test_what_stays_shares_nothing_with_what_stays_and_everything_else_has_a_copy_that_stays(rows):
    if contradictions(rows):
        shared = [
            (a, b) for a, b in itertools.combinations(rows, 2) if a.record.patient != b.record.patient and _alike(a, b)
        ]
        assert shared, "only an image of two patients contradicts anything here"
        return
    left = duplicates(rows)
    kept = [row for i, row in enumerate(rows) if i not in left]
    assert not any(_alike(a, b) for a, b in itertools.combinations(kept, 2))
    assert {row.record.patient for row in kept} == {row.record.patient for row in rows}


@settings(deadline=None)
@given(ROWS, st.randoms())
def test_order_changes_neither_what_contradicts_nor_what_stays(rows, chance: random.Random):
    mixed = rows[:]
    chance.shuffle(mixed)

    def told(these, which):
        return sorted((these[i].record.image, these[i].record.patient, why) for i, why in which(these).items())

    assert told(rows, contradictions) == told(mixed, contradictions)
    if not contradictions(rows):
        kept = [{r.record for i, r in enumerate(these) if i not in duplicates(these)} for these in (rows, mixed)]
        assert kept[0] == kept[1]


def _alike(a, b):
    one, two = a.prints, b.prints
    return (
        one.sha256 == two.sha256
        or (one.pixels and one.pixels == two.pixels)
        or (one.sop_instance_uid and one.sop_instance_uid == two.sop_instance_uid)
    )
