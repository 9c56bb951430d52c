"""``clinifed data check``: every defect of a site is found, and told without naming anybody."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.uid import generate_uid

from clinifed.errors import ConfigError
from clinifed.jobs.data_check import CHECKS, data_check, site_under_check
from clinifed.models import backbone
from clinifed.models.basis import Basis
from clinifed.models.shards import row_bytes

from .checked_site import Site, dicom, level, load_once, pixels, record, says


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "load_backbone", load_once)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


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


def test_files_that_changed_or_went_since_they_were_listed_fail_with_their_counts(site: Site) -> None:
    policy, _ = site.write()
    dicom(site.home / site.records[3].image, 99)
    dicom(site.home / site.records[5].image, 98)
    (site.home / site.records[7].image).unlink()
    found = data_check(site_under_check(policy))
    assert level(found, "changed files") == "FAIL"
    assert "21 of 24 files are as they were listed" in says(found, "changed files")
    assert "2 × changed since they were listed: rows 5, 7" in says(found, "changed files")
    assert "1 × gone, or not to be read: row 9" in says(found, "changed files")
    assert level(found, "files") == "WARN"  # the two can be read: what they show is another question
    (row,) = [row for row in found.shared() if row.name == "changed files"]
    assert row.level == "FAIL"
    assert not any(re.search(r"\b[123]\b", line) for line in row.lines)


def test_files_listed_without_a_hash_are_a_warning(site: Site, monkeypatch) -> None:
    monkeypatch.setattr(Site, "_hashed", lambda _, row: row)
    found = site.check()
    assert level(found, "changed files") == "WARN"
    assert "24 were listed without a hash" in says(found, "changed files")


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


def test_what_training_would_refuse_of_labels_fails_and_what_it_takes_passes(site: Site) -> None:
    site.records[0] = record(0, label="normal|abnormal")
    site.records[1] = record(1, label="")
    found = site.check()
    assert level(found, "labels") == "FAIL"
    assert "1 images have several labels, where the objective takes one: row 2" in says(found, "labels")
    assert "1 images have no label: row 3" in says(found, "labels")
    site.federation["privacy"]["objective"] = "multi-label-bce"
    assert level(site.check(), "labels") == "PASS"
    policy, _ = site.write()
    assert level(data_check(site_under_check(policy)), "labels") == "WARN"


def test_a_header_that_cannot_be_read_is_told(site: Site) -> None:
    path = site.home / site.records[3].image
    path.write_bytes(path.read_bytes()[:140] + b"\xff" * 40)
    assert "1 × the header cannot be read, so nothing is compared with it: row 5" in says(
        site.check(), "kinds of images"
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


@pytest.mark.parametrize("held", ["agreed", "other", "none"])
def test_a_site_holds_the_basis_that_was_agreed_or_fails(site: Site, tmp_path: Path, held: str) -> None:
    basis = Basis(torch.zeros(64), torch.eye(64))
    site.federation |= {"training": {"basis": "centre"}}
    policy, federation = site.write()
    contract = site_under_check(policy, federation=federation).contract
    agreed, installed = tmp_path / "contract.json", tmp_path / "basis.safetensors"
    named = contract.base_model.model_copy(update={"basis_sha256": basis.sha256()})
    agreed.write_text(contract.model_copy(update={"base_model": named}).text())
    installed.write_bytes((basis if held == "agreed" else Basis(torch.ones(64), torch.eye(64))).content())
    site.settings |= {} if held == "none" else {"basis": str(installed)}
    found = data_check(site_under_check(site.write()[0], contract=agreed))
    assert level(found, "base model") == ("PASS" if held == "agreed" else "FAIL")
    assert basis.sha256() in says(found, "base model")


@pytest.mark.parametrize(
    ("train", "numbers"), [("heads", 64), ("projection", 64), ("lora", 101 * 64), ("blocks", 101 * 64)]
)
def test_the_cache_has_room_for_what_the_trunk_that_trains_reads(site: Site, train: str, numbers: int) -> None:
    site.federation |= {"training": {"train": train, "blocks": 1}}
    assert f"rows of {row_bytes(numbers):,} bytes" in says(site.check(), "embedding cache")


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
