"""``clinifed personalise``: in-house heads that never leave, chosen by the hospital's own held-out patients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from clinifed.aggregators.checkpoint import write_checkpoint
from clinifed.cli import main
from clinifed.data.manifest import SPLITS, read_manifest, write_manifest
from clinifed.errors import DataError, ModelError, PrivacyError
from clinifed.executors.trainer import SiteTrainer
from clinifed.export.pipeline import export_checkpoint
from clinifed.jobs.evaluate import evaluate_checkpoint
from clinifed.jobs.finetune import fine_tune_for_specialty
from clinifed.jobs.finetune_plan import LOCAL
from clinifed.jobs.own_heads import GLOBAL, LOCAL_ONLY, VARIANTS, ZERO_SHOT
from clinifed.jobs.personalise import personalise
from clinifed.jobs.recipe import build_contract
from clinifed.jobs.withdrawal import touched_by
from clinifed.models.backbone import load_backbone
from clinifed.models.state import read_checkpoint
from clinifed.policy import SitePolicy
from clinifed.privacy.outbox import pack
from clinifed.privacy.withdrawn import Withdrawn

from . import hospital as site


class Made(NamedTuple):
    """What a hospital has."""

    report: dict[str, Any]
    out: Path
    policy: SitePolicy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site.hospital(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def common(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A global checkpoint that any hospital does better than: each row of its heads is another label's."""
    out = tmp_path_factory.mktemp("global")
    with pytest.MonkeyPatch.context() as patch:
        site.patch_backbone(patch)
        plan = site.federation(folder, privacy="off")
        fine_tune_for_specialty(plan, "alder", ["radiology", "emergency"], out / "run", epochs=1, validation="none")
    made = read_checkpoint(out / "run" / "checkpoint")
    wrong = {name: tensor.roll(1, 0).numpy() for name, tensor in made.params.items()}
    write_checkpoint(out / "checkpoint", wrong, made.card)
    return out / "checkpoint"


@pytest.fixture
def policy(folder: Path, tmp_path: Path) -> SitePolicy:
    return site.policy(folder, tmp_path / "home")


