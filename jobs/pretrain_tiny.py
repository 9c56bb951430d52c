"""Train the tiny model that ships in ``models/tiny``: BiomedCLIP's architecture, 0.4 million parameters.

    python -m clinifed.jobs.pretrain_tiny --out DIR

It learns from drawn images and their captions alone (:mod:`clinifed.data.phantoms`), on devices near the
atlas device and never on a site's, so that the demonstration starts from a zero-shot model that is useful and
imperfect. It knows nothing about real images. The same seed and number of steps give the same weights on the
same machine.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertTokenizer

from clinifed.data.captions import caption_words, draw_captions
from clinifed.data.devices import draw_device, photograph, quantise
from clinifed.data.phantoms import LABELS, SIZE_PX, draw_patients, render
from clinifed.errors import ModelError
from clinifed.models.specialties import SPECIALTIES

__all__ = ["Atlas", "Recipe", "draw_atlas", "pretrain"]

log = logging.getLogger(__name__)

_CONTEXT_LENGTH = 32  # tokens; the longest caption has 15
_WIDTH = 64  # of both towers and of the embedding
_MODEL_CFG: dict[str, Any] = {
    "embed_dim": _WIDTH,
    # As BiomedCLIP: a timm tower with a linear map without bias; BERT, its [CLS] state and a small MLP.
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": SIZE_PX,
    },
    "text_cfg": {
        "hf_model_name": "text",
        "hf_model_pretrained": False,
        "hf_tokenizer_name": "text",  # the key makes open_clip use the tokenizer in the model directory
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": _CONTEXT_LENGTH,
    },
}
_PREPROCESS_CFG = {
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    steps: int = 1300
    batch: int = 64  # smaller and more steps learnt better than larger
    images_per_label: int = 900
    learning_rate: float = 1.5e-3  # of AdamW, after the warm-up, before the cosine
    weight_decay: float = 0.02
    warmup_steps: int = 60
    jitter: float = 0.6  # devices of the atlas have a strength of 0 to this


@dataclass(frozen=True)
class Atlas:
    """B captioned images of all specialties, RGB."""

    images: NDArray[np.uint8]  # (B, S, S, 3)
    label: NDArray[np.int64]  # (B,), running over the labels of all specialties
    caption: NDArray[np.int64]  # (B,), index into captions
    captions: list[str]  # sorted, distinct


def draw_atlas(rng: np.random.Generator, images_per_label: int, jitter: float) -> Atlas:
    """Draw ``images_per_label`` images of every label, each of another patient, 12 images to a device."""
    images, labels, lines = [], [], []
    codes = [(specialty, code) for specialty, names in LABELS.items() for code in range(len(names))]
    for running, (specialty, code) in enumerate(codes):
        for start in range(0, images_per_label, 12):
            count = min(12, images_per_label - start)
            patients = draw_patients(rng, specialty, np.full(count, code, np.int64))
            scenes = render(rng, patients, np.arange(count))
            device = draw_device(rng, rng.uniform(0, jitter))
            pixels = quantise(photograph(rng, scenes, device), 8).astype(np.uint8)
            images.append(pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, axis=-1))
            lines += draw_captions(rng, patients)
            labels += [running] * count
    captions = sorted(set(lines))
    where = {line: index for index, line in enumerate(captions)}
    return Atlas(
        np.concatenate(images),
        np.array(labels, np.int64),
        np.array([where[x] for x in lines], np.int64),
        captions,
    )


def pretrain(out: Path, recipe: Recipe) -> float:
    """Train from scratch and write a model directory that :mod:`clinifed.models.backbone` loads.

    Returns:
        The loss of the last hundred steps, averaged.

    Raises:
        ModelError: a prompt has a word outside the vocabulary, or ``out`` exists.
    """
    if out.exists():
        raise ModelError(f"{out} exists; remove it or choose another --out")
    (out / "text").mkdir(parents=True)
    torch.manual_seed(recipe.seed)
    tokenizer = _write_text_tower(out)
    text_cfg = {**_MODEL_CFG["text_cfg"], "hf_model_name": str((out / "text").resolve())}
    model = open_clip.CustomTextCLIP(_WIDTH, _MODEL_CFG["vision_cfg"], text_cfg)
    rng = np.random.default_rng(recipe.seed)
    atlas = draw_atlas(rng, recipe.images_per_label, recipe.jitter)
    log.info("atlas: %d images, %d captions", len(atlas.images), len(atlas.captions))
    loss = _fit(model, _tokens(tokenizer, atlas.captions), atlas, recipe, rng)
    config = {"model_cfg": _MODEL_CFG, "preprocess_cfg": _PREPROCESS_CFG}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    return loss


def _write_text_tower(out: Path) -> BertTokenizer:
    """Write the vocabulary, the tokenizer's configuration and BERT's, all without a hub."""
    prompts = [p for name in LABELS for label in SPECIALTIES[name].labels.values() for p in label]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = caption_words(prompts)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789,.-", *letters]
    vocab += [f"##{letter}" for letter in letters] + [word for word in words if word not in vocab]
    (out / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(out / "vocab.txt"), do_lower_case=True, model_max_length=_CONTEXT_LENGTH)
    unknown = [p for p in prompts if tokenizer.unk_token_id in tokenizer(p)["input_ids"]]
    if len(tokenizer) != len(vocab) or unknown:
        raise ModelError(f"tokenizer has {len(tokenizer)} of {len(vocab)} words; prompts with [UNK]: {unknown}")
    tokenizer.save_pretrained(out)
    # No dropout: captions are few, images many, and the weights should depend on the recipe only.
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=_CONTEXT_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.save_pretrained(out / "text")
    return tokenizer


def _tokens(tokenizer: BertTokenizer, texts: list[str]) -> Tensor:
    """Token ids (N, L) int64, padded to the context length."""
    ids: Tensor = tokenizer(
        texts, return_tensors="pt", padding="max_length", max_length=_CONTEXT_LENGTH, truncation=True
    ).input_ids
    return ids


def _batches(atlas: Atlas, recipe: Recipe, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices (batch,), shuffled anew in every pass over the atlas, without end."""
    while True:
        order = rng.permutation(len(atlas.images))
        for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
            yield order[start : start + recipe.batch]


