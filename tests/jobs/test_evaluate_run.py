"""What the end of a run tells: every model on the same patients, and what trains without noise on whose data."""

from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch

from clinifed.errors import DataError, UpdateError
from clinifed.executors.features import patient_tensors
from clinifed.jobs import evaluate_run as module
from clinifed.jobs.baselines import alone, centralised, federated_openly, load_part, pool
from clinifed.jobs.comparison import MODELS
from clinifed.jobs.evaluate_run import evaluate_run
from clinifed.jobs.finish import summary_schema
from clinifed.models.adapters import FrozenPart

from .studied import Studied, held_out


@pytest.fixture(scope="module")
def told(studied):
    said: list[str] = []
    metrics, rows, params = evaluate_run(
        studied.contract, studied.backbone, studied.data, studied.policies, studied.delta(0.1), said.append, minimum=2
    )
    return metrics, rows, params


def features(studied: Studied, site: str):
    model = FrozenPart(studied.backbone, load_part(studied.contract, studied.backbone))
    names = studied.contract.sites[site].specialties
    return patient_tensors(
        model,
        studied.backbone,
        studied.data.sites[site],
        {name: studied.contract.specialties[name] for name in names},
        split="train",
        batch_size=64,
        cache=studied.policies[site].cache,
    )


def test_there_is_a_row_per_specialty_per_site_and_for_all_together(told):
    rows = [(r["specialty"], r["patients_of"], r["site"]) for r in told[1]]
    assert rows == [
        ("dermatology", "public test", None),
        ("dermatology", "public test", "alder"),
        ("dermatology", "holdout", "alder"),
        ("radiology", "public test", None),
        ("radiology", "public test", "alder"),
        ("radiology", "public test", "birch"),
        ("radiology", "holdout", "alder"),
        ("radiology", "holdout", "birch"),
        ("radiology", "holdout", None),
    ]
    every = [name for name in MODELS if name != "trained"]
    assert all(list(row["models"]) == every for row in told[1])
    assert all(set(row["gain"]) == set(every) - {"federated_dp"} for row in told[1])


def test_the_rows_fit_the_schema_of_the_summary(told):
    schema = summary_schema()
    jsonschema.validate(told[1], {"$ref": "#/properties/comparison", **schema, "required": [], "type": "array"})
    broken = [{**told[1][0], "patients": "many"}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, {"$ref": "#/properties/comparison", **schema, "required": [], "type": "array"})


def test_metrics_and_comparison_tell_the_same(told):
    metrics, rows, _ = told
    for row in rows:
        if row["patients_of"] != "public test":
            continue
        entry, models = metrics[row["specialty"]], row["models"]
        assert models["zero_shot"]["auroc"]["value"] == pytest.approx(entry["zero_shot"]["auroc"])
        wanted = entry["federated"]["balanced_accuracy"]
        assert models["federated_dp"]["balanced_accuracy"]["value"] == pytest.approx(wanted)
        for key in ("local_only", "local_only_dp"):
            one = entry[key]["mean" if row["site"] is None else row["site"]]["balanced_accuracy"]
            assert models[key]["balanced_accuracy"]["value"] == pytest.approx(one)


def test_held_out_patients_are_those_of_the_site_s_own_and_none_that_trained(told, studied):
    for row in told[1]:
        if row["patients_of"] == "holdout" and row["site"] is not None:
            records = studied.data.sites[row["site"]].records
            own = {r.patient for r in records if r.split == "holdout" and r.specialty == row["specialty"]}
            assert row["patients"] == len(own)
    sizes = {
        r["site"]: r["patients"] for r in told[1] if r["specialty"] == "radiology" and r["patients_of"] != "public test"
    }
    assert sizes[None] == sizes["alder"] + sizes["birch"]


