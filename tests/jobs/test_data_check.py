"""``clinifed data check``: every defect of a site is found, and what may leave it names nobody and no small group."""

import argparse
import itertools
import json
import re
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import generate_uid
from rich.console import Console

from clinifed.cli_data_check import add_check_verbs
from clinifed.data.manifest import Record, site_key, write_manifest
from clinifed.data.modalities import MODALITIES, Identity, dicom_object
from clinifed.errors import ConfigError, DataError, PrivacyError
from clinifed.jobs.data_check import CHECKS, DataCheck, data_check, site_under_check
from clinifed.jobs.data_check_report import check_table, write_page, write_shareable
from clinifed.jobs.data_checks_share import Counts, Shared, known_reason
from clinifed.jobs.data_checks_site import Finding
from clinifed.models import backbone as models
from clinifed.models.shards import Shards
from clinifed.policy import SitePolicy
from clinifed.privacy.ledger import Ledger
from clinifed.signing import make_signing_key

REAL = Path(__file__).parents[2].parent / "shared/data/open"
FEDERATION = {
    "name": "unit",
    "rounds": 2,
    "min_clients": 1,
    "max_clients": 2,
    "privacy": {"epsilon": 8.0},
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "sites": {"alder": {"specialties": ["radiology"], "nominal_patients": 20}},
}


def pixels(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).random((32, 32), dtype=np.float32)


