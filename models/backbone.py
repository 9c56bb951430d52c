"""BiomedCLIP through open_clip: one code path for the hub, a local directory and the tiny model shipped here."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn import functional
from transformers import dynamic_module_utils

from clinifed.errors import ModelError

__all__ = ["BIOMEDCLIP", "TINY", "Backbone", "Preprocess", "load_backbone", "state_sha256"]

log = logging.getLogger(__name__)

BIOMEDCLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
TINY = "tiny"
_TINY_DIR = Path(__file__).resolve().parent / "tiny"
_CONFIG = "open_clip_config.json"

# transformers would ask on the terminal whether to run a model's own code, for this many seconds; the answer is no.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


@dataclass(frozen=True)
class Preprocess:
    """How the backbone wants its images: public constants, read from the model's own configuration."""

    size_px: int  # height = width, pixels
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    interpolation: str  # "bicubic" | "bilinear"


@dataclass(frozen=True)
class Backbone:
    """A frozen BiomedCLIP: image tower, text tower, tokenizer and preprocessing.

    Shapes: N texts, F features before the projection, D embedding dimension.
    """

    ref: str
    model: Any  # open_clip's CustomTextCLIP, an nn.Module
    tokenizer: Callable[[Sequence[str]], Tensor]
    preprocess: Preprocess
    sha256: str  # of all weights, independent of the file format they came from

    @property
    def parameter_bytes(self) -> int:
        """Size of all weights in bytes, as they are stored in memory."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def projection(self) -> nn.Linear:
        """The linear map (F → D, no bias) from the image trunk's features to the embedding.

        Raises:
            ModelError: the backbone ends in something else, so that ``train: projection`` has no meaning.
        """
        proj = getattr(self.model.visual.head, "proj", None)
        if not isinstance(proj, nn.Linear) or getattr(proj, "bias", None) is not None:
            raise ModelError(
                f"{self.ref}: the image tower has no bias-free linear `visual.head.proj`, "
                "so `train: projection` cannot be used; use `train: heads`"
            )
        return proj

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings (N, D) of ``texts``; the text tower is frozen in every mode."""
        return functional.normalize(self.model.encode_text(self.tokenizer(list(texts))), dim=-1)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in sorted order."""
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_clip_ref(ref: str) -> tuple[str, dict[str, object]]:
    """The name open_clip knows, and what must be overridden for it to load without a network."""
    if ref.startswith("hf-hub:"):
        return ref, {}
    if ref == TINY:
        root = _TINY_DIR
    elif ref.startswith("local-dir:"):
        root = Path(ref.removeprefix("local-dir:")).expanduser().resolve()
    else:
        raise ModelError(
            f"model.ref {ref!r} is not known: use {TINY!r}, 'local-dir:/path/to/model' or 'hf-hub:owner/name'"
        )
    config = root / _CONFIG
    if not config.is_file():
        raise ModelError(f"{ref}: no {_CONFIG} in {root}; a model directory needs it beside its weights")
    text_cfg = _text_cfg(config)
    if (root / "text" / "config.json").is_file():
        # A relative name would be looked up on the hub, or against the working directory.
        text_cfg.update(hf_model_name=str(root / "text"), hf_model_pretrained=False)
    return f"local-dir:{root}", {"text_cfg": text_cfg}


def _text_cfg(config: Path) -> dict[str, Any]:
    """What a model's configuration says of its text tower. Raises ModelError where it says nothing."""
    try:
        return dict(json.loads(config.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{config}: no configuration of a model ({type(error).__name__}: {error})") from error


def _tokenizer(name: str) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer of an open_clip name, from data alone.

    A model's ``tokenizer_kwargs`` reach transformers, and with ``trust_remote_code`` among them the model's own
    Python would run. What the caller says wins over them.
    """
    if name.startswith("hf-hub:"):
        config = Path(hf_hub_download(name.removeprefix("hf-hub:"), _CONFIG))
    else:
        config = Path(name.removeprefix("local-dir:")) / _CONFIG
    of_transformers = bool(_text_cfg(config).get("hf_tokenizer_name"))  # open_clip's own tokenizers run no model's code
    found: Callable[[Sequence[str]], Tensor] = open_clip.get_tokenizer(
        name, **({"trust_remote_code": False} if of_transformers else {})
    )
    return found


def _preprocess(ref: str, config: Mapping[str, Any]) -> Preprocess:
    """What is implemented of open_clip's ``preprocess_cfg``; its ``fill_color`` pads with ``longest`` alone.

    Raises:
        ModelError: the model was trained on images that were prepared otherwise: its features of ours would be others.
    """
    size, mode, resize = config["size"], config.get("mode", "RGB"), config.get("resize_mode") or "shortest"
    sides = {size} if isinstance(size, int) else set(size)
    problems = []
    if resize != "shortest":
        problems.append(f"resize_mode {resize!r}: only 'shortest', and the middle of it, is implemented")
    if config["interpolation"] not in ("bicubic", "bilinear"):
        problems.append(f"interpolation {config['interpolation']!r}: only 'bicubic' and 'bilinear' are implemented")
    if mode != "RGB":
        problems.append(f"mode {mode!r}: only 'RGB' is implemented")
    if len(sides) != 1:
        problems.append(f"size {size!r}: only squares are implemented")
    if problems:
        raise ModelError(
            *(f"{ref}: preprocess_cfg.{problem}; use another base model, or train one so" for problem in problems)
        )
    return Preprocess(int(sides.pop()), tuple(config["mean"]), tuple(config["std"]), str(config["interpolation"]))


def load_backbone(ref: str) -> Backbone:
    """Load a frozen backbone on the CPU, in evaluation mode. Nothing of it is unpickled or run as a program.

    Args:
        ref: ``tiny`` (ships with clinifed), ``local-dir:PATH`` or ``hf-hub:OWNER/NAME``.

    Raises:
        ModelError: the reference is unknown, incomplete or cannot be fetched, or the model wants its images otherwise.
    """
    name, overrides = _open_clip_ref(ref)
    try:
        # Without weights open_clip would go on with random ones.
        model = open_clip.create_model(name, require_pretrained=True, **overrides)
        tokenizer = _tokenizer(name)
    except ModelError:
        raise
    except Exception as error:  # open_clip, huggingface_hub and safetensors each raise their own kinds
        raise ModelError(
            f"model.ref {ref!r} could not be loaded ({type(error).__name__}: {error}). Without internet, mirror "
            "the model to a directory and use 'local-dir:/that/directory'"
        ) from error
    model.eval().requires_grad_(False)
    preprocess = _preprocess(ref, open_clip.get_model_preprocess_cfg(model))
    backbone = Backbone(ref, model, tokenizer, preprocess, state_sha256(model.state_dict()))
    log.info("backbone %s: %.1f MB, sha256 %s", ref, backbone.parameter_bytes / 1e6, backbone.sha256[:12])
    return backbone