@pytest.fixture
def own(common: Path, policy: SitePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Personalise the global checkpoint into ``tmp_path/home/own``."""
    site.patch_backbone(monkeypatch)

    def run(out: str = "own", site_policy: SitePolicy = policy, **options: Any) -> dict[str, Any]:
        return personalise(common, site_policy, tmp_path / "home" / out, **options)

    return run


@pytest.fixture(scope="module")
def made(folder: Path, common: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One hospital's heads, made once."""
    home = tmp_path_factory.mktemp("hospital") / "home"
    policy = site.policy(folder, home)
    with pytest.MonkeyPatch.context() as patch:
        site.patch_backbone(patch)
        return Made(personalise(common, policy, home / "own"), home / "own", policy)


def test_every_kind_of_head_is_held_against_the_global_one_and_the_report_says_which_was_chosen(made):
    report = made.report
    assert set(report["specialties"]) == {"radiology", "emergency"}
    for entry in report["specialties"].values():
        assert set(entry["candidates"]) == {ZERO_SHOT, GLOBAL, LOCAL_ONLY, *VARIANTS}
        assert entry["chosen"] in entry["candidates"]
        assert entry["patients"] >= site.HELD_OUT
        assert entry["candidates"][GLOBAL]["difference"] is None


def test_no_head_is_worse_than_local_only_beyond_its_interval_on_the_held_out_patients(made):
    for entry in made.report["specialties"].values():
        chosen, local = (entry["candidates"][name] for name in (entry["chosen"], LOCAL_ONLY))
        lead = local["difference"]
        if entry["chosen"] == GLOBAL:
            assert lead["low"] is None or lead["low"] <= 0
        else:
            assert chosen["difference"]["low"] > 0
            assert chosen["balanced_accuracy"] >= local["balanced_accuracy"] or lead["low"] <= 0


def test_the_card_marks_what_is_the_hospitals_and_files_are_the_owners_alone(made, common):
    report, out = made.report, made.out
    card = read_checkpoint(out / "checkpoint").card
    chosen = {name: entry["chosen"] for name, entry in report["specialties"].items()}
    assert card["exportable"] is False
    assert card["in_house"] == ["emergency", "radiology"]
    assert card["personalised"]["heads"] == chosen
    assert "candidates" not in json.dumps(card)  # figures of private patients stay in the report
    paths = [out, out / "checkpoint", out / "choice.json", *(out / "checkpoint").iterdir()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in paths)
    before, after = read_checkpoint(common).params, read_checkpoint(out / "checkpoint").params
    assert GLOBAL not in chosen.values()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_it_can_be_evaluated_and_its_bundle_may_not_leave(made, folder, tmp_path, monkeypatch):
    site.patch_backbone(monkeypatch)
    out = made.out
    tests = folder / "public" / "test" / "manifest.csv"
    assert set(evaluate_checkpoint(out / "checkpoint", tests, None)["metrics"]) == {"radiology", "emergency"}
    report = export_checkpoint(
        out / "checkpoint", tmp_path / "bundle", precisions=["fp32"], targets=["onnx"], test=tests, parity_images=4
    )
    assert not report.exportable
    in_house = read_checkpoint(out / "checkpoint").card["in_house"]
    assert {f"{name}: an in-house head" for name in in_house} <= set(report.reasons)
    written = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert written["exportable"] is False
    with pytest.raises(PrivacyError, match="one hospital trained without noise"):
        fine_tune_for_specialty(
            site.federation(folder), "alder", "radiology", tmp_path / "next", start=out / "checkpoint"
        )


def test_a_later_round_of_the_site_sends_nothing_of_it(own, policy, folder, tmp_path):
    """The same bytes leave, whether in-house heads lie there, are damaged, or never were."""
    backbone = load_backbone("tiny")
    contract = build_contract(site.federation(folder, privacy="off"), backbone)
    joined = policy.model_copy(
        update={"approved_contracts": (contract.sha256(),), "permit_privacy_off": True, "outbox": tmp_path / "outbox"}
    )

    def sent(number: int) -> dict[str, bytes]:
        trainer = SiteTrainer(contract, joined, f"run {number}", LOCAL, backbone)
        update = trainer.train(0, {name: torch.zeros(shape) for name, shape in contract.shapes.items()})
        return {name: value.tobytes() for name, value in update.params.items()} | {"": pack_of(update)}

    def pack_of(update: Any) -> bytes:
        meta = {k: v for k, v in update.meta.items() if k not in ("job", "nonce", "signature")}
        return pack(type(update)(update.site, update.round, update.params, meta))

    before = sent(0)
    own(specialties=["radiology"])
    heads = tmp_path / "home" / "own" / "checkpoint" / "model.safetensors"
    assert sent(1) == before
    heads.write_bytes(b"damaged")
    assert sent(2) == before


def test_a_patient_who_withdrew_is_in_no_head_and_in_no_choice(own, policy, tmp_path):
    manifest = read_manifest(policy.manifest)
    gone = {
        next(r.patient for r in manifest.records if (r.split, r.specialty) == (split, "radiology")) for split in SPLITS
    }
    for patient in gone:
        Withdrawn.of(policy).add(patient)
    own(specialties=["radiology"])
    (tmp_path / "data").mkdir()
    fewer = tmp_path / "data" / "manifest.csv"
    (tmp_path / "data" / "dicom").symlink_to(policy.manifest.parent / "dicom")
    write_manifest(fewer, [r for r in manifest.records if r.patient not in gone], "hospital")
    Withdrawn.of(policy).path.unlink()
    own("without", policy.model_copy(update={"manifest": fewer}), specialties=["radiology"])
    one, other = (read_checkpoint(tmp_path / "home" / name / "checkpoint") for name in ("own", "without"))
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert one.card["personalised"] == other.card["personalised"]


def test_touched_finds_the_in_house_heads_of_a_patient(made, tmp_path, monkeypatch):
    from clinifed.jobs import withdrawal

    policy = made.policy
    manifest = read_manifest(policy.manifest)
    card = made.out / "checkpoint" / "card.json"
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(policy.model_dump(mode="json")))
    for split, count in (("train", 1), ("holdout", 0)):
        patient = next(r.patient for r in manifest.records if r.split == split)
        monkeypatch.setattr(withdrawal, "patient_pseudonym", lambda *arguments, p=patient: p)
        withdrawal.withdraw("somebody", path)
        found = touched_by("somebody", path, cards=[card])
        assert [t.checkpoints for t in found] == [(str(card),)] * count
        assert patient in Withdrawn.of(policy).patients()


def test_what_cannot_be_judged_or_kept_private_is_refused(own, policy, tmp_path):
    manifest = read_manifest(policy.manifest)
    (tmp_path / "data").mkdir()
    only = write_manifest(tmp_path / "data" / "m.csv", [r for r in manifest.records if r.split == "train"], "hospital")
    with pytest.raises(DataError, match="no patient of emergency is in the split 'holdout'") as caught:
        own(site_policy=policy.model_copy(update={"manifest": only.path}))
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match="no such specialty"):
        own(specialties=["pathology"])
    (tmp_path / "home" / "open").mkdir()
    (tmp_path / "home" / "open").chmod(0o755)
    with pytest.raises(DataError, match="others than its owner"):
        own("open")
    own(specialties=["radiology"])
    with pytest.raises(ModelError, match="holds in-house heads already"):
        own(specialties=["radiology"])


def test_the_command_tells_what_was_chosen(common, policy, tmp_path, monkeypatch, capsys):
    site.patch_backbone(monkeypatch)
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(policy.model_dump(mode="json")))
    out = tmp_path / "home" / "own"
    words = ["personalise", str(common), "--policy", str(path), "--out", str(out), "--specialty", "radiology"]
    main(words)
    said = capsys.readouterr().out
    assert "against global" in said
    assert "they stay at the site" in said
    assert json.loads((out / "choice.json").read_text())["stays_at_the_site"] is True
