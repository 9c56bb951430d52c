"""From a model's files to a frozen model in memory: each tensor is read, hashed and put in its place once.

open_clip would first draw random weights, then map the file and copy it over them: twice the model's size, and more
while it does so. Here parameters have no memory until their own values are read.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from clinifed.errors import ModelError
from clinifed.models.model_files import ModelFiles, Preprocess

__all__ = ["Tower", "load_tower", "state_sha256"]

log = logging.getLogger(__name__)

_TEXT = "text."
_POSITION_IDS = "text.transformer.embeddings.position_ids"  # a constant, stored by transformers before 4.31
_building = threading.Lock()


@dataclass(frozen=True)
class Tower:
    """A frozen model in evaluation mode, on the CPU."""

    model: Any  # open_clip's CustomTextCLIP, an nn.Module; `text` is None where it was left out
    preprocess: Preprocess
    sha256: str  # of all weights, also of those that were left out
    parameter_bytes: int  # of all weights, likewise


class _StateHash:
    """The hash of :func:`state_sha256`, tensor by tensor; names must come sorted."""

    def __init__(self) -> None:
        self._digest = sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        self._digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        self._digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in sorted order."""
    digest = _StateHash()
    for name in sorted(state):
        digest.add(name, state[name])
    return digest.hexdigest()


def load_tower(files: ModelFiles, *, text: bool = True) -> Tower:
    """Load a model. Nothing of it is unpickled or run as a program.

    Args:
        text: whether the text tower is wanted; without it its weights are read for the hash and let go of.

    Guarantees:
        - The hash is of the very bytes that are in the model, not of a file read at another time.
        - Memory is that of the tensors kept, and of the largest one.

    Raises:
        ModelError: the files are no such model, or it wants its images otherwise than we make them.
    """
    weights = files.weights
    try:
        with _without_values():
            model = _architecture(files)
        digest = _take(model, str(weights), text)
        if digest is None:  # an older or a foreign layout, which open_clip knows how to convert
            from open_clip.factory import load_checkpoint

            model = _architecture(files)
            load_checkpoint(model, str(weights))
            digest = state_sha256(model.state_dict())
    except ModelError:
        raise
    except Exception as error:  # open_clip, timm, transformers and safetensors each raise their own kinds
        raise ModelError(f"{files.ref} could not be loaded ({type(error).__name__}: {error})") from error
    import open_clip

    preprocess = _preprocess(files.ref, open_clip.get_model_preprocess_cfg(model))
    model.eval().requires_grad_(False)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if not text:
        model.text = None
    return Tower(model, preprocess, digest, size)


def _architecture(files: ModelFiles) -> Any:
    """The model as its configuration describes it, without its weights."""
    import open_clip

    with _quiet():
        # No device: moving a parameter without values is an error, even to where it is.
        return open_clip.create_model(
            f"local-dir:{files.root}", load_weights=False, pretrained_text=False, device=None, **files.overrides
        )


def _take(model: Any, path: str, text: bool) -> str | None:
    """Put the tensors of ``path`` into ``model``; their hash, or None where they are laid out otherwise."""
    expected: dict[str, Tensor] = model.state_dict()
    digest, state = _StateHash(), {}
    # `pread` reads a tensor into memory of its own; a mapped file would follow whatever is written over it.
    with safe_open(path, framework="pt", backend="pread") as file:
        names = set(file.keys())
        if names - ({_POSITION_IDS} - expected.keys()) != expected.keys():
            return None
        if any(tuple(file.get_slice(name).get_shape()) != tuple(t.shape) for name, t in expected.items()):
            return None
        for name in sorted(expected):
            tensor = file.get_tensor(name).to(expected[name].dtype)
            digest.add(name, tensor)
            if text or not name.startswith(_TEXT):
                state[name] = tensor
    model.load_state_dict(state, strict=text, assign=True)
    return digest.hexdigest()


@contextmanager
def _without_values() -> Iterator[None]:
    """Parameters made in here have a shape and no memory; buffers have both, since some are in no file of weights."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with _building:
        nn.Module.register_parameter = registered  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that the model has no weights; they are read next."""

    def wanted(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(wanted)
    try:
        yield
    finally:
        root.removeFilter(wanted)


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
