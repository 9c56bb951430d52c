"""A model is loaded tensor by tensor and is what open_clip would load; the architecture is BiomedCLIP's."""

import json
import logging
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

import clinifed.models
from clinifed.models.backbone import load_backbone
from clinifed.models.model_files import ModelFiles
from clinifed.models.tower import load_tower, state_sha256

TINY = Path(clinifed.models.__file__).parent / "tiny"
WEIGHTS = "open_clip_model.safetensors"
VOCABULARY = 30_522  # of PubMedBERT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


def test_it_computes_what_open_clip_would_and_says_nothing_of_random_weights(caplog: pytest.LogCaptureFixture) -> None:
    files = ModelFiles("tiny", TINY)
    theirs = open_clip.create_model(f"local-dir:{TINY}", require_pretrained=True, **files.overrides).eval()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ours = load_tower(files)
    assert not caplog.records
    assert ours.sha256 == state_sha256(theirs.state_dict()) == state_sha256(ours.model.state_dict())
    assert ours.parameter_bytes == sum(p.numel() * p.element_size() for p in theirs.parameters())
    pixels, tokens = torch.randn(2, 3, 160, 160), torch.randint(0, 109, (2, 32))
    with torch.no_grad():
        assert ours.model.encode_image(pixels).equal(theirs.encode_image(pixels))
        assert ours.model.encode_text(tokens).equal(theirs.encode_text(tokens))
    assert {name: b.device.type for name, b in ours.model.named_buffers()} == {
        name: "cpu" for name, _ in theirs.named_buffers()
    }


def test_without_the_text_tower_the_hash_is_that_of_all_weights() -> None:
    whole, image = load_tower(ModelFiles("tiny", TINY)), load_tower(ModelFiles("tiny", TINY), text=False)
    assert image.model.text is None
    assert (image.sha256, image.parameter_bytes) == (whole.sha256, whole.parameter_bytes)
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert image.model.visual(pixels).equal(whole.model.visual(pixels))


def test_its_memory_does_not_follow_what_is_written_over_the_file(folder: Path) -> None:
    tower = load_tower(ModelFiles("copy", folder))
    before = state_sha256(tower.model.state_dict())
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\1" * 4096)
    assert state_sha256(tower.model.state_dict()) == before


def test_modules_that_are_made_afterwards_have_values_again() -> None:
    load_tower(ModelFiles("tiny", TINY))
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize("half", [False, True])
def test_other_layouts_of_the_same_weights_have_the_same_shapes(half: bool, folder: Path) -> None:
    """Position ids, as transformers stored them before 4.31, and 16-bit files, which are read into 32 bits."""
    state = load_file(folder / WEIGHTS)
    if half:
        state = {name: tensor.half() for name, tensor in state.items()}
    else:
        state["text.transformer.embeddings.position_ids"] = torch.arange(32).unsqueeze(0)
    save_file(state, folder / WEIGHTS)
    tower, tiny = load_tower(ModelFiles("other", folder)), load_tower(ModelFiles("tiny", TINY))
    assert {p.dtype for p in tower.model.parameters()} == {torch.float32}
    assert (tower.sha256 == tiny.sha256) is not half


def test_a_layout_that_only_open_clip_knows_goes_through_it(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["logit_scale"] = state["logit_scale"].reshape(1)
    save_file(state, folder / WEIGHTS)
    assert load_tower(ModelFiles("other", folder)).sha256 == load_tower(ModelFiles("tiny", TINY)).sha256


def test_biomedclip_at_its_real_size_loads_on_this_path(tmp_path: Path) -> None:
    """195,902,721 parameters, those of the published model, with drawn values: every shape and the vocabulary."""
    folder = tmp_path / "real"
    (folder / "text").mkdir(parents=True)
    BertConfig(vocab_size=VOCABULARY).to_json_file(folder / "text" / "config.json", use_diff=False)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    words = [*tokenizer["model"]["vocab"]]
    words += [f"[unused{number}]" for number in range(VOCABULARY - len(words))]
    tokenizer["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copyfile(TINY / "tokenizer_config.json", folder / "tokenizer_config.json")
    config = json.loads((TINY / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 512
    config["model_cfg"]["vision_cfg"].update(timm_model_name="vit_base_patch16_224", image_size=224)
    config["model_cfg"]["text_cfg"]["context_length"] = 256
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = open_clip.create_model(
            f"local-dir:{folder}",
            load_weights=False,
            pretrained_text=False,
            device="meta",
            **ModelFiles("real", folder).overrides,
        ).state_dict()
    save_file({name: 0.02 * torch.randn(t.shape) for name, t in shapes.items()}, folder / WEIGHTS)
    backbone = load_backbone(f"local-dir:{folder}")
    (folder / WEIGHTS).unlink()  # 784 MB
    model = backbone.model
    assert sum(p.numel() for p in model.parameters()) == 195_902_721
    assert sum(p.numel() for p in model.visual.parameters()) == 86_191_872
    assert sum(p.numel() for p in model.text.parameters()) == 109_710_848
    assert backbone.parameter_bytes == 783_610_884
    assert backbone.preprocess.size_px == 224
    assert backbone.tokenizer(["a photo of skin"]).shape == (1, 256)
    assert backbone.encode_text(["a photo of skin"]).norm(dim=-1) == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        pooled = backbone.visual.trunk(torch.randn(1, 3, 224, 224))
        assert pooled.shape == (1, 768)
        embedding = backbone.visual.head(pooled)
    assert embedding.shape == (1, 512) == backbone.encode_text(["a photo of skin"]).shape
    assert embedding.isfinite().all()