def test_a_hospital_s_patients_are_neither_judged_nor_trained_on_without_noise_here(studied, monkeypatch):
    """One hospital among the sites is enough: no baseline at all, and no held-out row of it."""
    sites = {**studied.data.sites, "birch": held_out(studied.data.sites["birch"], "hospital")}
    read = []
    original = module.patient_tensors
    monkeypatch.setattr(
        module, "patient_tensors", lambda *a, **k: read.append((a[2].path, k["split"])) or original(*a, **k)
    )
    data = replace(studied.data, sites=sites)
    _, rows, params = evaluate_run(
        studied.contract, studied.backbone, data, studied.policies, studied.delta(), lambda _: None, minimum=2
    )
    assert {key for row in rows for key in row["models"]} == {"zero_shot", "federated_dp"}
    assert {row["site"] for row in rows if row["patients_of"] == "holdout"} == {"alder"}
    assert read == [(sites["alder"].path, "holdout"), (studied.data.test.path, None)]
    # This run changed nothing, so it gains nothing over zero-shot.
    gains = [row["gain"]["zero_shot"]["auroc"] for row in rows if not row["suppressed"]]
    assert gains == [{"value": 0, "low": 0, "high": 0}] * len(gains)
    assert len(gains) >= 2, "the public test set has enough of every label"
    start = load_part(studied.contract, studied.backbone).shared()
    assert all(torch.equal(params[name], start[name]) for name in start)


def test_a_baseline_that_diverges_is_left_out_and_the_run_is_told_all_the_same(studied, monkeypatch):
    def diverge(error: type[Exception], *text: str):
        def train(*args: object, **options: object):
            raise error(*text)

        return train

    monkeypatch.setattr(module, "alone", diverge(DataError, "the loss is nan"))
    monkeypatch.setattr(module, "centralised", diverge(DataError, "the loss is inf"))
    monkeypatch.setattr(module, "federated_openly", diverge(UpdateError, "not_finite", "leaves the range"))
    said: list[str] = []
    _, rows, _ = evaluate_run(
        studied.contract, studied.backbone, studied.data, studied.policies, studied.delta(), said.append, minimum=2
    )
    assert [line for line in said if "is not compared" in line] == [
        "alder alone is not compared: the loss is nan",
        "alder alone, with DP is not compared: the loss is nan",
        "birch alone is not compared: the loss is nan",
        "birch alone, with DP is not compared: the loss is nan",
        "all data in one place is not compared: the loss is inf",
        "the federation without DP is not compared: leaves the range",
    ]
    assert all(set(row["models"]) == {"zero_shot", "federated_dp"} for row in rows)


def test_all_data_in_one_place_is_the_site_itself_where_there_is_one_site(studied):
    """And so is a federation of one, without DP: three roads to the same steps."""
    own = features(studied, "birch")
    one = studied.contract.model_copy(update={"sites": {"birch": studied.contract.sites["birch"]}, "min_clients": 1})
    single = alone(one, studied.backbone, "birch", own, private=False).shared()
    pooled = centralised(one, studied.backbone, {"birch": own}).shared()
    openly = federated_openly(one, studied.backbone, {"birch": own}).shared()
    moved = load_part(one, studied.backbone).shared()
    for name, value in single.items():
        assert torch.allclose(pooled[name], value, atol=1e-5), name
        assert torch.allclose(openly[name], value, atol=1e-5), name
        assert not torch.allclose(moved[name], value, atol=1e-3), "nothing was learned, so this test shows nothing"


def test_patients_of_two_sites_are_two_patients_with_their_own_labels(studied):
    own = {site: features(studied, site) for site in ("alder", "birch")}
    both = pool(own, studied.contract)
    names = sorted(studied.contract.specialties)
    assert both.patients == own["alder"].patients + own["birch"].patients
    for index, name in enumerate(names):
        wanted = []
        for site, mine in own.items():
            held = sorted(studied.contract.sites[site].specialties)
            if name in held:
                wanted += mine.label[mine.specialty == held.index(name)].tolist()
        assert both.label[both.specialty == index].tolist() == wanted
    assert np.array_equal(both.features[: len(own["alder"].features)], own["alder"].features)
