"""What is known of a model spares loading it, for exactly these files; weights that are loaded later are checked."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import clinifed.models
from clinifed.config import Training
from clinifed.errors import ModelError
from clinifed.models import backbone as module
from clinifed.models.adapters import FrozenPart, GlobalModel, build_trainable
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.shards import wipe
from clinifed.models.specialties import SPECIALTIES

TINY = Path(clinifed.models.__file__).parent / "tiny"
LABELS = {name: SPECIALTIES[name] for name in ("dermatology", "radiology")}
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Callable[[], Backbone]:
    """A site's start: the model as it is known, and a prompt."""

    def start() -> Backbone:
        backbone = load_backbone(f"local-dir:{folder}", tmp_path / "cache")
        backbone.encode_text(["clear lungs"])
        return backbone

    return start


def test_a_model_that_was_not_used_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    assert load_backbone(f"local-dir:{folder}", tmp_path / "cache").loaded
    assert not (tmp_path / "cache").exists()


def damage(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def test_heads_are_the_same_without_the_weights(load: Callable[[], Backbone]) -> None:
    first = load()
    assert first.loaded
    heads = build_trainable(first, LABELS, Training(train="heads")).shared()
    second = load()
    again = build_trainable(second, LABELS, Training(train="heads")).shared()
    assert not second.loaded
    assert (second.sha256, second.preprocess, second.parameter_bytes) == (
        first.sha256, first.preprocess, first.parameter_bytes,
    )  # fmt: skip
    assert heads.keys() == again.keys()
    assert all(heads[name].equal(again[name]) for name in heads)


def test_an_image_needs_the_image_tower_and_a_new_prompt_both(load: Callable[[], Backbone]) -> None:
    build_trainable(load(), LABELS, Training(train="heads"))
    backbone = load()
    part = build_trainable(backbone, LABELS, Training(train="heads"))
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        features = FrozenPart(backbone, part).features(pixels)
        assert backbone._tower.model.text is None
        assert features.equal(GlobalModel(load_backbone("tiny"), part).features(pixels))
    assert backbone.encode_text(["a regular nevus"]).equal(load_backbone("tiny").encode_text(["a regular nevus"]))
    assert backbone.model.text is not None


def test_what_was_encoded_stays_known_without_the_text_tower() -> None:
    backbone = load_backbone("tiny")
    rows = backbone.encode_text(["clear lungs", "a burn"])
    backbone.free_text()
    assert backbone._tower.model.text is None
    assert backbone.encode_text(["clear lungs", "a burn"]).equal(rows)
    assert backbone._tower.model.text is None
    assert backbone.encode_text(["a nevus"]).shape == (1, rows.shape[1])


def test_weights_that_are_loaded_in_inference_mode_can_train_all_the_same() -> None:
    backbone = load_backbone("tiny")
    backbone.free_text()
    with torch.inference_mode():
        backbone.encode_reports(["a burn"])  # needs both towers again
    part = build_trainable(backbone, LABELS, Training(train="lora"))
    features = torch.randn(2, *part.trunk.shape)
    part(features)["radiology"].sum().backward()
    assert not any(p.is_inference() for p in backbone.model.parameters())


def test_reports_are_encoded_as_prompts_are_and_nothing_of_them_is_kept(load: Callable[[], Backbone]) -> None:
    backbone, texts = load(), ["clear lungs", "a burn"]
    known = dict(backbone._identity.prompts)
    rows = backbone.encode_reports(texts)
    assert backbone._identity.prompts == known
    assert rows.equal(backbone.encode_text(texts))
    assert backbone.encode_reports(["35-year-old"]).norm(dim=-1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", [WEIGHTS, "open_clip_config.json", "vocab.txt", "text/config.json"])
def test_a_kept_identity_is_of_these_files_only(name: str, load: Callable[[], Backbone], folder: Path) -> None:
    load()
    assert not load().loaded
    path = folder / name
    damage(path, -100) if name == WEIGHTS else path.write_text(path.read_text() + "\n")
    assert load().loaded


def test_a_kept_identity_is_of_these_versions_only(
    load: Callable[[], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    assert not load().loaded
    monkeypatch.setattr(module, "version", lambda name: "0.0")
    assert load().loaded


def test_a_damaged_or_forged_identity_is_not_believed(load: Callable[[], Backbone], tmp_path: Path) -> None:
    true = load().sha256
    (kept,) = (tmp_path / "cache").glob("base-*.json")
    assert kept.stat().st_mode & 0o077 == 0
    kept.write_bytes(kept.read_bytes().replace(true.encode(), b"0" * 64))
    again = load()
    assert again.loaded
    assert again.sha256 == true


def test_weights_that_changed_after_the_start_are_not_used(load: Callable[[], Backbone], folder: Path) -> None:
    load()
    backbone = load()
    damage(folder / WEIGHTS, -100)
    for use in (lambda: backbone.visual, lambda: backbone.encode_text(["a nevus"])):
        with pytest.raises(ModelError, match="must not change while it runs"):
            use()


def test_a_cache_is_wiped_with_what_is_known_of_the_model(load: Callable[[], Backbone], tmp_path: Path) -> None:
    load()
    wipe(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_costs_nothing_but_the_next_start(
    load: Callable[[], Backbone], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clinifed.models.identity.write_atomic", full)
    assert load().loaded
    assert "the model is not kept" in caplog.text
