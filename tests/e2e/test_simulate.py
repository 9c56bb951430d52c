"""``clinifed simulate``, from the command line to its run directory, in real FLARE processes."""

import functools
import json
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import pydicom
import pytest
import yaml
from safetensors.numpy import load_file

from clinifed.data.manifest import read_manifest
from clinifed.files import read_lines
from clinifed.jobs.finish import summary_schema
from clinifed.policy import Budget
from clinifed.privacy.accountant import cost_units, noise_multiplier_for
from clinifed.privacy.claims import check_claim
from clinifed.privacy.ledger import Ledger

from .conftest import CONFIGS, command, processes_of

pytestmark = pytest.mark.e2e
PLAN = yaml.safe_load((CONFIGS / "smoke.yaml").read_text())


def test_the_summary_on_disk_is_the_one_printed_and_fits_its_schema(smoke):
    on_disk = json.loads((smoke.path / "summary.json").read_text())
    jsonschema.validate(on_disk, summary_schema())
    assert on_disk == smoke.summary
    assert on_disk["status"] == "finished"


def test_every_site_took_part_in_every_round(smoke):
    assert set(smoke.summary["sites"]) == set(PLAN["sites"])
    for site in smoke.summary["sites"].values():
        assert [r["round"] for r in site["rounds"]] == list(range(PLAN["rounds"]))
        assert all(r["accepted"] and r["reason"] is None and r["compute_s"] > 0 for r in site["rounds"])


def test_each_ledger_adds_up_to_the_epsilon_of_the_plan(smoke):
    sigma = noise_multiplier_for(PLAN["privacy"]["epsilon"], PLAN["privacy"]["delta"], PLAN["rounds"])
    for name, site in smoke.summary["sites"].items():
        path = smoke.path / "sites" / name / "ledger.jsonl"
        state = Ledger(path, name, Budget(epsilon=PLAN["privacy"]["epsilon"], delta=PLAN["privacy"]["delta"])).state()
        assert state.spent_units == PLAN["rounds"] * cost_units(sigma)
        assert site["privacy"]["epsilon"] == pytest.approx(PLAN["privacy"]["epsilon"], rel=1e-6)
        assert site["privacy"]["epsilon"] <= site["privacy"]["budget_epsilon"] * (1 + 1e-9)
        assert site["privacy"]["ledger_head"] == state.head
        assert state.reserved_units == 0
        kinds = [r["kind"] for r in read_lines(path)]
        assert kinds == ["open", "reserve", *["charge", "release"] * PLAN["rounds"], "free"]


def test_every_epsilon_is_a_complete_claim_at_the_server_too(smoke):
    for site in smoke.summary["sites"].values():
        check_claim(site["privacy"])
    for entry in read_lines(next(smoke.path.glob("flare/**/rounds.jsonl"))):
        assert set(entry["claims"]) == set(PLAN["sites"])
        for name, claim in entry["claims"].items():
            check_claim(claim)
            assert claim["budget_epsilon"] is None, "a site's budget is its own business"
            assert claim["scope"] == "job"
            heads = [r["hash"] for r in read_lines(smoke.path / "sites" / name / "ledger.jsonl")]
            assert claim["ledger_head"] in heads


def test_the_ledger_is_verified_by_the_command_line_against_what_left(smoke, clinifed):
    rounds = next(smoke.path.glob("flare/**/rounds.jsonl"))
    for name in PLAN["sites"]:
        ledger = smoke.path / "sites" / name / "ledger.jsonl"
        asked = ("privacy", "ledger", "verify", ledger, "--json", "--published", rounds)
        done = clinifed(*asked, "--published", smoke.path / "checkpoint" / "card.json")
        assert done.code == 0, done.err
        assert done.json()["intact"]


def test_a_patient_who_withdraws_is_told_which_releases_and_models_the_data_touched(smoke, clinifed):
    (policy,) = smoke.path.glob("flare/*/local/clinifed/alder.yaml")
    card = smoke.path / "checkpoint" / "card.json"
    manifest = read_manifest(smoke.path / "data" / "alder" / "manifest.csv")
    record = next(r for r in manifest.records if r.split == "train")
    header = pydicom.dcmread(manifest.folder / record.image, stop_before_pixels=True)
    issuer = ("--issuer", header.IssuerOfPatientID) if header.get("IssuerOfPatientID") else ()
    asked = ("privacy", "touched", "--policy", policy, "--card", card, "--json", *issuer)
    done = clinifed(*asked, typed=f"{header.PatientID}\n")
    assert done.code == 0, done.err
    (job,) = done.json()["touched"]
    assert job["rounds"] == list(range(PLAN["rounds"]))
    assert job["checkpoints"] == [str(card)]
    assert str(header.PatientID) not in done.out + done.err
    assert clinifed(*asked, typed="nobody we know\n").json()["touched"] == []
    assert clinifed(*asked).code == 3


