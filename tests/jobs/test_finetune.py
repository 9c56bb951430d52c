"""``clinifed finetune``: the engine and the ledger of a federation, durable epochs, choices by public data."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clinifed.cli import main
from clinifed.errors import BudgetExceededError, ConfigError, DataError, ModelError, PrivacyError
from clinifed.evaluation.metrics import Scores
from clinifed.executors import trainer
from clinifed.files import read_lines
from clinifed.jobs import finetune_run
from clinifed.jobs.basis import BASIS_FILE
from clinifed.jobs.evaluate import evaluate_checkpoint
from clinifed.jobs.finetune import fine_tune_for_specialty
from clinifed.models.backbone import load_backbone
from clinifed.models.basis import read_basis
from clinifed.models.heads import zero_shot_heads
from clinifed.models.specialties import SPECIALTIES
from clinifed.models.state import read_checkpoint
from clinifed.policy import Budget
from clinifed.privacy.accountant import cost_units
from clinifed.privacy.ledger import Ledger

from . import hospital as site

Tune = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site.hospital(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def tune(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Fine-tune radiology in ``tmp_path/run``."""
    site.patch_backbone(monkeypatch)

    def run(specialty: Any = "radiology", out: str = "run", plan: dict[str, Any] | None = None, **options: Any) -> Any:
        return fine_tune_for_specialty(
            site.federation(folder, **(plan or {})), "alder", specialty, tmp_path / out, **options
        )

    return run


def ledger(run: Path) -> Path:
    return run / "sites" / "alder" / "ledger.jsonl"


def kinds(path: Path) -> list[str]:
    return [record["kind"] for record in read_lines(path)]


OFF = {"privacy": "off"}
CENTRED = {"training": {"basis": "centre", "learning_rate": 20.0}}


def test_every_epoch_is_charged_before_its_release_and_the_checkpoint_can_be_evaluated(tune, tmp_path, folder):
    report = tune(["radiology", "emergency"])
    run = tmp_path / "run"
    assert kinds(ledger(run)) == ["open", "reserve", *["charge", "release"] * 3, "free"]
    assert report["privacy"]["epsilon"] == pytest.approx(4.0, rel=1e-6)
    card = read_checkpoint(run / "checkpoint").card
    assert card["exportable"] is True
    assert card["sites"]["alder"]["privacy"] == report["privacy"]
    assert [read_checkpoint(run / "epochs" / f"000{n}").card["fine_tuned"]["epochs_done"] for n in (1, 2, 3)] == [
        1,
        2,
        3,
    ]
    found = evaluate_checkpoint(run / "checkpoint", folder / "public" / "test" / "manifest.csv", None)
    kept = {n: e["fine_tuned"]["balanced_accuracy"] for n, e in report["evaluation"]["metrics"].items()}
    assert kept == {n: e["federated"]["balanced_accuracy"] for n, e in found["metrics"].items()}
    assert set(kept) == {"radiology", "emergency"}


def test_neither_the_number_of_epochs_nor_the_choice_sees_private_data_under_dp(tune, monkeypatch, folder):
    seen = []
    real = finetune_run.patient_tensors
    monkeypatch.setattr(
        finetune_run, "patient_tensors", lambda *a, **k: seen.append((a[2].path, k["split"])) or real(*a, **k)
    )
    report = tune(patience=1)
    public = {folder / "public" / which / "manifest.csv" for which in ("validation", "test")}
    assert {path for path, _ in seen} == public
    assert report["validation"] == "public"
    with pytest.raises(PrivacyError, match="chosen by public data only"):
        tune(out="other", validation="holdout")


def test_early_stopping_ends_the_charges_and_frees_the_rest_of_the_reservation(tune, tmp_path, monkeypatch):
    figures = itertools.chain([0.9], itertools.repeat(0.5))  # whatever is learned, the start was better
    monkeypatch.setattr(finetune_run, "score_part", lambda *a: {"radiology": Scores(next(figures), None, 8)})
    report = tune(patience=2, epochs=5)
    assert (report["epoch"], report["epochs_done"], report["epochs"]) == (0, 2, 5)
    state = Ledger(ledger(tmp_path / "run"), "alder", Budget(epsilon=4, delta=1e-5)).state()
    assert (state.spent_units, state.reserved_units) == (2 * cost_units(report["privacy"]["noise_multiplier"]), 0)
    zero_shot = zero_shot_heads(load_backbone("tiny"), {"radiology": SPECIALTIES["radiology"]}, 10.0)
    kept = read_checkpoint(tmp_path / "run" / "checkpoint").params
    assert all(torch.equal(kept[name], zero_shot[name]) for name in kept)


