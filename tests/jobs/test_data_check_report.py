"""What ``clinifed data check`` writes: what may leave the site names nobody and no small group."""

import argparse
import itertools
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from clinifed.cli_data_check import add_check_verbs
from clinifed.errors import DataError, PrivacyError
from clinifed.jobs.data_check import CHECKS, data_check, site_under_check
from clinifed.jobs.data_check_report import check_table, write_page, write_shareable
from clinifed.jobs.data_checks_share import Counts, Shared, known_reason
from clinifed.jobs.data_checks_site import Finding
from clinifed.models import backbone
from clinifed.models.shards import Shards

from .checked_site import Site, dicom, load_once, record, says, told

REAL = Path(__file__).parents[2].parent / "shared/data/open"


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "load_backbone", load_once)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


class TestShare:
    """What may leave."""

    def test_planted_names_numbers_uids_and_paths_never_leave(self, site: Site, tmp_path: Path) -> None:
        planted = {
            "PatientName": "Okonkwo^Amara",
            "PatientID": "MRN5318908",
            "PatientBirthDate": "19361223",
            "AccessionNumber": "ACC72637486",
            "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.5318908",
            "SOPInstanceUID": "1.2.826.0.1.3680043.8.498.19361223",
            "Modality": "OKONKWO",
        }
        image = "Okonkwo_Amara/MRN5318908_19361223.dcm"
        dicom(site.home / image, 1, **planted)
        site.records[1] = record(1, image=image, patient="MRN5318908", label="Okonkwo", caption="Okonkwo, Amara")
        site.records[2] = record(2, specialty="Okonkwo^Amara")
        (site.home / site.records[3].image).write_bytes(b"DICM Okonkwo^Amara")
        found = site.check()
        own = json.dumps(found.to_dict())
        sent = told(found, tmp_path)
        for term in ("Okonkwo", "OKONKWO", "Amara", "5318908", "19361223", "ACC72637486", "1.2.826", ".dcm"):
            assert term.encode() not in sent, term
            assert term not in own, term
        for path in (str(site.home), str(tmp_path), "manifest.csv", *(r.patient for r in site.records)):
            assert path.encode() not in sent, path
        assert b"row" not in sent.replace(b'scope="row"', b"").replace(b"rows that may name somebody", b"")

    def test_small_counts_and_the_sums_that_would_give_them_away_are_not_told(self, site: Site, tmp_path: Path) -> None:
        site.records = [record(n, label="abnormal" if n < 3 else "normal") for n in range(24)]
        content = site.check().shared_dict()
        lines = content["checks"]["labels"]["says"]
        assert [line.strip() for line in lines] == [
            "patients to train on: withheld",
            "radiology: withheld",
            "normal: 20–29",
            "abnormal: <10",
        ]
        numbers = re.findall(rb"(?<![\d.])\d+(?![\d.])", told(site.check(), tmp_path).replace(b"sha256", b""))
        assert {b"24", b"21", b"3"}.isdisjoint(numbers)

    def test_a_larger_minimum_is_kept_to(self, site: Site) -> None:
        lines = site.check(minimum=15).shared_dict()["checks"]["labels"]["says"]
        assert [line.split(": ")[1] for line in lines] == ["withheld", "withheld", "<15", "<15"]

    def test_a_verdict_on_the_true_number_of_patients_stays_at_the_site(self, site: Site) -> None:
        site.federation["sites"]["alder"]["nominal_patients"] = 30
        assert site.check().shared_dict()["checks"]["privacy outlook"]["level"] is None
        policy, _ = site.write()
        assert data_check(site_under_check(policy)).shared_dict()["checks"]["privacy outlook"]["level"] is None

    def test_a_check_that_would_tell_a_row_is_stopped_and_nothing_is_written(self, site: Site, tmp_path: Path) -> None:
        found = site.check()
        for leak in (site.records[4].patient, Path(site.records[4].image).name, "ALDER"):
            found.findings["GPU"] = Finding("PASS", ("x",), "", Shared((f"seen in {leak}, once",)))
            with pytest.raises(PrivacyError, match="not written"):
                write_shareable(found, tmp_path / "share.txt")
            assert not (tmp_path / "share.txt").exists()

    def test_reasons_that_no_code_wrote_are_other_reasons(self) -> None:
        for reason in ("no pixel data", "larger than 256 MiB when decoded", "missing codec for JPEG-LS"):
            assert known_reason(reason) == reason
        for reason in ("cannot read /data/Okonkwo.dcm", "1.2.840.10008", "patient 5318908", "x" * 90, "a^b"):
            assert known_reason(reason) == "other"

    @pytest.mark.parametrize("minimum", [3, 4])
    def test_by_all_that_is_told_a_small_count_may_be_any_small_number(self, minimum: int) -> None:
        """Every table of two groups of two, by trying all tables that look the same."""

        def look(cells: tuple[int, ...]) -> tuple[str, ...]:
            groups = [Counts(f"g{i}", sum(pair), tuple(Counts("c", n) for n in pair)) for i, pair in _pairs(cells)]
            return tuple(line.text for line in Counts("all", sum(cells), tuple(groups)).told(minimum))

        most = 3 * minimum
        tables: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        for cells in itertools.product(range(most), repeat=4):
            tables.setdefault(look(cells), []).append(cells)
        small = 0
        for same in tables.values():
            for cell in range(4):
                if same[0][cell] < minimum:
                    small += 1
                    assert {cells[cell] for cells in same} == set(range(minimum))
        assert small > 10


