"""BiomedCLIP through open_clip: one code path for the hub, a local directory and the tiny model shipped here.

Its weights are loaded when something needs them, which a site whose images are all in the cache does not.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from clinifed import __version__
from clinifed.errors import ModelError
from clinifed.models.basis import Basis
from clinifed.models.identity import Identity, KeptIdentity, prompts_key
from clinifed.models.mirror import Mirror, check_mirror
from clinifed.models.model_files import MIRROR, ModelFiles, Preprocess
from clinifed.models.tokenizer import Tokenizer, load_tokenizer, prompt_problems
from clinifed.models.tower import Tower, load_tower, state_sha256

__all__ = ["BIOMEDCLIP", "TINY", "Backbone", "Preprocess", "load_backbone", "state_sha256"]

log = logging.getLogger(__name__)

BIOMEDCLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
TINY = "tiny"
_TINY_DIR = Path(__file__).resolve().parent / "tiny"
_READERS = ("open_clip_torch", "timm", "tokenizers", "torch", "transformers")  # whose releases may change an embedding


class Backbone:
    """A frozen BiomedCLIP: image tower, text tower, tokenizer and preprocessing.

    Shapes: N texts, F features before the projection, D embedding dimension.

    Args:
        files: where it is.
        identity: what it is, where that is known already; its weights are then loaded when they are needed.
        kept: where its identity is kept, with the first prompts; a job that is refused before leaves nothing.

    Guarantees:
        - Weights that are loaded later have the hash that was told before, or nothing is computed with them.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, files: ModelFiles, identity: Identity | None = None, kept: KeptIdentity | None = None) -> None:
        self.ref = files.ref
        self._files, self._kept = files, kept
        self._tower: Tower | None = None
        self._tokenizer: Tokenizer | None = None
        self.basis: Basis | None = None  # that heads may train in
        if identity is None:
            self._tokenizer = load_tokenizer(files)  # wrong ones are refused before the weights are read
            self._tower = load_tower(files)
            identity = Identity(self._tower.sha256, self._tower.preprocess, self._tower.parameter_bytes)
        self._identity = identity

    def with_basis(self, basis: Basis | None) -> Self:
        """The same backbone with another basis."""
        other = copy.copy(self)
        other.basis = basis
        return other

    @property
    def sha256(self) -> str:
        """Of all weights, independent of the file format they came from."""
        return self._identity.sha256

    @property
    def preprocess(self) -> Preprocess:
        """How it wants its images."""
        return self._identity.preprocess

    @property
    def parameter_bytes(self) -> int:
        """Size of all weights in bytes, as they are stored in memory when all are loaded."""
        return self._identity.parameter_bytes

    @property
    def loaded(self) -> bool:
        """Whether weights are in memory."""
        return self._tower is not None

    @property
    def model(self) -> Any:
        """open_clip's CustomTextCLIP, an nn.Module, with both towers."""
        if self._tower is None or self._tower.model.text is None:
            self._tower = self._load(text=True)
        return self._tower.model

    @property
    def visual(self) -> Any:
        """open_clip's image tower, an nn.Module; the text tower is not loaded for it."""
        if self._tower is None:
            self._tower = self._load(text=False)
        return self._tower.model.visual

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts → token ids (N, L) int64."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._files)
        return self._tokenizer

    def _load(self, *, text: bool) -> Tower:
        with torch.inference_mode(mode=False):  # weights made in that mode could never train, nor go to a GPU
            tower = load_tower(self._files, text=text)
        if tower.sha256 != self.sha256:
            raise ModelError(
                f"{self.ref}: the weights are {tower.sha256} and were {self.sha256} when this process began; "
                "the files must not change while it runs. Start again"
            )
        return tower

    def projection(self) -> nn.Linear:
        """The linear map (F → D, no bias) from the image trunk's features to the embedding.

        Raises:
            ModelError: the backbone ends in something else, so that ``train: projection`` has no meaning.
        """
        proj = getattr(self.visual.head, "proj", None)
        if not isinstance(proj, nn.Linear) or getattr(proj, "bias", None) is not None:
            raise ModelError(
                f"{self.ref}: the image tower has no bias-free linear `visual.head.proj`, "
                "so `train: projection` cannot be used; use `train: heads`"
            )
        return proj

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings (N, D) of ``texts``; the text tower is frozen in every mode.

        Raises:
            ModelError: the tokenizer does not know a word of them. Every such prompt at once.
        """
        key = prompts_key(texts)
        if key not in self._identity.prompts:
            if problems := prompt_problems(self.tokenizer, texts):
                raise ModelError(*(f"{self.ref}: {problem}" for problem in problems))
            rows = self.encode_reports(texts)
            self._identity = replace(self._identity, prompts={**self._identity.prompts, key: rows})
            if self._kept is not None:
                self._kept.write(self._identity)
        return self._identity.prompts[key].clone()

    @torch.no_grad()
    def encode_reports(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings (N, D) of what people wrote: nothing of it is kept, nor told in an error.

        A word that the tokenizer does not know is its unknown token.
        """
        return functional.normalize(self.model.encode_text(self.tokenizer(list(texts))), dim=-1)

    def free_text(self) -> None:
        """Let go of the text tower, more than half of BiomedCLIP; texts that were encoded stay known."""
        if self._tower is not None:
            self._tower.model.text = None