def dicom(path: Path, number: int, **header: object) -> None:
    identity = Identity(f"ID{number}", "ALDER", generate_uid(), generate_uid(), generate_uid(), 1, "")
    ds = dicom_object(pixels(number), MODALITIES["radiology"][0], identity)
    for keyword, value in header.items():
        setattr(ds, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def record(number: int, **changes: str) -> Record:
    fields = {
        "image": f"images/{number:020x}.dcm",
        "patient": f"{number:020x}",
        "specialty": "radiology",
        "label": ("normal", "abnormal")[number % 2],
        "caption": "",
        "split": "train",
    }
    return Record(**{**fields, **changes})


class Site:
    """A site on disk that passes; tests spoil it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(mode=0o700, exist_ok=True)
        self.records = [record(number) for number in range(24)]
        for number, row in enumerate(self.records):
            dicom(home / row.image, number)
        self.settings = {
            "site": "alder",
            "manifest": str(home / "manifest.csv"),
            "ledger": str(home / "ledger.jsonl"),
            "signing_key": str(home / "signing.key"),
            "cache": str(home / "cache"),
            "diary": str(home / "diary.jsonl"),
            "budget": {"epsilon": 8.0, "delta": 1e-5},
        }
        self.federation = json.loads(json.dumps(FEDERATION))
        Ledger.of(SitePolicy.model_validate(self.settings)).create()
        make_signing_key(home / "signing.key")
        site_key(home)

    def write(self) -> tuple[Path, Path]:
        write_manifest(self.home / "manifest.csv", self.records, "synthetic")
        policy, federation = self.home / "site.yaml", self.home / "federation.yaml"
        policy.write_text(yaml.safe_dump(self.settings))
        federation.write_text(yaml.safe_dump(self.federation))
        return policy, federation

    def check(self, **options: object) -> DataCheck:
        policy, federation = self.write()
        return data_check(site_under_check(policy, federation=federation, **options))


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model takes a second, and every check wants it."""
    monkeypatch.setattr(models, "load_backbone", _load)


_load = cache(models.load_backbone)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def level(found: DataCheck, name: str) -> str:
    return found.findings[name].level


def says(found: DataCheck, name: str) -> str:
    return "\n".join(found.findings[name].says)


def told(found: DataCheck, folder: Path) -> bytes:
    """All forms that may leave, as bytes."""
    paths = [folder / name for name in ("share.json", "share.html", "share.txt")]
    for path in paths:
        write_shareable(found, path)
    return b"\n".join(path.read_bytes() for path in paths)


def test_a_good_site_passes_every_check(site: Site) -> None:
    found = site.check()
    assert {name: f.level for name, f in found.findings.items()} == dict.fromkeys(CHECKS, "PASS")
    assert (found.verdict, found.failed) == ("PASS", ())
    assert "24 of 24 images can be used" in says(found, "files")
    assert "modalities: 24 × CR" in says(found, "kinds of images")
    assert "12 patients normal, 12 patients abnormal" in says(found, "labels")


def test_unreadable_images_are_listed_with_reason_and_row(site: Site) -> None:
    (site.home / site.records[3].image).write_bytes(b"not an image")
    (site.home / site.records[7].image).unlink()
    found = site.check()
    assert level(found, "files") == "FAIL"  # 2 of 24 are more than single files
    assert "22 of 24 images can be used" in says(found, "files")
    assert re.search(r"1 × .+: row 5$", says(found, "files"), re.M)
    assert re.search(r"1 × no such file: row 9$", says(found, "files"), re.M)


def test_a_sample_opens_so_many_images_and_no_more(site: Site) -> None:
    for row in site.records[1::2]:
        (site.home / row.image).write_bytes(b"not an image")
    found = site.check(sample=12)
    assert "12 of 12 images can be used, a sample of 24" in says(found, "files")


def test_labels_without_a_meaning_and_small_classes_are_told(site: Site) -> None:
    site.records[0] = record(0, label="gesund")
    site.records[1:5] = [record(n, label="normal") for n in range(1, 5)]
    found = site.check()
    assert level(found, "labels") == "FAIL"
    assert "1 images have a label that is none of radiology's: row 2" in says(found, "labels")
    assert "gesund" not in json.dumps(found.to_dict())
    site.records[0] = record(0)
    site.records[5:9] = [record(n, label="normal") for n in range(5, 9)]
    assert "fewer than 10 patients of a class teach little: abnormal of radiology" in (
        site.check().findings["labels"].remedy
    )


def test_a_specialty_that_nobody_knows_is_a_warning_and_is_not_repeated(site: Site) -> None:
    site.records.append(record(0, image="images/x.dcm", specialty="Okonkwo"))
    dicom(site.home / "images/x.dcm", 77)
    found = site.check()
    assert "a specialty that is not known: row 26" in says(found, "labels")
    assert "Okonkwo" not in json.dumps(found.to_dict())


def test_a_site_without_a_declared_specialty_fails(site: Site) -> None:
    site.federation["sites"]["alder"]["specialties"] = ["radiology", "cardiology"]
    found = site.check()
    assert "cardiology: nothing to train on" in says(found, "labels")
    assert "no usable image of cardiology" in says(found, "files")
    assert level(found, "labels") == level(found, "files") == "FAIL"


def copy(site: Site, number: int, of: int, **changes: str) -> None:
    site.records[number] = record(number, **changes)
    (site.home / site.records[number].image).write_bytes((site.home / site.records[of].image).read_bytes())


def test_the_same_file_twice_is_a_warning_and_of_two_patients_a_failure(site: Site) -> None:
    copy(site, 2, of=0, patient=site.records[0].patient)
    found = site.check()
    assert level(found, "duplicates") == "WARN"
    assert "1 images are there again, of the same patient: row 4" in says(found, "duplicates")
    copy(site, 2, of=0)
    found = site.check()
    assert level(found, "duplicates") == "FAIL"
    assert "2 images have the content of another patient's: rows 2, 4" in says(found, "duplicates")


def test_the_same_content_in_both_splits_leaks(site: Site) -> None:
    copy(site, 2, of=0, split="holdout")
    found = site.check()
    assert level(found, "leakage") == "FAIL"
    assert "2 images of both splits share their content: rows 2, 4" in says(found, "leakage")


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SOPInstanceUID"])
def test_one_study_or_object_of_two_patients_leaks(site: Site, keyword: str) -> None:
    uid = generate_uid()
    for number in (0, 2):
        dicom(site.home / site.records[number].image, number, **{keyword: uid})
    found = site.check()
    assert f"2 images of two patients of one split share their {keyword}: rows 2, 4" in says(found, "leakage")
    assert uid not in json.dumps(found.to_dict())


def test_one_person_of_the_headers_under_two_patients_leaks_however_it_is_spelt(site: Site) -> None:
    dicom(site.home / site.records[2].image, 2, PatientID=" id0 ")
    found = site.check()
    assert "share their PatientID of the header: rows 2, 4" in says(found, "leakage")
    site.records[2] = record(2, split="holdout")
    assert "images of both splits share their PatientID of the header: rows 2, 4" in says(site.check(), "leakage")


@pytest.mark.parametrize(
    ("image", "what"),
    [
        ("scans/2017-04-22/1.dcm", "a date in its path"),
        ("scans/22.04.2017_1.dcm", "a date in its path"),
        ("scans/5318908.dcm", "a number like a patient's in its path"),
        ("scans/Okonkwo^Amara.dcm", "a person name's ^ in its path"),
        ("scans/Okonkwo_Amara.dcm", "two words like a name in its path"),
        ("scans/1.2.840.113619.2.55.3.dcm", "a UID in its path"),
        ("scans/MÜLLER-chest.dcm", "the header's PatientName in its path"),
        ("scans/acc72-4.dcm", "an identifier of the header in its path"),
    ],
)
def test_names_dates_and_numbers_in_paths_are_found_and_not_repeated(site: Site, image: str, what: str) -> None:
    site.records[1] = record(1, image=image)
    dicom(site.home / image, 1, PatientName="Müller^Thabo", AccessionNumber="acc72")
    found = site.check()
    assert level(found, "names in the manifest") == ("FAIL" if "header" in what else "WARN")
    assert f"1 × {what}: row 3" in says(found, "names in the manifest")
    assert image.removeprefix("scans/").removesuffix(".dcm") not in json.dumps(found.to_dict(), ensure_ascii=False)


def test_a_patient_column_or_caption_that_repeats_the_header_fails(site: Site) -> None:
    dicom(site.home / site.records[1].image, 1, PatientName="Dubois^Etienne", PatientID="MRN-77")
    site.records[1] = record(1, patient="MRN-77", caption="pneumonia, seen by dubois")
    found = site.check()
    assert level(found, "names in the manifest") == "FAIL"
    assert "an identifier of the header in its patient: row 3" in says(found, "names in the manifest")
    assert "the header's PatientName in its caption: row 3" in says(found, "names in the manifest")


def test_names_that_say_nothing_are_not_suspected(site: Site) -> None:
    names = ["images/01234567890123456789.dcm", "a/550e8400-e29b-41d4-a716-446655440000.dcm", f"{'ab1' * 20}.dcm"]
    for number, image in enumerate(names):
        site.records[number] = record(number, image=image)
        dicom(site.home / image, number)
    site.records[4] = record(4, patient="98765432109876543210")
    assert level(site.check(), "names in the manifest") == "PASS"


def test_text_burned_into_a_picture_is_a_warning(site: Site) -> None:
    dicom(site.home / site.records[1].image, 1, BurnedInAnnotation="YES")
    assert level(site.check(), "kinds of images") == "WARN"


def test_too_few_patients_for_the_noise_fail_and_fewer_than_nominal_warn(site: Site) -> None:
    site.federation["privacy"]["epsilon"] = 0.5
    found = site.check()
    assert level(found, "privacy outlook") == "FAIL"
    assert "too small to learn anything" in says(found, "privacy outlook")
    site.federation["privacy"]["epsilon"] = 8.0
    site.federation["sites"]["alder"]["nominal_patients"] = 30
    found = site.check()
    assert level(found, "privacy outlook") == "WARN"
    assert "24 patients are fewer than N₀ = 30" in found.findings["privacy outlook"].remedy


def test_a_budget_that_does_not_pay_fails(site: Site) -> None:
    site.federation["privacy"]["epsilon"] = 9.0
    assert level(site.check(), "budget") == "FAIL"


def test_a_missing_ledger_fails_and_the_other_checks_are_made(site: Site) -> None:
    (site.home / "ledger.jsonl").unlink()
    found = site.check()
    assert found.failed == ("budget", "permissions")


@pytest.mark.parametrize("name", ["manifest.csv", "signing.key", "ledger.jsonl", "site.key", "manifest.meta.json"])
def test_a_private_file_that_others_may_read_fails(site: Site, name: str) -> None:
    policy, federation = site.write()
    (site.home / name).chmod(0o640)
    found = data_check(site_under_check(policy, federation=federation))
    assert level(found, "permissions") == "FAIL"
    assert "mode 640" in says(found, "permissions")


def test_a_cache_that_others_may_enter_fails(site: Site) -> None:
    (site.home / "cache").mkdir()
    (site.home / "cache").chmod(0o750)
    assert level(site.check(), "permissions") == "FAIL"


def test_another_base_model_than_agreed_fails_and_the_agreed_one_passes(site: Site, tmp_path: Path) -> None:
    policy, federation = site.write()
    contract = site_under_check(policy, federation=federation).contract
    agreed = tmp_path / "contract.json"
    agreed.write_text(contract.text())
    assert level(data_check(site_under_check(policy, contract=agreed)), "base model") == "PASS"
    other = contract.model_copy(update={"base_model": contract.base_model.model_copy(update={"sha256": "f" * 64})})
    agreed.write_text(other.text())
    found = data_check(site_under_check(policy, contract=agreed))
    assert level(found, "base model") == "FAIL"
    assert f"the contract wants {'f' * 64}" in says(found, "base model")


def test_a_model_that_cannot_be_loaded_fails_alone(site: Site) -> None:
    site.federation["model"] = {"ref": "local-dir:/nowhere"}
    found = site.check()
    assert found.failed == ("privacy outlook", "base model")


def test_a_disk_that_is_full_fails(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})()
    monkeypatch.setattr("clinifed.jobs.data_checks_machine.shutil.disk_usage", lambda _: usage)
    assert level(site.check(), "embedding cache") == "FAIL"


