"""What is exported, and on which public images it is judged: checkpoint, base model, manifests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from clinifed.config import Specialty
from clinifed.data.dataset import load_pixels
from clinifed.data.manifest import Manifest, read_manifest
from clinifed.errors import ExportError
from clinifed.export.calibration import require_public, select_evenly
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import Preprocess, load_backbone
from clinifed.models.state import CARD, Checkpoint

__all__ = ["Card", "TestImages", "load_model", "public_manifest"]


@dataclass(frozen=True)
class Card:
    """What the export reads of a checkpoint's card."""

    file: Path
    base_model: str  # a model.ref
    sha256: str  # of the base model's weights
    train: str
    temperature: float
    specialties: Mapping[str, Specialty]
    public: Mapping[str, str]  # "validation" | "test" → manifest, relative to the checkpoint

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The card of ``checkpoint``.

        Raises:
            ExportError: a key is missing or has the wrong kind of value.
        """
        file, card = checkpoint.path / CARD, checkpoint.card
        try:
            return cls(
                file,
                str(card["base_model"]["ref"]),
                str(card["base_model"]["sha256"]),
                str(card["training"]["train"]),
                float(card["training"]["temperature"]),
                {name: Specialty.model_validate(entry) for name, entry in card["specialties"].items()},
                dict(card.get("public") or {}),
            )
        except KeyError as error:
            raise ExportError(f"{file}: key {error} is missing; export a checkpoint clinifed wrote") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ExportError(f"{file}: not a card that can be exported: {error}") from error


def public_manifest(card: Card, key: str, given: Path | None, option: str, purpose: str) -> Manifest:
    """The manifest that an option gives, or else the card's ``public.<key>``; never a hospital's.

    Args:
        card: of the checkpoint.
        key: ``validation`` or ``test``.
        given: the option's value.
        option: its name, for the error.
        purpose: what is derived from the images, as the beginning of a sentence.

    Raises:
        ExportError: neither names a file.
        PrivacyError: the manifest is a hospital's.
        DataError: the manifest cannot be read.
    """
    path = given
    if path is None:
        named = card.public.get(key)
        if not named:
            raise ExportError(f"{card.file}: public.{key} names no manifest; give one with {option} MANIFEST")
        path = card.file.parent / named
        if not path.is_file():
            raise ExportError(f"{card.file}: public.{key} is {named!r}, which is not there; give {option} MANIFEST")
    manifest = read_manifest(path)
    require_public(manifest, purpose)
    return manifest


def load_model(checkpoint: Checkpoint, card: Card, ref: str) -> tuple[GlobalModel, Preprocess]:
    """The model a checkpoint describes, in evaluation mode, on the base model it was trained on.

    Args:
        checkpoint: holds the trained parameters.
        card: its card.
        ref: the base model as this machine can load it; its weights must hash to the card's value.

    Raises:
        ExportError: it is another base model.
        ModelError: the base model cannot be loaded, or the parameters do not fit it.
    """
    backbone = load_backbone(ref)
    if backbone.sha256 != card.sha256:
        raise ExportError(
            f"{card.file}: base_model.sha256 is {card.sha256}, but base model {ref!r} has {backbone.sha256}; "
            "export with the base model that the checkpoint was trained on"
        )
    part = build_trainable(backbone, card.specialties, card.train, card.temperature, checkpoint.params)
    return GlobalModel(backbone, part).eval(), backbone.preprocess


@dataclass(frozen=True)
class TestImages:
    """Public test images, ready for the model."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    pixels: NDArray[np.float32]  # (N, 3, S, S), normalised
    specialties: list[str]  # N
    labels: list[int]  # N indices into the specialty's labels
    manifest: Manifest
    skipped: int  # chosen, but unreadable

    @classmethod
    def load(cls, manifest: Manifest, preprocess: Preprocess, card: Card, count: int) -> Self:
        """At most ``count`` images with a label of the model's own, evenly over specialties and labels.

        Raises:
            ExportError: there is none, or none can be read.
        """
        order = {name: list(specialty.labels) for name, specialty in card.specialties.items()}
        fitting = [r for r in manifest.records if r.label in order.get(r.specialty, ())]
        chosen = select_evenly(fitting, count)
        loaded = load_pixels(manifest, chosen, preprocess) if chosen else None
        if loaded is None or not loaded.records:
            raise ExportError(
                f"{manifest.path}: no readable image of {', '.join(order)} with one of their labels; "
                "give another --test MANIFEST"
            )
        return cls(
            loaded.pixels.numpy(),
            [record.specialty for record in loaded.records],
            [order[record.specialty].index(str(record.label)) for record in loaded.records],
            manifest,
            len(chosen) - len(loaded.records),
        )
