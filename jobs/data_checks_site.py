"""The site under check: its files, each looked at once and no more of them in memory than one batch."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clinifed.config import Federation, Privacy, Specialty, Training
from clinifed.contract import Contract, Promise
from clinifed.data.dataset import iter_pixels
from clinifed.data.dicom import is_dicom
from clinifed.data.manifest import Manifest, Record, read_manifest
from clinifed.executors.features import file_content
from clinifed.jobs.data_checks_header import HeaderReader
from clinifed.jobs.data_checks_share import Shared
from clinifed.models.specialties import SPECIALTIES
from clinifed.policy import SitePolicy

if TYPE_CHECKING:
    from clinifed.models.backbone import Backbone
    from clinifed.privacy.objectives import Objective

__all__ = ["Finding", "Level", "Look", "Pictures", "SiteUnderCheck", "rows_text"]

Level = Literal["PASS", "WARN", "FAIL"]
_BATCH = 16  # images decoded at a time
_SHOWN = 5  # row numbers in one line


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    level: Level
    says: tuple[str, ...]  # for the site's own eyes; images are named by their row in the manifest
    remedy: str = ""
    share: Shared | None = None  # None: the check is named, and neither level nor figures are told


@dataclass(frozen=True)
class Look:
    """One image of the manifest."""

    row: int  # in the manifest, whose row 1 is the header
    record: Record
    content: str | None  # SHA-256 of the file's bytes; None where it cannot be read
    kind: Literal["dicom", "picture", "unreadable"]
    header: Mapping[str, str]  # keyword → text, of DICOM; empty where it was not asked for


@dataclass
class Pictures:
    """What decoding gave."""

    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason → images
    rows: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # reason → rows of the manifest
    by_specialty: Counter[str] = field(default_factory=Counter)  # that can be used


@dataclass(frozen=True)
class _Standard:
    """What BiomedCLIP asks of its images, for decoding where no model is at hand."""

    size_px: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"


@dataclass
class SiteUnderCheck:
    """Everything that checks ask for, made when first asked.

    Args:
        manifest_path: of the site.
        policy: the site's, if it is known.
        policy_path: its file.
        federation: to check against, if it is known.
        name: of the site; empty where nobody says.
        agreed: the contract to check against, if it is known.
        sample: images to open; None opens all.
        minimum: the least count that is told outside.
    """

    manifest_path: Path
    policy: SitePolicy | None = None
    policy_path: Path | None = None
    federation: Federation | None = None
    name: str = ""
    agreed: Contract | None = None
    sample: int | None = None
    minimum: int = 10

    @cached_property
    def manifest(self) -> Manifest:
        """Raises DataError where it cannot be used."""
        return read_manifest(self.manifest_path)

    @cached_property
    def records(self) -> Sequence[Record]:
        """All rows, in the manifest's order."""
        return self.manifest.records

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Image → row."""
        return {record.image: row for row, record in enumerate(self.records, start=2)}

    @cached_property
    def vocabulary(self) -> dict[str, Specialty]:
        """The specialties that have a public meaning: the contract's, the federation's, or those that ship."""
        if self.agreed is not None:
            return dict(self.agreed.specialties)
        own = self.federation.specialties if self.federation is not None else {}
        return {**SPECIALTIES, **own}

    @cached_property
    def wanted(self) -> list[str]:
        """The specialties that the site is to train: as agreed, or else those of the manifest with a meaning."""
        if self.agreed is not None and self.name in self.agreed.sites:
            return sorted(self.agreed.sites[self.name].specialties)
        if self.federation is not None and self.name in self.federation.sites:
            return sorted(self.federation.sites[self.name].specialties)
        return sorted({record.specialty for record in self.records} & set(self.vocabulary))

    @cached_property
    def training(self) -> Training | None:
        """What a round does, as agreed or configured."""
        if self.agreed is not None:
            return self.agreed.training
        return self.federation.training if self.federation is not None else None

    @cached_property
    def objective(self) -> "Objective | None":
        """What the labels are for; None where nobody says. Raises PrivacyError where it may not run."""
        from clinifed.privacy.objectives import resolve_objective

        if self.agreed is not None:
            return resolve_objective(self.agreed.promise.objective)
        return resolve_objective(self.federation.privacy.objective) if self.federation is not None else None

    @cached_property
    def epsilon_asked(self) -> float:
        """What the run would cost a patient; 0 where nobody says, or privacy is off."""
        promise: Promise | Privacy
        if self.agreed is not None:
            promise = self.agreed.promise
        elif self.federation is not None:
            promise = self.federation.privacy
        else:
            return 0.0
        return promise.epsilon if promise.mode == "dp" else 0.0

    @cached_property
    def model_ref(self) -> str | None:
        """Where the base model is, by policy, contract or configuration."""
        if self.policy is not None and self.policy.model_ref:
            return self.policy.model_ref
        if self.agreed is not None:
            return self.agreed.base_model.ref
        return self.federation.model.ref if self.federation is not None else None

    @cached_property
    def backbone(self) -> "Backbone | None":
        """The base model; None where nobody says which. Raises ModelError where it cannot be loaded."""
        if self.model_ref is None:
            return None
        from clinifed.models.backbone import load_backbone

        return load_backbone(self.model_ref)

    @cached_property
    def contract(self) -> Contract | None:
        """As agreed, or as the configuration would make it, but for a basis; None where neither is known."""
        if self.agreed is not None or self.federation is None or self.backbone is None:
            return self.agreed
        from clinifed.jobs.basis import planned_basis
        from clinifed.jobs.recipe import build_contract

        return build_contract(self.federation, planned_basis(self.federation, self.backbone))

    @cached_property
    def sampled(self) -> list[Record]:
        """The images that are opened: all, or ``sample`` of them evenly over the manifest."""
        count = len(self.records)
        if self.sample is None or self.sample >= count:
            return list(self.records)
        return [self.records[number * count // self.sample] for number in range(self.sample)]

    @cached_property
    def looks(self) -> list[Look]:
        """Every image's content, and of the sampled ones the header."""
        opened = {record.image for record in self.sampled}
        found = []
        with HeaderReader() as reader:
            for row, record in enumerate(self.records, start=2):
                path = self.manifest.folder / record.image
                kind: Literal["dicom", "picture", "unreadable"] = "unreadable"
                header: Mapping[str, str] = {}
                content = file_content(path)
                if content is not None:
                    kind = "dicom" if is_dicom(path) else "picture"
                    if kind == "dicom" and record.image in opened:
                        header = reader.read(path)
                found.append(Look(row, record, content, kind, header))
        return found

    @cached_property
    def pictures(self) -> Pictures:
        """The sampled images, decoded as for training."""
        found, preprocess = Pictures(), self.backbone.preprocess if self._has_model() and self.backbone else _Standard()
        for start in range(0, len(self.sampled), _BATCH):
            some = self.sampled[start : start + _BATCH]
            for batch in iter_pixels(self.manifest, some, preprocess, _BATCH):
                read = {record.image for record in batch.records}
                found.used += len(read)
                found.by_specialty.update(r.specialty for r in some if r.image in read)
                found.skipped.update(batch.skipped)
            lost = [record for record in some if record.image not in read]
            for record in lost:  # which of the batch's reasons is whose
                reasons = list(batch.skipped)
                if len(reasons) > 1:
                    alone = next(iter_pixels(self.manifest, [record], preprocess, 1))
                    reasons = list(alone.skipped) or reasons
                found.rows[reasons[0]].append(self.row_of[record.image])
        return found

    def _has_model(self) -> bool:
        from clinifed.errors import ModelError

        try:
            return self.backbone is not None
        except ModelError:  # its own check tells
            return False


def rows_text(rows: Sequence[int]) -> str:
    """``row 5`` or ``rows 5, 9 and 12 more``: how a report names images."""
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_SHOWN]))}{more}"
