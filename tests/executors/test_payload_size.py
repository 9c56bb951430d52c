"""A site's size does not show in what it sends: 100 patients and 5 000 send equally many bytes."""

from dataclasses import replace

import pytest
import torch
from nvflare.fuel.utils import fobs
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

from clinifed.data.manifest import write_manifest
from clinifed.executors.filters import to_shareable
from clinifed.jobs.prepare import site_policies

from .conftest import JOB


@pytest.fixture(scope="module")
def crowds(prepared, tmp_path_factory):
    """Manifests of 100 and of 5 000 patients, whose images are links to the few that were drawn."""
    made = {}
    source = prepared.sites["alder"]
    for count in (100, 5000):
        folder = tmp_path_factory.mktemp(f"crowd{count}")
        (folder / "images").mkdir()
        records = []
        for number in range(count):
            record = source.records[number % len(source.records)]
            name = f"images/{number:020x}.dcm"
            (folder / name).symlink_to((source.folder / record.image).resolve())
            records.append(replace(record, image=name, patient=f"{number:020x}", split="train"))
        made[count] = write_manifest(folder / "manifest.csv", records, "synthetic")
    return made


def test_sites_of_100_and_5000_patients_send_equally_long_payloads(
    federation, contract, prepared, crowds, train, policy, tmp_path
):
    nvflare_fobs_initialize()
    lengths, sums = {}, {}
    for count, manifest in crowds.items():
        home = tmp_path / str(count)
        (home / "sites" / "alder").mkdir(parents=True)
        (home / "sites" / "alder" / "signing.key").write_bytes(policy.signing_key.read_bytes())
        (home / "sites" / "alder" / "signing.key").chmod(0o600)
        mine = site_policies(federation, replace(prepared, sites={"alder": manifest}), home, contract, ("simulator",))[
            "alder"
        ]
        trainer = train(contract, mine, JOB)
        assert trainer.data.patients == count
        zeros = {name: torch.zeros(shape) for name, shape in contract.shapes.items()}
        updates = [trainer.train(number, zeros) for number in range(contract.rounds)]
        lengths[count] = [len(fobs.dumps(to_shareable(update))) for update in updates]
        sums[count] = sum(float(abs(v).sum()) for u in updates for v in u.params.values())
    assert lengths[100] == lengths[5000]
    assert len(set(lengths[100])) == 1
    assert sums[100] != sums[5000]
