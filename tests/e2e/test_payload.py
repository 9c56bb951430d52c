"""What leaves a hospital, taken at its FLARE process after the last filter, and decoded: the list, and nothing else."""

import io
import json
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pydicom
import pytest
import yaml

from clinifed.data.manifest import read_manifest
from clinifed.executors.filters import to_shareable
from clinifed.messages import META_KEYS, TASK_HANDSHAKE
from clinifed.privacy.claims import claim_schema
from clinifed.privacy.outbox import unpack

from .conftest import CONFIGS, command

pytestmark = pytest.mark.e2e
TAP = Path(__file__).with_name("tap")
PLAN = yaml.safe_load((CONFIGS / "smoke.yaml").read_text())
WARD = "ward-CANARY-7f3a"

# FLARE 2.9's own headers, pinned: another release of FLARE may add some, and then somebody must look at them.
FLARE_HEADERS = {
    "__rc__",
    "__audit_event_id__",
    "__content_type__",
    "__cookie_jar__",
    "__msg_root_id__",
    "__peer_ctx__",
    "__peer_props__",
    "__task_id__",
    "__task_name__",
    "__topic__",
    "current_round",
    "last_task_id",
    "start_round",
}
FLARE_IDENTITY = {
    "__client_name__",
    "__current_job_id__",
    "__fqsn__",
    "__identity_name__",
    "__is_leaf__",
    "__run_num__",
}
FLARE_COOKIES = {"__task_id__", "__workflow__", "contribution_round"}
# How FLARE fetches arrays: the server asks the site for pieces, and acknowledges them.
FLARE_DOWNLOAD = {
    "cancel_capable",
    "confirm",
    "confirm_capable",
    "confirm_expected",
    "confirm_nonce",
    "data",
    "ref_id",
    "state",
    "status",
}
FLARE_TOPICS = {"__sync_runner__", "__task_check__"}
TRANSPORT = re.compile(r"cn__\w+|sm__\w+|client_name|ssid|project_name|__token__|__token_signature__")
NAME = re.compile(r"heads\.[a-z]+\.(weight|bias)")


@dataclass(frozen=True)
class Sent:
    """One recorded message."""

    site: str
    where: str  # "encoded" is the payload as FLARE made it, "wire" what goes to the network
    headers: dict[str, str]
    payload: bytes

    def content(self) -> Any:
        """The payload, decoded: FOBS is MessagePack behind ten bytes, the last eight of which are its length."""
        size = int.from_bytes(self.payload[2:10], "big")
        return plain(msgpack.unpackb(self.payload[10 : 10 + size], strict_map_key=False))


def plain(value: Any) -> Any:
    """FOBS' wrappers taken off: what an object was made of, under the name of its class."""
    if isinstance(value, dict):
        if "__fobs_type__" in value:
            inner = plain(value["__fobs_data__"])
            return inner if isinstance(inner, dict) else {value["__fobs_type__"].split(".")[-1]: inner}
        return {str(k): plain(v) for k, v in value.items() if k != "__fobs_dc__"}
    return [plain(v) for v in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Tapped:
    run: Path
    messages: list[Sent]

    def objects(self) -> Iterator[tuple[Sent, Any]]:
        for sent in self.messages:
            if sent.where == "encoded" and "cn__channel" not in sent.headers and sent.payload:
                yield sent, sent.content()

    def updates(self) -> dict[str, list[dict[str, Any]]]:
        found = defaultdict(list)
        for sent, content in self.objects():
            if "DXO" in content:
                found[sent.site].append(content)
        return found


@pytest.fixture(scope="module")
def tapped(smoke, tmp_path_factory) -> Tapped:
    """One round of the three smoke hospitals, whose images lie in a folder with a telling name."""
    home = tmp_path_factory.mktemp("tapped")
    (home / WARD).symlink_to(smoke.path / "data")
    sites = {
        name: {
            **site,
            "manifest": str(home / WARD / name / "manifest.csv"),
            "nominal_patients": 10,
            "data_class": "synthetic",
            **({"declare": ["patient_count"]} if name == "cedar" else {}),
        }
        for name, site in PLAN["sites"].items()
    }
    config = home / "federation.yaml"
    config.write_text(yaml.safe_dump({**PLAN, "rounds": 1, "data": {}, "sites": sites}))
    tap = home / "tap"
    tap.mkdir()
    path = [str(TAP), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command("simulate", config, "--out", home / "run", "--json"),
        capture_output=True,
        text=True,
        cwd=home,
        timeout=400,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "CLINIFED_TAP": str(tap)},
    )
    assert done.returncode == 0, done.stderr
    messages = []
    for path in sorted(tap.iterdir()):
        for line in path.read_text().splitlines():
            r = json.loads(line)
            messages.append(Sent(path.name.split("-")[0], r["where"], r["headers"], bytes.fromhex(r["payload"])))
    return Tapped(home / "run", messages)


def test_every_site_sent_its_update(tapped):
    updates = tapped.updates()
    assert {site: len(found) for site, found in updates.items()} == dict.fromkeys(PLAN["sites"], 1)


