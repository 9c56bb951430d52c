"""``clinifed evaluate``: public patients for all, a hospital's own for the hospital alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from clinifed.aggregators.checkpoint import write_checkpoint
from clinifed.data.manifest import read_manifest, write_manifest
from clinifed.errors import DataError
from clinifed.jobs.baselines import load_part
from clinifed.jobs.evaluate import STAYS, UNCHANGED, evaluate_at_site, evaluate_checkpoint
from clinifed.jobs.report_comparison import comparison_tables, relinkage_tables
from clinifed.policy import SitePolicy
from clinifed.privacy.withdrawn import Withdrawn

from .studied import Studied, held_out


def checkpoint_of(studied: Studied, path: Path, train: str = "heads") -> Path:
    training = studied.contract.training.model_copy(update={"train": train})
    contract = studied.contract.model_copy(update={"training": training})
    start = load_part(contract, studied.backbone).shared()
    noise = torch.Generator().manual_seed(1)
    params = {name: (value + torch.randn(value.shape, generator=noise)).numpy() for name, value in start.items()}
    card = {
        "base_model": contract.base_model.model_dump(),
        "training": training.model_dump(),
        "objective": contract.promise.objective,
        "specialties": {n: s.model_dump(mode="json") for n, s in contract.specialties.items()},
    }
    write_checkpoint(path, params, card)
    return path


@pytest.fixture(scope="module")
def checkpoint(studied, tmp_path_factory) -> Path:
    return checkpoint_of(studied, tmp_path_factory.mktemp("made") / "checkpoint")


def shown(*tables: object) -> str:
    """As on a terminal."""
    console = Console(width=120)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get()


@pytest.fixture(scope="module")
def public(studied, checkpoint) -> dict[str, Any]:
    """The report of the public test set."""
    return evaluate_checkpoint(checkpoint, studied.data.test.path, None, minimum=2)


@pytest.fixture
def hospital(studied, tmp_path) -> tuple[Path, SitePolicy]:
    """A hospital's policy, of data that is its own."""
    manifest = held_out(studied.data.sites["alder"], "hospital")
    policy = studied.policies["alder"].model_copy(update={"manifest": manifest.path, "cache": tmp_path / "cache"})
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(policy.model_dump(mode="json")))
    return path, policy


def test_a_hospital_s_own_report_is_of_its_held_out_patients_and_says_that_it_stays(studied, checkpoint, hospital):
    report = evaluate_at_site(checkpoint, hospital[0], None, minimum=2)
    assert report["note"] == STAYS
    assert {(row["patients_of"], row["site"]) for row in report["comparison"]} == {("holdout", "alder")}
    records = [r for r in held_out(studied.data.sites["alder"], "hospital").records if r.split == "holdout"]
    for row in report["comparison"]:
        assert row["patients"] == len({r.patient for r in records if r.specialty == row["specialty"]})
        assert list(row["models"]) == ["zero_shot", "trained"]
    assert json.loads(json.dumps(report)) == report
    said = json.dumps(report)
    assert not [r for r in records if r.patient in said or r.image in said]


def test_no_image_of_a_patient_who_withdrew_is_read(studied, checkpoint, hospital, tmp_path):
    path, policy = hospital
    policy = policy.model_copy(update={"ledger": tmp_path / "ledger.jsonl"})  # the list lies beside it
    path.write_text(yaml.safe_dump(policy.model_dump(mode="json")))
    records = [r for r in read_manifest(policy.manifest).records if r.split == "holdout"]
    Withdrawn.of(policy).add(records[0].patient)
    for row in evaluate_at_site(checkpoint, path, None, minimum=1)["comparison"]:
        mine = {r.patient for r in records if r.specialty == row["specialty"]}
        assert row["patients"] == len(mine - {records[0].patient})