def test_the_sites_own_holdout_may_choose_where_privacy_is_off(tune):
    report = tune(plan=OFF, validation="holdout", epochs=2)
    assert (report["validation"], report["privacy"]["epsilon"]) == ("holdout", None)
    assert len(report["history"]) == 3


@pytest.mark.parametrize("plan", [OFF, {**OFF, **CENTRED}], ids=["as it is", "in a basis"])
def test_a_killed_run_that_goes_on_ends_with_the_parameters_of_one_that_was_not(tune, tmp_path, monkeypatch, plan):
    whole = tune(plan=plan, out="whole")
    write, number = finetune_run.write_checkpoint, 0

    def dies(path: Path, *arguments: object) -> None:
        nonlocal number
        number += 1
        if number in (1, 3):  # after the release of an epoch, before its checkpoint
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(finetune_run, "write_checkpoint", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tune(plan=plan)
    assert tune(plan=plan)["history"] == whole["history"]
    for name in ("checkpoint", "epochs/0001", "epochs/0002", "epochs/0003"):
        one, other = (read_checkpoint(tmp_path / out / name).params for out in ("whole", "run"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_is_told_again_and_charged_no_more(tune, tmp_path):
    first = tune()
    before = kinds(ledger(tmp_path / "run"))
    assert tune() == first
    assert kinds(ledger(tmp_path / "run")) == before


def test_an_epoch_whose_charge_was_lost_stays_without_a_step_and_no_other_goes_short(tune, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "local_steps", lambda *arguments: 1 / 0)  # after the charge, before the outbox
        with pytest.raises(ZeroDivisionError):
            tune()
    report = tune()
    assert (report["lost"], report["epochs_done"]) == ([1], 3)
    assert report["privacy"]["epsilon"] == pytest.approx(4.0, rel=1e-6)
    start, first = report["history"][:2]
    assert {**first, "epoch": 0} == start
    assert read_checkpoint(tmp_path / "run" / "checkpoint").card["sites"]["alder"]["rounds_accepted"] == 2


def test_a_hospitals_own_policy_must_approve_the_contract_and_its_ledger_pays(tune, folder, tmp_path):
    policy = site.policy(folder, tmp_path / "home")
    with pytest.raises(PrivacyError, match="not among approved_contracts") as caught:
        tune(policy=policy, epochs=1)
    assert not policy.cache.exists()
    approved = policy.model_copy(update={"approved_contracts": (str(caught.value).split()[1],)})
    tune(policy=approved, epochs=1)
    assert kinds(policy.ledger) == ["open", "reserve", "charge", "release", "free"]
    assert not ledger(tmp_path / "run").exists()
    with pytest.raises(BudgetExceededError, match="beyond the budget of 4"):  # the same contract, another run
        tune(policy=approved, epochs=1, out="second")
    stranger = approved.model_copy(update={"coordinators": ("simulator",)})
    with pytest.raises(PrivacyError, match="coordinator 'local'"):
        tune(policy=stranger, epochs=1, out="third")


def test_heads_that_train_in_a_basis_are_written_without_it(tune, folder, tmp_path):
    plain = tune(plan=OFF, out="plain", validation="none")
    report = tune(plan={**OFF, **CENTRED}, validation="none")
    first = read_checkpoint(tmp_path / "run" / "epochs" / "0001")
    assert first.card["training"]["basis"] == "none"
    assert {name: tuple(t.shape) for name, t in first.params.items()} == {
        name: tuple(t.shape) for name, t in read_checkpoint(tmp_path / "plain" / "checkpoint").params.items()
    }
    found = evaluate_checkpoint(tmp_path / "run" / "checkpoint", folder / "public" / "test" / "manifest.csv", None)
    scores = report["evaluation"]["metrics"]["radiology"]
    assert scores["fine_tuned"]["balanced_accuracy"] == found["metrics"]["radiology"]["federated"]["balanced_accuracy"]
    assert scores["start"] == plain["evaluation"]["metrics"]["radiology"]["start"]
    begun = tune(plan={**OFF, **CENTRED}, out="next", start=tmp_path / "run" / "checkpoint", validation="none")
    assert begun["evaluation"]["metrics"]["radiology"]["start"] == scores["fine_tuned"]


def test_a_hospitals_own_policy_names_the_basis(tune, folder, tmp_path):
    tune(plan=CENTRED, out="first", epochs=1)
    basis = tmp_path / "first" / BASIS_FILE
    policy = site.policy(folder, tmp_path / "home", basis=basis)
    with pytest.raises(PrivacyError, match="not among approved_contracts") as caught:
        tune(plan=CENTRED, policy=policy, epochs=1)
    approved = policy.model_copy(update={"approved_contracts": (str(caught.value).split()[1],)})
    tune(plan=CENTRED, policy=approved, epochs=1)
    assert not (tmp_path / "run" / BASIS_FILE).exists()
    card = read_checkpoint(tmp_path / "run" / "checkpoint").card
    assert card["base_model"]["basis_sha256"] == read_basis(basis).sha256()


def test_what_begins_with_a_checkpoint_says_so_and_its_jobs_are_found(tune, tmp_path):
    first = tune(plan=OFF, epochs=1, validation="none")
    report = tune(plan=OFF, epochs=1, out="next", start=tmp_path / "run" / "checkpoint", validation="none")
    scores = report["evaluation"]["metrics"]["radiology"]
    assert scores["start"] == first["evaluation"]["metrics"]["radiology"]["fine_tuned"]
    card = read_checkpoint(tmp_path / "next" / "checkpoint").card
    job = read_checkpoint(tmp_path / "run" / "checkpoint").card["job"]
    assert card["started_from"]["jobs"] == [job]
    assert card["started_from"]["taken"]["heads"] == ["radiology"]
    assert card["started_from"]["sites"]["alder"]["privacy"] == first["privacy"]
    with pytest.raises(ModelError, match="nothing of it is carried over to emergency"):
        tune("emergency", plan=OFF, out="adapted", start=tmp_path / "run" / "checkpoint", from_specialty="radiology")


@pytest.mark.parametrize("mark", [{"exportable": False}, {"in_house": ["radiology"]}])
def test_nothing_begins_with_an_in_house_head(tune, tmp_path, mark):
    tune(plan=OFF, epochs=1, validation="none")
    path = tmp_path / "run" / "checkpoint" / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | mark))
    with pytest.raises(PrivacyError, match="one hospital trained without noise"):
        tune(out="next", start=path.parent)


def test_wrong_settings_are_refused_before_anything_is_made(tune, tmp_path):
    for match, options in (
        ("site alder offers radiology, emergency", {"specialty": "cardiology"}),
        ("rounds", {"epochs": 0}),
        ("training.learning_rate", {"learning_rate": -1.0}),
        ("give one with --start", {"from_specialty": "radiology"}),
        ("patience=2: needs a validation set", {"patience": 2, "validation": "none"}),
    ):
        with pytest.raises(ConfigError, match=match):
            tune(**options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="validation 'public': no image of radiology"):
        tune(validation="public", plan={"data": {}})
    with pytest.raises(ConfigError, match="another contract_sha256, validation"):
        tune(epochs=7)
    with pytest.raises(ConfigError, match="did you mean 'alder'"):
        fine_tune_for_specialty(site.federation(tmp_path), "alde", "radiology", tmp_path / "run")


def test_the_command_killed_in_the_middle_goes_on_where_it_stood(folder, tmp_path, capsys):
    """A real process, really killed; each epoch is charged once."""
    config, out = tmp_path / "federation.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(json.loads(site.federation(folder).model_dump_json(exclude={"specialties"}))))
    words = ["finetune", str(config), "--site", "alder", "--specialty", "radiology", "--out", str(out)]
    words += ["--epochs", "40", "--json"]
    process = subprocess.Popen([sys.executable, "-m", "clinifed", *words], env=os.environ)
    try:
        deadline = time.monotonic() + 120
        while not (out / "epochs" / "0002").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(list((out / "epochs").iterdir()))
    assert 2 <= done < 40
    main(words)
    report = json.loads(capsys.readouterr().out)
    assert report["epochs_done"] == 40
    charges = [r["round"] for r in read_lines(ledger(out)) if r["kind"] == "charge"]
    assert charges == list(range(40))