def _fit(model: nn.Module, tokens: Tensor, atlas: Atlas, recipe: Recipe, rng: np.random.Generator) -> float:
    """AdamW, warm-up, cosine over a fixed number of steps; returns the mean loss of the last hundred."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    )
    mean, std = torch.tensor(_PREPROCESS_CFG["mean"]), torch.tensor(_PREPROCESS_CFG["std"])
    losses: list[float] = []
    start_s = time.monotonic()
    for step, rows in zip(range(recipe.steps), _batches(atlas, recipe, rng), strict=False):
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        pixels = (torch.from_numpy(atlas.images[rows]).float() / 255 - mean) / std
        captions, own = np.unique(atlas.caption[rows], return_inverse=True)
        image, text, scale = model(pixels.permute(0, 3, 1, 2), tokens[captions])[:3]
        loss = _loss(scale * image @ text.T, torch.from_numpy(own), torch.from_numpy(atlas.label[rows]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            log.info("step %d: loss %.3f, %.0f s", step + 1, np.mean(losses[-100:]), time.monotonic() - start_s)
    return float(np.mean(losses[-100:]))


def _loss(logits: Tensor, own: Tensor, label: Tensor) -> Tensor:
    """Contrastive loss for captions that repeat.

    Plain InfoNCE would push an image away from equal captions of its neighbours. Half of an image's target is
    its own caption, half is spread over its label's captions; a caption's target is spread over its label's
    images, and labels count alike.

    Args:
        logits: (B, U) float32, image by distinct caption.
        own: (B,) int64, each image's caption.
        label: (B,) int64, each image's label.
    """
    caption_label = torch.empty(logits.shape[1], dtype=torch.int64).scatter_(0, own, label)
    same = (label[:, None] == caption_label).float()
    to_text = 0.5 * functional.one_hot(own, logits.shape[1]) + 0.5 * same / same.sum(dim=1, keepdim=True)
    to_image = same / same.sum(dim=0)
    weight = 1 / torch.bincount(caption_label)[caption_label]
    text_loss = -(to_image * logits.log_softmax(dim=0)).sum(dim=0)
    image_loss = -(to_text * logits.log_softmax(dim=1)).sum(dim=1).mean()
    return 0.5 * (image_loss + (weight * text_loss).sum() / weight.sum())


def main() -> None:
    """Read the command line, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write; must not exist")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; other numbers change rounding")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    pretrain(args.out, Recipe(seed=args.seed, steps=args.steps))


if __name__ == "__main__":
    main()
