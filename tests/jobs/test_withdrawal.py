"""A patient withdraws: nothing that the site derived of the patient's images stays in its cache."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from clinifed.data.index import patient_pseudonym
from clinifed.data.manifest import Record, site_key, write_manifest
from clinifed.errors import DataError
from clinifed.jobs.withdrawal import Forgotten, withdraw
from clinifed.models.embedding import embed_images
from clinifed.models.shards import Shards
from clinifed.signing import make_signing_key

SPACES = ({"base": "a"}, {"base": "b"})  # as two models, or two versions, leave them


def feature(content: str, frame: int = 0) -> Tensor:
    return torch.tensor([float(b) + 0.5 for b in sha256(f"{content}{frame}".encode()).digest()[:8]])


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


class Site:
    """A site of five patients with two images each, one of them of three frames, all embedded by two models."""

    def __init__(self, home: Path, *, hashed: bool = True) -> None:
        self.home, self.cache = home, home / "cache"
        (home / "images").mkdir(parents=True)
        self.key = site_key(home)
        self.content: dict[str, str] = {}  # image → SHA-256
        self.records = []
        for number in range(10):
            image = f"images/{number}.png"
            (home / image).write_bytes(f"picture {number}".encode())
            self.content[image] = sha256(f"picture {number}".encode()).hexdigest()
            patient = patient_pseudonym(self.key, "HOSPITAL", f"P{number // 2}")
            listed = self.content[image] if hashed else ""
            self.records.append(Record(image, patient, "radiology", "normal", "", "train", listed))
        write_manifest(home / "manifest.csv", self.records, "hospital")
        make_signing_key(home / "signing.key")
        settings = {name: str(home / name) for name in ("ledger", "diary", "cache")}
        settings |= {"site": "alder", "manifest": str(home / "manifest.csv"), "signing_key": str(home / "signing.key")}
        self.policy = home / "policy.yaml"
        self.policy.write_text(yaml.safe_dump(settings | {"budget": {"epsilon": 8.0, "delta": 1e-5}}))
        for space in SPACES:
            self.embed(space)

    def embed(self, space: dict[str, str]) -> int:
        """Rows that were found; the others are made and kept."""
        contents = list(self.content.values())

        def encode(numbers, views):
            for number in numbers:
                rows = [feature(contents[number], frame) for frame in range(1 + 2 * (number % 2))]
                yield [number] * len(rows), torch.stack(rows)[:, None].repeat(1, len(views), 1)

        return embed_images(contents, 1, encode, Shards(self.cache, space), [3] * len(contents)).found

    def rows(self, patient: int) -> list[bytes]:
        """The bytes of every row of a patient's images."""
        images = [f"images/{number}.png" for number in (2 * patient, 2 * patient + 1)]
        return [feature(self.content[i], frame).numpy().tobytes() for i, n in zip(images, (1, 3), strict=True)
                for frame in range(n)]  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Site]:
    return lambda **more: Site(tmp_path / "site", **more)


@pytest.mark.parametrize("hashed", [True, False])
def test_no_row_of_a_withdrawn_image_remains_whatever_model_made_it(site, hashed):
    it = site(hashed=hashed)
    assert all(row in bytes_of(it.cache) for patient in range(5) for row in it.rows(patient))
    assert withdraw(" p1 ", it.policy, "hospital") == Forgotten(rows=2 * 4, shards=0, listed=2)
    left = bytes_of(it.cache)
    assert not any(row in left for row in it.rows(1))
    assert all(row in left for patient in (0, 2, 3, 4) for row in it.rows(patient))
    assert [it.embed(space) for space in SPACES] == [16, 16]


def test_rows_of_images_that_left_the_manifest_before_go_too(site):
    it = site()
    write_manifest(it.home / "manifest.csv", [r for r in it.records if "/2" not in r.image], "hospital")
    withdraw("P1", it.policy, "HOSPITAL")
    assert not any(row in bytes_of(it.cache) for row in it.rows(1))
    write_manifest(it.home / "manifest.csv", it.records[4:], "hospital")
    assert withdraw("P1", it.policy, "HOSPITAL") == Forgotten(rows=2 * 4, shards=0, listed=0)
    assert not any(row in bytes_of(it.cache) for patient in (0, 1) for row in it.rows(patient))


def test_what_cannot_be_told_apart_goes_whole(site):
    it = site()
    name = next(it.cache.glob("*.safetensors")).name
    earlier = it.cache / f"{name[:16]}-{'0' * 32}.safetensors"
    save_file({"rows": torch.zeros(1, 32, dtype=torch.uint8), "features": feature("x")[None]}, earlier)
    unfinished = it.cache / f".{name}.1.tmp"
    unfinished.write_bytes(it.rows(1)[0])
    assert withdraw("P1", it.policy, "HOSPITAL").shards == 1
    assert not earlier.exists()
    assert not unfinished.exists()
    (it.cache / "cache.key").unlink()
    assert withdraw("P2", it.policy, "HOSPITAL").shards == 2
    assert not list(it.cache.glob("*.safetensors"))


def test_a_patient_whom_nobody_knows_costs_nobody_anything(site):
    it = site()
    before = bytes_of(it.cache)
    assert withdraw("P9", it.policy, "HOSPITAL") == Forgotten(0, 0, 0)
    assert bytes_of(it.cache) == before


def test_without_a_manifest_or_a_patient_nothing_is_said_to_be_done(site):
    it = site()
    with pytest.raises(DataError, match="no PatientID"):
        withdraw("  ", it.policy)
    (it.home / "manifest.csv").unlink()
    with pytest.raises(DataError, match="no such manifest"):
        withdraw("P1", it.policy, "HOSPITAL")