def test_too_little_memory_is_a_warning(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("free", (), {"available": 10 << 20})()
    monkeypatch.setattr("clinifed.jobs.data_checks_machine.psutil.virtual_memory", lambda: free)
    assert level(site.check(), "memory") == "WARN"


def test_a_manifest_alone_is_checked_against_a_federation(site: Site) -> None:
    _, federation = site.write()
    found = data_check(site_under_check(manifest=site.home / "manifest.csv", federation=federation))
    assert found.verdict == "PASS"
    assert found.site.name == "alder"


def test_a_policy_alone_is_checked_against_what_ships(site: Site) -> None:
    policy, _ = site.write()
    found = data_check(site_under_check(policy))
    assert level(found, "labels") == "PASS"
    assert level(found, "base model") == "WARN"
    assert "with the 24 patients that are there, alone" in says(found, "privacy outlook")


def test_pictures_are_checked_as_well(site: Site) -> None:
    image = "images/0123456789abcdef0123.png"
    Image.fromarray((255 * pixels(99)).astype(np.uint8)).save(site.home / image)
    site.records[0] = record(0, image=image)
    assert "1 × PNG or JPEG" in says(site.check(), "kinds of images")


def test_wrong_arguments_are_told_at_once(site: Site) -> None:
    with pytest.raises(ConfigError) as caught:
        site_under_check(sample=0, minimum=1)
    assert len(caught.value.problems) == 3
    policy, federation = site.write()
    with pytest.raises(ConfigError, match="site 'birch' is none of the federation's: alder"):
        site_under_check(policy, federation=federation, name="birch")


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
            assert known_reason(reason) == reason or "-" in reason
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
