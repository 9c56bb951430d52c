"""Mirrors of the hub: one commit, safe files only, every byte as it was listed; a mirror loads without a network."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import clinifed.models
from clinifed.cli import main
from clinifed.errors import ModelError
from clinifed.models.backbone import load_backbone
from clinifed.models.hub import fetch_mirror
from clinifed.models.mirror import check_mirror

from .hub_server import Hub

TINY = Path(clinifed.models.__file__).parent / "tiny"
COMMIT, TEXT_COMMIT = "a" * 40, "b" * 40
MODEL, TEXT = "someone/tiny-clip", "someone/tiny-bert"
REF = f"hf-hub:{MODEL}"
WEIGHTS = "open_clip_model.safetensors"
MIRRORED = {
    "LICENSE.md", "open_clip_config.json", WEIGHTS, "text/config.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.txt",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """BiomedCLIP's layout on the hub: the text tower's configuration is in a repository of its own."""
    model, text = tmp_path / "hub" / MODEL, tmp_path / "hub" / TEXT
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("text"))
    shutil.copytree(TINY / "text", text)
    config = json.loads((TINY / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"].update(hf_model_name=TEXT, hf_tokenizer_name=TEXT)
    (model / "open_clip_config.json").write_text(json.dumps(config))
    (model / "LICENSE.md").write_text("mine\n")
    for name in ("open_clip_pytorch_model.bin", "README.md", "modeling.py"):
        (model / name).write_bytes(b"not to be fetched")
    (text / "pytorch_model.bin").write_bytes(b"not to be fetched")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with Hub(tmp_path / "hub") as server:
        server.commits = {MODEL: COMMIT, TEXT: TEXT_COMMIT}
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server
        server.shutdown()


def test_a_mirror_is_the_model_without_a_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mirror"
    main(["models", "fetch", REF, "--out", str(out), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == {"repository": MODEL, "revision": COMMIT}
    assert said["text"] == {"repository": TEXT, "revision": TEXT_COMMIT}
    assert set(said["files"]) == MIRRORED
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {*MIRRORED, "mirror.json"}
    assert not [path for path in hub.asked if path.endswith((".bin", ".py", "README.md"))]
    before = len(hub.asked)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    backbone = load_backbone(f"local-dir:{out}")
    assert backbone.sha256 == said["state_sha256"] == load_backbone("tiny").sha256
    assert backbone.encode_text(["a photo of skin"]).equal(load_backbone("tiny").encode_text(["a photo of skin"]))
    main(["models", "verify", str(out), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == said["files"]
    assert report["prompt_problems"]["radiology"] == []
    assert len(hub.asked) == before
    assert not list(tmp_path.glob(".*"))


def test_a_reference_to_the_hub_is_pinned_and_fetched_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_backbone(REF)
    assert first.ref == f"{REF}@{COMMIT}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.asked)
    assert load_backbone(f"{REF}@{COMMIT}").sha256 == first.sha256
    assert len(hub.asked) == before


@pytest.mark.parametrize("name", [WEIGHTS, "vocab.txt", "open_clip_config.json"])
def test_a_file_that_changed_on_the_way_is_refused_and_nothing_is_left(name: str, hub: Hub, tmp_path: Path) -> None:
    content = (hub.root / MODEL / name).read_bytes()
    hub.served_instead[name] = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    with pytest.raises(ModelError, match=f"{name} at {COMMIT} is not what the hub lists"):
        fetch_mirror(REF, tmp_path / "mirror")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


def test_a_repository_of_pickles_is_refused_and_no_pickle_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    (hub.root / MODEL / WEIGHTS).unlink()
    with pytest.raises(
        ModelError, match=r"no open_clip_model\.safetensors .*open_clip_pytorch_model\.bin, which is pickled"
    ):
        fetch_mirror(REF, tmp_path / "mirror")
    assert not [path for path in hub.asked if "/resolve/" in path]


@pytest.mark.parametrize(
    ("repository", "name", "text"),
    [
        (MODEL, "open_clip_config.json", f"no open_clip_config.json at {COMMIT}"),
        (TEXT, "config.json", f"no config.json at {TEXT_COMMIT}"),
        (MODEL, "vocab.txt", "could not be loaded: its tokenizer"),
    ],
)
def test_a_missing_file_is_named(repository: str, name: str, text: str, hub: Hub, tmp_path: Path) -> None:
    (hub.root / repository / name).unlink()
    if name == "vocab.txt":
        (hub.root / repository / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=text):
        fetch_mirror(REF, tmp_path / "mirror")
    assert not (tmp_path / "mirror").exists()


@pytest.mark.parametrize(
    ("ref", "revision", "text"),
    [
        (REF, "main", "'main' is no commit"),
        (f"{REF}@v1.0", None, "'v1.0' is no commit"),
        (REF, "c" * 40, "has no revision c"),
        (f"{REF}@{COMMIT}", "c" * 40, "say it once"),
        ("hf-hub:someone/nothing", None, "no such repository"),
        ("hf-hub:../../etc", None, "no model of the hub"),
        ("tiny", None, "no model of the hub"),
    ],
)
def test_a_wrong_reference_is_refused(ref: str, revision: str | None, text: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=text):
        fetch_mirror(ref, tmp_path / "mirror", revision)


def test_a_directory_with_something_in_it_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "mine").write_text("mine")
    with pytest.raises(ModelError, match="is there already"):
        fetch_mirror(REF, tmp_path / "mirror")
    assert hub.asked == []


@pytest.mark.parametrize(("name", "value"), [("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:9")])
def test_without_a_network_it_says_so_at_once(name: str, value: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(ModelError, match="mirror the model to a directory"):
        load_backbone(REF)
    assert time.monotonic() - began < 5


def test_an_altered_mirror_is_refused_with_every_difference(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mirror"
    fetch_mirror(REF, out)
    (out / "LICENSE.md").unlink()
    (out / "vocab.txt").write_text("[UNK]\n")
    (out / "text" / "added_tokens.json").write_text("{}")
    with pytest.raises(ModelError) as refused:
        check_mirror(out)
    told = "\n".join(refused.value.problems)
    for name, what in (("LICENSE.md", "missing"), ("vocab.txt", "changed"), ("text/added_tokens.json", "not part")):
        assert f"{out / name}: {what}" in told
    with pytest.raises(ModelError, match="not the mirror"):
        load_backbone(f"local-dir:{out}")
    with pytest.raises(SystemExit) as ended:
        main(["models", "verify", str(out)])
    assert ended.value.code == ModelError.exit_code
    assert capsys.readouterr().err.count("clinifed: ") == 4


def test_a_mirror_of_other_weights_than_it_says_is_refused(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "mirror"
    fetch_mirror(REF, out)
    content = json.loads((out / "mirror.json").read_text())
    (out / "mirror.json").write_text(json.dumps({**content, "state_sha256": "0" * 64}))
    with pytest.raises(ModelError, match=r"mirror\.json says 0000"):
        load_backbone(f"local-dir:{out}")