def test_bytes_per_round_and_site_are_at_most_a_hundredth_of_the_model(smoke):
    for site in smoke.summary["sites"].values():
        for r in site["rounds"]:
            assert 0 < max(r["bytes_sent"], r["bytes_received"]) <= smoke.summary["full_model_bytes"] / 100


def test_the_server_held_the_shared_names_only(smoke):
    shared = load_file(next(smoke.path.glob("flare/**/clinifed-runs/*/round_*.safetensors")))
    assert all(name.startswith("heads.") for name in shared)
    assert {name.split(".")[1] for name in shared} == {
        s for site in PLAN["sites"].values() for s in site["specialties"]
    }
    assert any(value.any() for value in shared.values())


def test_the_checkpoint_and_its_card_belong_together(smoke, clinifed):
    card = json.loads((smoke.path / "checkpoint" / "card.json").read_text())
    assert card["evaluation"]["metrics"] == smoke.summary["metrics"]
    assert {n: s["privacy"] for n, s in card["sites"].items()} == {
        n: s["privacy"] for n, s in smoke.summary["sites"].items()
    }
    assert str(smoke.path) not in json.dumps(card)
    again = clinifed("evaluate", smoke.path / "checkpoint", "--json").json()
    for name, scores in again["metrics"].items():
        assert scores["federated"] == pytest.approx(smoke.summary["metrics"][name]["federated"])
        assert scores["zero_shot"] == pytest.approx(smoke.summary["metrics"][name]["zero_shot"])
    assert again["note"] is None
    assert again["relinkage"]["trained"] is None, "heads leave the embedding as it was"
    assert again["relinkage"]["base"]["1"]["value"] > again["relinkage"]["base"]["1"]["chance"]


def test_every_model_is_compared_on_the_public_test_set_per_specialty_and_site(smoke):
    rows = {(r["specialty"], r["site"]): r for r in smoke.summary["comparison"]}
    wanted = {(name, site) for site, plan in PLAN["sites"].items() for name in plan["specialties"]}
    assert set(rows) == wanted | {(name, None) for name, _ in wanted}
    for (name, site), row in rows.items():
        entry, models = smoke.summary["metrics"][name], row["models"]
        assert set(models) == {
            "zero_shot", "local_only", "local_only_dp", "centralised", "federated_no_dp", "federated_dp"
        }  # fmt: skip
        told = {key: models[key]["balanced_accuracy"]["value"] for key in models}
        assert told["federated_dp"] == pytest.approx(entry["federated"]["balanced_accuracy"])
        alone = entry["local_only_dp"][site or "mean"]["balanced_accuracy"]
        assert told["local_only_dp"] == pytest.approx(alone)
        figure = models["federated_dp"]["auroc"]
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_no_patient_is_named_in_what_a_run_says_or_keeps_outside_its_data(smoke):
    names = {p.name for p in (smoke.path / "data").glob("*/dicom/*")}
    assert len(names) > 20
    said = smoke.err + json.dumps(smoke.summary)
    kept = [p for p in smoke.path.rglob("*") if p.is_file() and (smoke.path / "data") not in p.parents]
    said += "".join(p.read_text(errors="replace") + p.name for p in kept)
    assert [name for name in names if name in said] == []


def test_a_sites_files_are_its_owners_alone(smoke):
    for name in PLAN["sites"]:
        assert (smoke.path / "sites" / name).stat().st_mode & 0o077 == 0
        assert (smoke.path / "data" / name / "manifest.csv").stat().st_mode & 0o077 == 0
        for cached in (smoke.path / "sites" / name / "cache").iterdir():
            assert cached.stat().st_mode & 0o077 == 0


def test_nothing_is_left_running(smoke):
    assert processes_of(smoke.path) == []