def test_nothing_is_written_but_the_site_s_own_cache_of_embeddings(checkpoint, hospital, tmp_path):
    path, policy = hospital
    around = [checkpoint, policy.manifest.parent, policy.ledger.parent, tmp_path]
    listed = {p: p.stat().st_mtime_ns for folder in around for p in folder.rglob("*") if p.is_file()}
    evaluate_at_site(checkpoint, path, None)
    after = {p: p.stat().st_mtime_ns for folder in around for p in folder.rglob("*") if p.is_file()}
    changed = [p for p in after if listed.get(p) != after[p]]
    assert changed
    assert all(policy.cache in p.parents for p in changed)
    assert all(p.stat().st_mode & 0o077 == 0 for p in changed)


def test_a_hospital_s_manifest_is_no_public_test_set(checkpoint, hospital):
    with pytest.raises(DataError, match="--site POLICY"):
        evaluate_checkpoint(checkpoint, hospital[1].manifest, None)


def test_a_site_that_holds_nobody_out_is_told_how_to(studied, checkpoint, hospital, tmp_path):
    path, policy = hospital
    records = [replace(r, split="train") for r in studied.data.sites["alder"].records]
    manifest = write_manifest(policy.manifest.with_name("all.csv"), records, "hospital")
    path.write_text(yaml.safe_dump(policy.model_copy(update={"manifest": manifest.path}).model_dump(mode="json")))
    with pytest.raises(DataError, match="--holdout SHARE"):
        evaluate_at_site(checkpoint, path, None)


def test_heads_leave_the_embedding_and_the_report_says_so_rather_than_compute_it_twice(studied, public):
    told = public["relinkage"]
    assert told["trained"] is None
    assert told["note"] == UNCHANGED
    assert told["patients"] == len({r.patient for r in studied.data.test.records})
    assert told["base"]["10"]["value"] > told["base"]["10"]["chance"], "the tiny model was trained on such captions"


def test_a_trained_projection_is_asked_anew(studied, tmp_path):
    made = checkpoint_of(studied, tmp_path / "checkpoint", "projection")
    told = evaluate_checkpoint(made, studied.data.test.path, None, minimum=2)["relinkage"]
    assert told["note"] is None
    assert told["trained"] != told["base"]
    assert told["trained"]["1"]["chance"] == told["base"]["1"]["chance"] == pytest.approx(1 / told["reports"])


def test_without_captions_there_is_no_re_linkage_to_tell(studied, checkpoint):
    records = [replace(r, caption=" ") for r in studied.data.test.records]
    manifest = write_manifest(studied.data.test.folder / "silent.csv", records, "public")
    report = evaluate_checkpoint(checkpoint, manifest.path, None)
    assert report["relinkage"] is None
    assert relinkage_tables(None) == ["re-linkage: not told, the test set has no captions"]
    # And by the default minimum so few patients give no figure, but the reason.
    assert report["comparison"][0]["models"]["trained"]["balanced_accuracy"]["value"] is None
    assert "fewer than 10 patients have it" in shown(*comparison_tables(report["comparison"], "trained"))


def test_reports_may_use_words_that_the_tokenizer_does_not_know(studied, checkpoint, capfd, caplog):
    records = [replace(r, caption=f"Zdzislawa, 35-year-old, no. {i}") for i, r in enumerate(studied.data.test.records)]
    manifest = write_manifest(studied.data.test.folder / "written.csv", records, "public")
    report = evaluate_checkpoint(checkpoint, manifest.path, None)
    assert report["relinkage"]["different_texts"] == len(records)
    assert "Zdzislawa" not in json.dumps(report) + caplog.text + "".join(capfd.readouterr())


def test_the_tables_show_figures_intervals_and_what_is_suppressed(public):
    text = shown(*comparison_tables(public["comparison"], "trained"), *relinkage_tables(public["relinkage"]))
    row = public["comparison"][0]
    figure = row["models"]["trained"]["auroc"]
    assert f"{100 * figure['value']:.1f} ({100 * figure['low']:.0f}" in text
    assert f"{row['specialty']}, public test: {row['patients']} patients" in text
    assert "suppressed" not in text
    assert "@10" in text
