"""A checkpoint of BiomedCLIP's real size with random weights, and heads that were fitted on drawn images.

The weights are not BiomedCLIP's: figures made with it are of speed, size, memory and numerics, never of medicine.
"""

import json
import shutil
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import BertConfig

from clinifed.aggregators.checkpoint import write_checkpoint
from clinifed.config import FolderIndex, Synthesize, Training
from clinifed.data.dataset import load_pixels
from clinifed.data.index import index_folder
from clinifed.data.manifest import read_manifest
from clinifed.data.synthesize import synthesize
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import load_backbone
from clinifed.models.specialties import SPECIALTIES

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
NAMES = ("cardiology", "dermatology", "emergency", "radiology")
TEMPERATURE = 10.0
OUTLIERS, FACTOR = 6, 40.0  # channels of every LayerNorm, and how much larger; exact in FP32


def make_base(folder: Path, *, outliers: bool = False) -> str:
    """BiomedCLIP's architecture (ViT-B/16, PubMedBERT, 512 dimensions) with random weights; returns its reference."""
    (folder / "text").mkdir(parents=True)
    shutil.copyfile(TINY / "tokenizer_config.json", folder / "tokenizer_config.json")
    text_tower = BertConfig()
    text_tower.to_json_file(folder / "text" / "config.json", use_diff=False)
    make_vocabulary(folder, text_tower.vocab_size)
    config = json.loads((TINY / "open_clip_config.json").read_text())
    vision = {"timm_model_name": "vit_base_patch16_224", "image_size": 224}
    config["model_cfg"]["embed_dim"] = 512
    config["model_cfg"]["vision_cfg"].update(vision)
    config["model_cfg"]["text_cfg"]["context_length"] = 256
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    text = {**config["model_cfg"]["text_cfg"], "hf_model_name": str(folder / "text")}
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", text_cfg=text)
    if outliers:
        inject_outliers(model.visual.trunk)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return f"local-dir:{folder}"


def make_vocabulary(folder: Path, size: int) -> None:
    """The tiny model's words, and as many that nobody says as PubMedBERT has more."""
    words = (TINY / "vocab.txt").read_text().split()
    words += [f"[unused{number}]" for number in range(size - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    content = json.loads((TINY / "tokenizer.json").read_text())
    content["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@torch.no_grad()
def inject_outliers(trunk: torch.nn.Module) -> None:
    """Some channels behind every LayerNorm ``FACTOR`` times larger, the weights that read them as much smaller."""
    for block in trunk.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            chosen = torch.randperm(norm.weight.numel())[:OUTLIERS]
            norm.weight[chosen] *= FACTOR
            norm.bias[chosen] *= FACTOR
            linear.weight[:, chosen] /= FACTOR


@torch.no_grad()
def make_checkpoint(folder: Path, ref: str, patients: int) -> Path:
    """Drawn public sets of ``patients`` per specialty, and heads fitted on the validation set by least squares."""
    settings = Synthesize(patients_per_specialty=4, public_patients_per_specialty=patients, max_images=1)
    synthesize(settings, {"site": NAMES}, folder / "data")
    public = {}
    for which in ("validation", "test"):
        here = folder / "data" / "public" / which
        public[which] = here / "manifest.csv"
        index = FolderIndex(folder=here, labels=(here / "labels.csv",), split="train")
        index_folder(index, public[which], NAMES, "public")
    backbone = load_backbone(ref)
    specialties = {name: SPECIALTIES[name] for name in NAMES}
    part = build_trainable(backbone, specialties, Training(train="projection", temperature=TEMPERATURE))
    part.trunk.projection.weight += 1e-3 * torch.randn_like(part.trunk.projection.weight)
    model = GlobalModel(backbone, part).eval()
    manifest = read_manifest(public["validation"])
    loaded = load_pixels(manifest, manifest.records, backbone.preprocess)
    embedding = torch.cat([model(batch)[0] for batch in loaded.pixels.split(8)])
    for name, head in part.heads.items():
        rows = [i for i, record in enumerate(loaded.records) if record.specialty == name]
        labels = list(specialties[name].labels)
        codes = torch.tensor([labels.index(loaded.records[i].label) for i in rows])
        x = torch.cat([embedding[rows], torch.ones(len(rows), 1)], dim=1).double()
        ridge = x.T @ x + 1e-6 * torch.eye(x.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(ridge, x.T @ torch.nn.functional.one_hot(codes, len(labels)).double()).float()
        head.weight.copy_(TEMPERATURE * solution[:-1].T)
        head.bias.copy_(TEMPERATURE * solution[-1])
    card = {
        "schema_version": 1,
        "federation": "real-size",
        "base_model": {"ref": ref, "sha256": backbone.sha256},
        "training": {"train": "projection", "temperature": TEMPERATURE},
        "objective": "cross-entropy",
        "specialties": {name: entry.model_dump(mode="json") for name, entry in specialties.items()},
        "public": {which: str(path) for which, path in public.items()},
        "exportable": True,
    }
    params = {name: tensor.numpy() for name, tensor in part.state_dict().items()}
    write_checkpoint(folder / "checkpoint", params, card)
    return folder / "checkpoint"
