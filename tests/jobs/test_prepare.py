"""Before a run: what would make its figures too good is refused."""

from dataclasses import replace

import pytest

from clinifed.config import Federation
from clinifed.data.manifest import write_manifest
from clinifed.errors import DataError
from clinifed.jobs.prepare import prepare_data

from .studied import PLAN


def federation_of(studied, validation, test) -> Federation:
    sites = {
        name: {
            "specialties": list(studied.contract.sites[name].specialties),
            "manifest": str(manifest.path),
            "nominal_patients": 12,
            "data_class": "synthetic",
        }
        for name, manifest in studied.data.sites.items()
    }
    public = {"validation": str(validation.path), "test": str(test.path)}
    return Federation.model_validate({**PLAN, "data": {"public": public}, "sites": sites})


def test_a_test_set_of_its_own_is_taken(studied, tmp_path):
    data = studied.data
    prepared = prepare_data(federation_of(studied, data.validation, data.test), tmp_path / "data", lambda _: None)
    assert prepared.test is not None
    assert prepared.test.sha256 == data.test.sha256


def test_figures_of_images_that_choices_or_training_saw_are_refused_all_at_once(studied, tmp_path):
    data = studied.data
    seen = next(r for r in data.sites["birch"].records if r.split == "train")
    unseen = next(r for r in data.sites["alder"].records if r.split == "holdout")
    records = [*data.test.records, *(replace(r, image=f"copy-of-{r.sha256}") for r in (seen, unseen))]
    mixed = write_manifest(data.test.folder / "mixed.csv", records, "public")
    with pytest.raises(DataError) as refused:
        prepare_data(federation_of(studied, data.test, mixed), tmp_path / "data", lambda _: None)
    problems = list(refused.value.problems)
    assert len(problems) == 2, "a held-out image trains nothing"
    assert f"public/validation: {len(data.test.records)} of its images" in problems[0]
    assert "birch: 1 of its images are in the public test set" in problems[1]