def test_an_update_holds_the_list_and_nothing_else(tapped):
    for site, (message,) in tapped.updates().items():
        assert set(message) == {"__headers__", "DXO"}
        dxo = message["DXO"]
        assert set(dxo) == {"kind", "data", "meta"}
        assert dxo["kind"] == {"DataKind": "WEIGHT_DIFF"}
        expected = set(META_KEYS) if site == "cedar" else set(META_KEYS) - {"declared"}
        assert set(dxo["meta"]) == expected
        assert set(dxo["meta"]["claim"]) == set(claim_schema()["required"])
        assert {n.split(".")[1] for n in dxo["data"] if NAME.fullmatch(n)} == set(PLAN["sites"][site]["specialties"])
        assert all(set(array) == {"type", "data"} for array in dxo["data"].values())


def test_the_handshake_is_three_words_that_all_sites_say_alike(tapped):
    said = {}
    for sent, content in tapped.objects():
        if TASK_HANDSHAKE in content:
            assert set(content) == {"__headers__", TASK_HANDSHAKE}
            said[sent.site] = content[TASK_HANDSHAKE]
    assert set(said) == set(PLAN["sites"])
    assert set(said["alder"]) == {"contract_sha256", "clinifed_version", "base_model_sha256"}
    assert said["alder"] == said["birch"] == said["cedar"]


def test_what_the_policy_declares_leaves_and_the_card_lists_it(tapped):
    patients = {r.patient for r in read_manifest(tapped.run.parent / WARD / "cedar" / "manifest.csv").records}
    (message,) = tapped.updates()["cedar"]
    assert set(message["DXO"]["meta"]["declared"]) == {"patient_count"}
    card = json.loads((tapped.run / "checkpoint" / "card.json").read_text())
    assert 0 < card["sites"]["cedar"]["declared"]["patient_count"] <= len(patients)
    assert card["sites"]["alder"]["declared"] == {}


def test_flares_own_headers_are_those_that_are_pinned(tapped):
    for sent, content in tapped.objects():
        if "__headers__" not in content:
            assert set(content) <= FLARE_DOWNLOAD, sent
            continue
        headers = content["__headers__"]
        assert set(content) <= {"__headers__", "DXO", TASK_HANDSHAKE}
        assert set(headers) <= FLARE_HEADERS, set(headers) - FLARE_HEADERS
        assert set(headers.get("__peer_props__", {})) <= FLARE_IDENTITY
        assert set(headers.get("__cookie_jar__", {})) <= FLARE_COOKIES
        assert headers.get("__topic__", "__sync_runner__") in FLARE_TOPICS
        context = headers.get("__peer_ctx__", {}).get("FLContext", [None, {}])[1]
        assert set(context) <= FLARE_IDENTITY
    for sent in tapped.messages:
        assert [name for name in sent.headers if not TRANSPORT.fullmatch(name)] == []


def test_the_arrays_that_leave_are_the_released_ones_to_the_bit(tapped):
    for site in PLAN["sites"]:
        (kept,) = (tapped.run / "sites" / site / "outbox").rglob("*.safetensors")
        released = sorted(value.tobytes() for value in unpack(kept.read_bytes()).params.values())
        left = []
        for sent, content in tapped.objects():
            for piece in content.get("data", []) if sent.site == site and "DXO" not in content else []:
                with np.load(io.BytesIO(piece)) as arrays:
                    left += [arrays[name].astype("<f4").tobytes() for name in arrays.files]
        assert sorted(left) == released


def secrets(tapped: Tapped) -> set[str]:
    """Everything a message must not contain: identities in the images' headers, paths, pseudonyms, image names."""
    found = {WARD, str(tapped.run), "ledger.jsonl", "manifest.csv", "signing.key"}
    for site in PLAN["sites"]:
        manifest = read_manifest(tapped.run.parent / WARD / site / "manifest.csv")
        for record in manifest.records:
            found |= {record.patient, Path(record.image).stem}
        for record in manifest.records[:10]:
            header = pydicom.dcmread(manifest.folder / record.image, stop_before_pixels=True)
            for element in header:
                if element.VR in ("PN", "UI", "LO") and element.keyword in (
                    "PatientName",
                    "PatientID",
                    "SOPInstanceUID",
                    "StudyInstanceUID",
                    "SeriesInstanceUID",
                ):
                    found.add(str(element.value))
    return {text for text in found if len(text) >= 6}


def test_no_planted_name_uid_path_or_pseudonym_is_in_any_byte_that_leaves(tapped):
    searched = secrets(tapped)
    assert len(searched) > 60
    for sent in tapped.messages:
        whole = sent.payload + json.dumps(sent.headers).encode()
        assert [text for text in searched if text.encode() in whole] == []


def numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def test_no_count_leaves(tapped):
    """The numbers of a message are the round, the schema's version and N₀."""
    for site, (message,) in tapped.updates().items():
        meta = {k: v for k, v in message["DXO"]["meta"].items() if k != "declared"}
        assert set(numbers(meta)) <= {1, 10}, site
        assert set(numbers(message["__headers__"])) <= {0}, site


def test_the_tap_itself_would_see_a_secret(tapped):
    """Control: what is in an update's metadata is found in the bytes."""
    for site, (message,) in tapped.updates().items():
        nonce = message["DXO"]["meta"]["nonce"].encode()
        assert any(nonce in sent.payload for sent in tapped.messages if sent.site == site and sent.where == "wire")


def test_a_shareable_of_ours_has_no_headers_but_the_rounds(tapped):
    (kept,) = (tapped.run / "sites" / "alder" / "outbox").rglob("*.safetensors")
    headers = to_shareable(unpack(kept.read_bytes()))["__headers__"]
    assert set(headers) == {"__content_type__", "current_round", "start_round"}