def _pairs(cells: tuple[int, ...]) -> list[tuple[int, tuple[int, int]]]:
    return [(0, (cells[0], cells[1])), (1, (cells[2], cells[3]))]


def test_the_page_is_whole_loads_nothing_and_escapes_what_it_holds(site: Site, tmp_path: Path) -> None:
    found = site.check()
    found.findings["GPU"] = Finding("WARN", ("<script>alert(1)</script>",), "<b>&")
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href)=", page) == []
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600
    for name in CHECKS:
        assert f">{name}<" in page


def test_the_table_shows_every_check_and_brackets_as_they_are(site: Site) -> None:
    found = site.check()
    found.findings["GPU"] = Finding("PASS", ("[red]x[/red]",))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(check_table(found))
    assert all(name in captured.get() for name in CHECKS)
    assert "[red]x[/red]" in captured.get()


class Spoken:
    def __init__(self) -> None:
        self.said: list[object] = []

    def progress(self, text: str) -> None:
        pass

    def result(self, content: object, *tables: object) -> None:
        self.said.append(content)


@pytest.fixture
def cli() -> Callable[..., Spoken]:
    parser = argparse.ArgumentParser()

    def verb(name: str, run: object, help_text: str, parent: argparse._SubParsersAction) -> argparse.ArgumentParser:
        added = parent.add_parser(name, help=help_text)
        added.set_defaults(run=run)
        return added

    add_check_verbs(parser.add_subparsers(), verb)

    def run(*words: object) -> Spoken:
        args, console = parser.parse_args([str(word) for word in words]), Spoken()
        args.console = console
        args.run(args, console)
        return console

    return run


def test_the_verb_writes_what_is_asked_for_and_fails_where_a_check_failed(site: Site, tmp_path: Path, cli) -> None:
    policy, federation = site.write()
    page, share = tmp_path / "p.html", tmp_path / "s.json"
    [content] = cli("check", policy, "--federation", federation, "--html", page, "--share", share).said
    assert content["verdict"] == "PASS"
    assert set(json.loads(share.read_text())["checks"]) == set(CHECKS)
    assert page.exists()
    (site.home / "signing.key").chmod(0o644)
    with pytest.raises(DataError, match="data check: permissions failed"):
        cli("check", policy, "--federation", federation, "--share", share)
    assert json.loads(share.read_text())["checks"]["permissions"]["level"] == "FAIL"


def test_wipe_takes_a_folder_or_a_policy_and_says_what_it_cannot_promise(site: Site, cli) -> None:
    policy, _ = site.write()
    Shards(site.home / "cache", {})
    [content] = cli("wipe", policy).said
    assert content["overwritten"] is False
    assert not (site.home / "cache").exists()
    Shards(site.home / "cache", {})
    cli("wipe", site.home / "cache")
    assert not (site.home / "cache").exists()
    assert (site.home / "ledger.jsonl").exists()


@pytest.mark.realdata
def test_real_planted_identities_never_leave_and_are_found(site: Site, tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip("the folder of real images is not beside the project")
    truth = json.loads((REAL / "dicom_phi" / "truth.json").read_text())
    site.records = []
    for number, entry in enumerate(truth):
        (site.home / entry["file"]).symlink_to(REAL / "dicom_phi" / entry["file"])
        site.records.append(record(number, image=entry["file"]))
    found = site.check()
    assert "the header's PatientName in its path" in says(found, "names in the manifest")
    sent, own = told(found, tmp_path), json.dumps(found.to_dict(), ensure_ascii=False)
    for entry in truth:
        for term in [*entry["search_terms"], entry["file"]]:
            assert term.encode() not in sent
            assert term not in own