def load_backbone(ref: str, cache: Path | None = None) -> Backbone:
    """A frozen backbone on the CPU, in evaluation mode. Nothing of it is unpickled or run as a program.

    Args:
        ref: ``tiny`` (ships with clinifed), ``local-dir:PATH`` or ``hf-hub:OWNER/NAME@REVISION``.
        cache: a site's embedding cache, where what is known of a model is kept, so that its weights are loaded only
            for images and prompts that are not there.

    Guarantees:
        - Where the directory has a ``mirror.json``, every file is as it says.
        - What is kept of a model is trusted for exactly the same bytes of every file.

    Raises:
        ModelError: the reference is unknown, incomplete or cannot be fetched, or the model wants its images
            otherwise than we make them.
        DataError: others than the owner may enter the cache.
    """
    files = _located(ref)
    mirror = check_mirror(files.root) if (files.root / MIRROR).is_file() else None
    kept = None if cache is None else KeptIdentity(cache, _hashes(files, mirror), _versions())
    backbone = Backbone(files, None if kept is None else kept.read(), kept)
    if mirror is not None and mirror.state_sha256 != backbone.sha256:
        raise ModelError(
            f"{ref}: the weights are {backbone.sha256}, {MIRROR} says {mirror.state_sha256}; fetch the mirror again"
        )
    how = "loaded" if backbone.loaded else "known"
    log.info("backbone %s %s: %.1f MB, sha256 %s", ref, how, backbone.parameter_bytes / 1e6, backbone.sha256[:12])
    return backbone


def _located(ref: str) -> ModelFiles:
    """The model's directory; one of the hub is mirrored into the hub's own cache first."""
    if ref == TINY:
        return ModelFiles(ref, _TINY_DIR)
    if ref.startswith("local-dir:"):
        return ModelFiles(ref, Path(ref.removeprefix("local-dir:")).expanduser().resolve())
    if ref.startswith("hf-hub:"):
        from clinifed.models.hub import cached_mirror  # a site with a mirror needs no client of the hub

        return cached_mirror(ref)
    raise ModelError(
        f"model.ref {ref!r} is not known: use {TINY!r}, 'local-dir:/path/to/model' or 'hf-hub:owner/name@revision'"
    )


def _hashes(files: ModelFiles, mirror: Mirror | None) -> dict[str, str]:
    """SHA-256 of every file that loading may read; a mirror's have just been checked."""
    if mirror is not None:
        return {name: digest for name, (_, digest) in mirror.files.items()}
    return files.sha256_by_name()


def _versions() -> Mapping[str, str]:
    return {"clinifed": __version__, **{name: version(name) for name in _READERS}}
