"""What is exported, and on which public images it is judged: checkpoint, base model, manifests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from clinifed.config import Name, Specialty, Training
from clinifed.data.dataset import load_pixels
from clinifed.data.manifest import Manifest, Record, read_manifest
from clinifed.data.series import chosen_slices, frames_of
from clinifed.errors import ExportError, PrivacyError
from clinifed.export.calibration import pixels_sha256, require_public, select_evenly
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.state import CARD, Checkpoint
from clinifed.privacy.objectives import Objective, encode_labels, resolve_objective

__all__ = ["Card", "PublicImages", "load_model", "public_manifest"]


@dataclass(frozen=True)
class Card:
    """What the export reads of a checkpoint's card."""

    file: Path
    federation: str
    base_model: str  # a model.ref
    sha256: str  # of the base model's weights
    training: Training
    objective: Objective
    specialties: Mapping[str, Specialty]
    public: Mapping[str, str]  # "validation" | "test" → manifest, relative to the checkpoint
    exportable: bool  # False: no bundle of it may leave the hospital
    in_house: tuple[str, ...]  # specialties whose heads were trained on one hospital's data without noise

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The card of ``checkpoint``.

        Raises:
            ExportError: a key is missing or has the wrong kind of value.
        """
        file, card = checkpoint.path / CARD, checkpoint.card
        try:
            specialties = TypeAdapter(dict[Name, Specialty]).validate_python(card["specialties"])
            in_house = tuple(card.get("in_house") or ())
            unknown = [name for name in in_house if name not in specialties]
            if unknown or not isinstance(card["exportable"], bool):
                raise ValueError(f"exportable must be true or false, in_house name its specialties; {unknown}")
            return cls(
                file,
                str(card["federation"]),
                str(card["base_model"]["ref"]),
                str(card["base_model"]["sha256"]),
                Training.model_validate(card["training"]),
                resolve_objective(str(card["objective"])),
                specialties,
                dict(card.get("public") or {}),
                card["exportable"],
                in_house,
            )
        except KeyError as error:
            raise ExportError(f"{file}: key {error} is missing; export a checkpoint clinifed wrote") from error
        except (TypeError, ValueError, AttributeError, PrivacyError) as error:
            raise ExportError(f"{file}: not a card that can be exported: {error}") from error


def public_manifest(
    card: Card, key: str, given: Path | None, option: str, purpose: str, hospital_data: bool = False
) -> Manifest:
    """The manifest that an option gives, or else the card's ``public.<key>``.

    Args:
        card: of the checkpoint.
        key: ``validation`` or ``test``.
        given: the option's value.
        option: its name, for the error.
        purpose: what is derived from the images, as the beginning of a sentence.
        hospital_data: a hospital's manifest is taken too; the bundle must then stay there.

    Raises:
        ExportError: neither names a file.
        PrivacyError: the manifest is a hospital's, and that was not asked for.
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
    if not hospital_data:
        require_public(manifest, purpose)
    return manifest


def load_model(checkpoint: Checkpoint, card: Card, ref: str) -> tuple[GlobalModel, Backbone]:
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
    part = build_trainable(backbone, card.specialties, card.training, checkpoint.params)
    return GlobalModel(backbone, part).eval(), backbone


@dataclass(frozen=True)
class PublicImages:
    """Images that a precision or a head is judged on, ready for the model."""

    pixels: NDArray[np.float32]  # (N, 3, S, S), normalised
    specialties: list[str]  # N
    labels: list[int]  # N, as the objective encodes them: an index, or a bit set
    multi_label: bool  # whether labels are bit sets
    patients: list[str]  # N pseudonyms; figures count patients
    manifest: Manifest
    skipped: int  # chosen, but unreadable

    @property
    def pixels_sha256(self) -> str:
        """Of the pixels as the model gets them."""
        return pixels_sha256(self.pixels)

    @classmethod
    def load(
        cls, manifest: Manifest, backbone: Backbone, card: Card, count: int, option: str, only: Sequence[str]
    ) -> Self:
        """At most ``count`` images with labels of the model's own, evenly over specialties and labels.

        Of volumes the slices are taken that the specialty's ``frames`` say, as in training; where these are several,
        so many fewer files are chosen.

        Args:
            manifest: where they are listed.
            backbone: whose preprocessing they get.
            card: says what the labels are.
            count: an upper limit.
            option: of the command line that gives another manifest, for the error.
            only: the specialties that are exported.

        Raises:
            ExportError: there is none, or none can be read.
        """
        order = {name: list(card.specialties[name].labels) for name in only}

        def encoded(record: Record) -> int | None:
            try:
                return encode_labels(card.objective, order[record.specialty], record.label)
            except KeyError:
                return None

        frames = frames_of({name: card.specialties[name] for name in only})
        fitting = [r for r in chosen_slices(manifest.records, frames) if encoded(r) is not None]
        most = max((policy.count for policy in frames.values()), default=1)
        chosen = select_evenly(fitting, max(1, count // most))
        loaded = load_pixels(manifest, chosen, backbone.preprocess, frames) if chosen else None
        if loaded is None or not loaded.records:
            raise ExportError(
                f"{manifest.path}: no readable image of {', '.join(order)} with one of their labels; "
                f"give another {option} MANIFEST"
            )
        return cls(
            loaded.pixels.numpy(),
            [record.specialty for record in loaded.records],
            [code for record in loaded.records if (code := encoded(record)) is not None],
            card.objective.labels == "many",
            [record.patient for record in loaded.records],
            manifest,
            len(chosen) - len({record.image for record in loaded.records}),
        )