def test_a_used_run_directory_is_refused(smoke, clinifed):
    done = clinifed("simulate", CONFIGS / "smoke.yaml", "--out", smoke.path)
    assert done.code == 2
    assert "earlier run" in done.err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_every_process_and_leaves_nothing_that_looks_whole(tmp_path, sent):
    run = tmp_path / "run"
    asked = command("simulate", CONFIGS / "smoke.yaml", "--out", run)
    heard = functools.partial(signal.signal, sent, signal.SIG_DFL)  # a suite in the background ignores Ctrl-C itself
    with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=heard) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting FLARE" in line:
                break
        deadline = time.monotonic() + 60
        while len(processes_of(run / "flare")) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(sent)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert "interrupted" in rest
    assert processes_of(run) == []
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert not (run / "checkpoint").exists()


def test_a_site_that_refuses_costs_the_round_that_site_not_the_run(smoke, clinifed, tmp_path):
    """One hospital's ledger is damaged: it refuses, says "policy", and the others go on."""
    broken = tmp_path / "ledger.jsonl"
    broken.write_text("this is no ledger\n")
    config = {
        **PLAN,
        "rounds": 1,
        "min_clients": 2,
        "data": {},
        "aggregation": {"quorum": 2, "round_timeout_s": 200},
    }
    config["sites"] = {
        name: {
            **site,
            "manifest": str(smoke.path / "data" / name / "manifest.csv"),
            "nominal_patients": 10,
            "data_class": "synthetic",
            **({"ledger": str(broken)} if name == "cedar" else {}),
        }
        for name, site in PLAN["sites"].items()
    }
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    done = clinifed("simulate", path, "--out", run, "--json")
    rounds = read_lines(next(run.glob("flare/**/rounds.jsonl")))
    assert rounds[0]["missing"] == {"cedar": "policy"}
    assert rounds[0]["counted"]
    # The run then cannot state cedar's epsilon, and says so rather than guess.
    assert done.code == 5
    assert "not the one that was written" in done.err


def test_a_federation_of_one_site_without_noise_is_that_site_alone(clinifed, tmp_path):
    """All the way through FLARE, process and evaluation, the model is the one that plain training gives."""
    site = {"specialties": ["emergency", "radiology"]}  # three labels in an order that is not the alphabet's
    config = {
        **PLAN,
        "rounds": 3,
        "min_clients": 1,
        "max_clients": 1,
        "privacy": "off",
        "aggregation": {"quorum": 1, "round_timeout_s": 200, "norm_bound": 1000.0},
        "training": {"learning_rate": 4.0, "local_epochs": 2},
        "sites": {"alder": site},
    }
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(config))
    done = clinifed("simulate", path, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    for name, entry in done.json()["metrics"].items():
        alone = entry["local_only"]["alder"]["balanced_accuracy"]
        assert entry["federated"]["balanced_accuracy"] == alone, name
        assert entry["federated"] != entry["zero_shot"], "nothing was learned, so this test shows nothing"


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ("max_clients=2", 2, "max_clients is 2"),
        ("roundz=2", 2, "did you mean 'rounds'?"),
        ("model.ref=local-dir:/nowhere", 4, "open_clip_config.json"),
        ("privacy.objective=contrastive", 5, "every other patient's gradient"),
        ("sites.alder.specialties=[phrenology]", 2, "'phrenology' is not known"),
    ],
)
def test_bad_input_is_told_before_anything_runs(clinifed, tmp_path, change, code, text):
    done = clinifed("simulate", CONFIGS / "smoke.yaml", "--out", tmp_path / "run", "--set", change)
    assert done.code == code, done.err
    assert text in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_manifest_problems_of_all_sites_are_told_at_once(smoke, clinifed, tmp_path):
    sites = {name: {**PLAN["sites"][name], "nominal_patients": 9, "data_class": "synthetic"} for name in PLAN["sites"]}
    for name in sites:
        sites[name]["manifest"] = str(tmp_path / name / "manifest.csv")
    (tmp_path / "alder").mkdir()
    (tmp_path / "alder" / "manifest.csv").write_text("image,patient,label,caption,split\na,b,c,d,train\n")
    source = smoke.path / "data" / "birch"
    sites["birch"] = {**sites["birch"], "manifest": str(source / "manifest.csv"), "specialties": ["emergency"]}
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump({**PLAN, "data": {}, "sites": sites}))
    done = clinifed("simulate", path, "--out", tmp_path / "run")
    assert done.code == 3
    assert "alder" in done.err
    assert "specialty" in done.err  # the missing column
    assert "birch: declares emergency" in done.err
    assert "cedar" in done.err
    assert not Path(tmp_path / "run" / "flare").exists()
