"""A model's directory: which files it takes, what its configuration says, and what its bytes hash to."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinifed.errors import ModelError
from clinifed.files import file_sha256

__all__ = ["CONFIG", "MIRROR", "PICKLES", "TEXT_CONFIG", "WEIGHTS", "ModelFiles", "Preprocess", "text_cfg"]

CONFIG = "open_clip_config.json"
TEXT_CONFIG = "text/config.json"  # of the repository that the text tower's architecture comes from
MIRROR = "mirror.json"
# The names that open_clip writes and prefers, in its order (open_clip 3.3, factory._find_checkpoint_in_dir).
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Preprocess:
    """How the backbone wants its images: public constants, read from the model's own configuration."""

    size_px: int  # height = width, pixels
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    interpolation: str  # "bicubic" | "bilinear"


@dataclass(frozen=True)
class ModelFiles:
    """The directory of one model, as ``local-dir:`` takes it.

    Guarantees:
        - Weights are safetensors, or there are none: a pickle is not opened.
        - Nothing that the directory says is looked up on a network.

    Raises:
        ModelError: the configuration is missing, names no text tower, or would need a network.
    """

    ref: str
    root: Path

    def __post_init__(self) -> None:
        if not (self.root / CONFIG).is_file():
            raise ModelError(f"{self.ref}: no {CONFIG} in {self.root}; a model directory needs it beside its weights")
        if "hf_model_name" in self.text_cfg() and not (self.root / TEXT_CONFIG).is_file():
            raise ModelError(
                f"{self.ref}: no {TEXT_CONFIG} in {self.root}; it is the config.json of "
                f"{self.text_cfg()['hf_model_name']}, and `clinifed models fetch` puts it there"
            )

    def text_cfg(self) -> dict[str, Any]:
        """What the configuration says of the text tower."""
        return text_cfg(self.root / CONFIG)

    @property
    def overrides(self) -> dict[str, object]:
        """What open_clip must be told so that it loads this directory without a network."""
        text = self.text_cfg()
        if (self.root / TEXT_CONFIG).is_file():
            # A relative name would be looked up on the hub, or against the working directory.
            text.update(hf_model_name=str((self.root / TEXT_CONFIG).parent), hf_model_pretrained=False)
        return {"text_cfg": text}

    @property
    def weights(self) -> Path:
        """The file of weights that is loaded.

        Raises:
            ModelError: there is none as safetensors.
        """
        found = sorted(self.root.glob("*.safetensors"), key=_preference)
        if not found:
            pickles = sorted(path.name for path in self.root.iterdir() if path.suffix in PICKLES)
            there = f"; {', '.join(pickles)} is pickled, and nothing is unpickled" if pickles else ""
            raise ModelError(f"{self.ref} could not be loaded: no *.safetensors in {self.root}{there}")
        return found[0]

    def sha256_by_name(self) -> dict[str, str]:
        """SHA-256 of each file that loading may read, streamed; by name, ``text/`` before those of the text tower."""
        others = {path.name for path in self.root.glob("*.safetensors")} - {self.weights.name} | {MIRROR}
        paths = [*self.root.iterdir(), *(self.root / "text").glob("*")]
        return {
            path.relative_to(self.root).as_posix(): file_sha256(path)
            for path in sorted(paths)
            if path.is_file() and path.name not in others and path.suffix not in PICKLES
        }


def _preference(path: Path) -> tuple[int, str]:
    return (WEIGHTS.index(path.name) if path.name in WEIGHTS else len(WEIGHTS)), path.name


def text_cfg(config: Path) -> dict[str, Any]:
    """What a model's configuration says of its text tower. Raises ModelError where it says nothing."""
    try:
        return dict(json.loads(config.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{config}: no configuration of a model ({type(error).__name__}: {error})") from error
