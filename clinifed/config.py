"""The configuration of a federation: names, meanings, defaults and limits. YAML files hold values only.

Every field below is a key of the YAML; unknown keys and wrong values are refused, all at once, with the file, the
key, the value and the nearest valid key. Nothing is repaired silently.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from clinifed.messages import Declarable

__all__ = [
    "MAX_BASIS_DIMS",
    "MAX_LABELS",
    "SEPARATOR",
    "Aggregation",
    "BasisKind",
    "Data",
    "Deployment",
    "Export",
    "Federation",
    "FolderIndex",
    "Model",
    "Privacy",
    "PublicSets",
    "Site",
    "Specialty",
    "Synthesize",
    "Training",
]

MAX_LABELS = 62  # of one specialty: a set of them is kept in the bits of an int64
MAX_BASIS_DIMS = 128  # of a reduced basis: more hardly reduces
SEPARATOR = "|"  # between the labels of one image, in a manifest
_RESERVED = ("mean", "server", "public", "flare")  # these name other things in a run and in its summary


def _not_reserved(name: str) -> str:
    if name in _RESERVED:
        raise ValueError(f"{name!r} is reserved; give the site another name")
    return name


# FLARE uses a site's name as a folder name and in certificates.
SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$"), AfterValidator(_not_reserved)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,62}$")]
DataClass = Literal["hospital", "public", "synthetic"]
BasisKind = Literal["centre", "whitening", "pca"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Specialty(_Settings):
    """One medical specialty: its labels, and the prompts whose embeddings start its head."""

    modality: str = ""  # for people; the model does not read it
    labels: dict[str, tuple[str, ...]]  # label → its prompts; the order is the order of the logits
    # Of a volume, evenly spread: of a file's frames, and of the slices of a CT, MR or PET series; 1 is the key slice.
    # By default the middle frame of every file, and every file of a series is an image.
    frames: int | None = Field(None, ge=1, le=64)

    @field_validator("labels", mode="before")
    @classmethod
    def _from_pairs(cls, value: Any) -> Any:
        pairs = isinstance(value, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)
        if pairs and len({str(label) for label, _ in value}) < len(value):
            raise ValueError("a label stands there twice")
        return {label: prompts for label, prompts in value} if pairs else value

    @field_serializer("labels", when_used="json")
    def _to_pairs(self, labels: dict[str, tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
        """As pairs: JSON with sorted keys, which hashes need, would turn the order of the logits."""
        return list(labels.items())

    @field_validator("labels")
    @classmethod
    def _enough(cls, labels: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if len(labels) < 2 or not all(labels.values()):
            raise ValueError("a specialty needs at least two labels, each with at least one prompt")
        if len(labels) > MAX_LABELS:
            raise ValueError(f"{len(labels)} labels; one specialty holds at most {MAX_LABELS}, split it")
        if joined := [label for label in labels if SEPARATOR in label]:
            raise ValueError(f"{joined[0]!r}: a label may not hold {SEPARATOR!r}, which joins the labels of one image")
        return labels


class Model(_Settings):
    """The frozen base model."""

    ref: str = "tiny"  # tiny | local-dir:PATH | hf-hub:OWNER/NAME@COMMIT
    basis: Path | None = None  # of training.basis, by `clinifed basis`; default: made of the public validation set


class Training(_Settings):
    """What every site does in every round."""

    train: Literal["heads", "projection", "lora", "blocks"] = "heads"  # a key of clinifed.models.trunk.TRUNKS
    rank: int = Field(8, ge=1, le=256)  # of lora
    blocks: int = Field(1, ge=1, le=64)  # the last ones of the image tower, which train with blocks
    checkpointing: bool = False  # lora and blocks: less memory for about a third more time
    precision: Literal["fp32", "bf16"] = "fp32"  # of the products in lora and blocks; gradients and noise stay float32
    basis: Literal["none", "centre", "whitening", "pca"] = "none"  # that heads train in, by public images alone
    basis_dims: int = Field(64, ge=2, le=MAX_BASIS_DIMS)  # of pca
    local_epochs: int = Field(1, ge=1, le=100)  # full batch: one epoch is one step is one release
    learning_rate: float = Field(4.0, gt=0, le=1000)
    temperature: float = Field(10.0, gt=0, le=100)  # scale of the zero-shot logits at the start
    batch_size: int = Field(64, ge=1)  # images per physical batch; changes memory, never the result
    views: int = Field(1, ge=1, le=16)  # of each image, a little turned and nearer; they count in the patient's mean
    pull: float = Field(0.0, ge=0, le=1)  # towards the zero-shot start, per unit of step; sees no data, after the noise


class Privacy(_Settings):
    """The promise: ``mode: dp``, or ``privacy: off`` for data marked public or synthetic."""

    mode: Literal["dp", "off"] = "dp"
    epsilon: float = Field(1.0, gt=0, le=100)  # per patient and site, for the whole run
    delta: float = Field(1e-5, gt=0, le=1e-3)
    max_grad_norm: float = Field(1.0, gt=0)  # C, the clip of one patient's gradient; public
    objective: str = "cross-entropy"  # a key of clinifed.privacy.OBJECTIVES
    reserve_rounds: int = Field(0, ge=0, le=1000)  # paid for beforehand, used only where a crash lost a charge


class Aggregation(_Settings):
    """What the server does with the updates of a round."""

    quorum: int = Field(ge=1)  # good updates that a round needs to count: k of n
    round_timeout_s: int = Field(ge=5, le=7 * 86_400)  # the deadline: a round closes then, with what has come
    grace_s: int | None = Field(None, ge=0)  # so long the round waits on, once it has its quorum; default: the deadline
    start_timeout_s: int = Field(3600, ge=5, le=7 * 86_400)  # for the handshake: sites load model and images then
    rule: str = "fedavg"  # a key of clinifed.aggregators.RULES
    weights: Literal["equal", "nominal_patients"] = "equal"  # public numbers only, never a site's true counts
    min_sites_per_head: int = Field(1, ge=1)  # a head that fewer sites sent keeps its value
    update_dtype: Literal["float32", "bfloat16"] = "float32"  # on the way to the server; rounded after the noise
    norm_bound: float | None = Field(None, gt=0)  # of an update; default under DP: from the mechanism, for each site
    server_learning_rate: float = Field(1.0, gt=0)  # of fedavgm and fedadam
    momentum: float = Field(0.9, ge=0, lt=1)  # of fedavgm; beta 1 of fedadam
    second_momentum: float = Field(0.99, ge=0, lt=1)  # beta 2 of fedadam
    adaptivity: float = Field(1e-3, gt=0)  # tau of fedadam
    average_last: float = Field(0.0, ge=0, le=1)  # the final model: the mean of this share of the rounds' models
    trim: float = Field(0.2, gt=0, lt=0.5)  # of trimmed-mean: the share of sites cut at each end


class Deployment(_Settings):
    """Where the server of a provisioned federation is, and who submits."""

    host: str = "localhost"  # the server's DNS name, which its certificate states
    port: int = Field(8002, ge=1, le=65_535)
    admin_port: int = Field(8003, ge=1, le=65_535)
    organization: str = Field("consortium", pattern=r"^[A-Za-z0-9_]{1,64}$")
    coordinator: str = Field("coordinator@consortium.org", pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$")  # a FLARE admin
    rounds_per_job: int = Field(10, ge=1)  # a run is a chain of FLARE jobs: a site that was away joins the next one


class Synthesize(_Settings):
    """Synthetic hospitals, made under the run when they are absent."""

    seed: int = Field(1, ge=0)  # patients and images; public
    style_seed: int = Field(100, ge=0)  # the sites' scanners; independent of ``seed``
    patients_per_specialty: int = Field(50, ge=2, le=100_000)
    public_patients_per_specialty: int = Field(60, ge=4, le=100_000)
    max_images: int = Field(3, ge=1, le=8)  # per patient
    shuffle_labels: bool = False  # a control: labels permuted between the patients of a site


class PublicSets(_Settings):
    """Manifests of data that no hospital owns: for choices (validation) and for reported figures (test)."""

    validation: Path
    test: Path


class FolderIndex(_Settings):
    """How to make a site's manifest from DICOM, PNG or JPEG files, and from what says their labels."""

    folder: Path
    source: str | None = (
        None  # a key of clinifed.data.sources.SOURCES; default: table where there are labels, or folder
    )
    labels: tuple[Path, ...] = ()  # CSV, TSV, .xlsx or Parquet, one row per image; paths count from the table's folder
    columns: dict[str, str] = Field(default_factory=dict)  # image|patient|specialty|label|caption|split → table column
    values: dict[str, dict[str, str]] = Field(default_factory=dict)  # specialty → value in the label column → label
    mapping: Path | None = None  # the same in a file: YAML, or a table with the columns specialty, value, label
    synonyms: dict[str, dict[str, tuple[str, ...]]] = Field(default_factory=dict)  # specialty → label → other words
    builtin_synonyms: bool = False  # also those of clinifed.data.labels, for the labels of clinifed's own specialties
    label_tag: str | None = None  # the DICOM element that says the label: a keyword, or "0008,1030"
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # table column → values of the rows to keep
    issuer: str = ""  # whose PatientIDs those are that name no IssuerOfPatientID
    split: Literal["train", "holdout"] | None = None  # put every patient there
    holdout: float = Field(0.2, ge=0, lt=1)  # otherwise this share of patients, by a keyed hash, is held out
    pixel_duplicates: bool = True  # decode every image once, to find pictures that occur twice or cannot be read


class Data(_Settings):
    """Where images come from when the sites do not name manifests of their own."""

    root: Path = Path()  # what relative paths below and in the sites count from; itself from the YAML's folder
    synthesize: Synthesize | None = None
    public: PublicSets | None = None
    public_index: dict[Literal["validation", "test"], FolderIndex] | None = None


class Site(_Settings):
    """One hospital, as the federation sees it; its own policy file decides what it really permits."""

    specialties: tuple[Name, ...] = Field(min_length=1)
    nominal_patients: int | None = Field(None, ge=1)  # N₀, public, in the contract; never the true count
    budget_epsilon: float | None = Field(None, gt=0)  # lifetime budget of a simulated site; default privacy.epsilon
    manifest: Path | None = None
    index: FolderIndex | None = None
    data_class: DataClass = "hospital"
    ledger: Path | None = None  # needed for data of class hospital: it must outlive the run
    declare: tuple[Declarable, ...] = ()  # what a simulated site's policy lets out un-noised; the card lists it
    public_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None  # Ed25519, of the site's signatures


class Export(_Settings):
    """What ``clinifed export`` makes of the checkpoint."""

    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8", "int8-cpu"], ...] = ("fp32", "fp16", "int8")
    targets: tuple[Literal["onnx", "tensorrt", "tensorrt-rtx"], ...] = ("tensorrt-rtx",)


class Evaluation(_Settings):
    """How the figures of a run are told."""

    min_patients: int = Field(10, ge=1)  # on either side of a label; below it a figure is suppressed


class Federation(_Settings):
    """A whole federation, as one YAML file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")]
    rounds: int = Field(ge=1, le=10_000)
    min_clients: int = Field(ge=1)
    max_clients: int = Field(ge=1)
    model: Model = Model()
    training: Training = Training()
    privacy: Privacy = Privacy()
    aggregation: Aggregation
    data: Data = Data()
    specialties: dict[Name, Specialty] = Field(default_factory=dict)  # new ones, or other prompts
    sites: dict[SiteName, Site] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    deployment: Deployment = Deployment()

    @field_validator("privacy", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `off` as false; `privacy: off` must mean what it says.
        return {"mode": "off"} if value is False or value == "off" else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        problems = []
        if self.min_clients > self.max_clients:
            problems.append(
                f"min_clients ({self.min_clients}) is greater than max_clients ({self.max_clients}); lower it"
            )
        if not self.min_clients <= len(self.sites) <= self.max_clients:
            problems.append(
                f"sites: {len(self.sites)} sites, but min_clients is {self.min_clients} and max_clients is "
                f"{self.max_clients}; add or remove sites, or change the limits"
            )
        if self.aggregation.quorum > self.min_clients:
            problems.append(
                f"aggregation.quorum ({self.aggregation.quorum}) is more than min_clients ({self.min_clients}): a job "
                "could start with sites whose rounds never count; lower it"
            )
        if self.privacy.mode == "off" and self.aggregation.norm_bound is None:
            problems.append(
                "aggregation.norm_bound: missing; with privacy off no mechanism bounds an update, so the bound is "
                "yours to give"
            )
        for name, site in self.sites.items():
            if site.manifest and site.index:
                problems.append(f"sites.{name}: give either manifest or index, not both")
            if site.nominal_patients is None and not self.data.synthesize and self.privacy.mode == "dp":
                problems.append(
                    f"sites.{name}.nominal_patients: missing; under differential privacy the denominator is this "
                    "public number, never the true count"
                )
            data_class = "synthetic" if self.data.synthesize else site.data_class
            if self.privacy.mode == "off" and data_class == "hospital":
                problems.append(
                    f"privacy: off is for public or synthetic data, but sites.{name}.data_class is 'hospital'; "
                    "switch privacy on"
                )
            at_hand = site.manifest or site.index  # else the data, and its ledger, are at the hospital
            if self.privacy.mode == "dp" and data_class == "hospital" and at_hand and site.ledger is None:
                problems.append(
                    f"sites.{name}.ledger: missing; a hospital's budget must outlive this run: give "
                    "a path outside of it (or mark the data, truthfully, as data_class: public or synthetic)"
                )
        if self.data.synthesize and any(s.manifest or s.index for s in self.sites.values()):
            problems.append("data.synthesize makes the data of all sites; remove the sites' manifest and index")
        if self.model.basis and self.training.basis == "none":
            problems.append("model.basis: has no effect while training.basis is 'none'; set that, or remove it")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def nominal_patients(self, site: str) -> int:
        """N₀ of ``site``: as configured, or what ``data.synthesize`` plans per specialty."""
        configured = self.sites[site].nominal_patients
        if configured is not None or self.data.synthesize is None:
            return configured or 1
        return self.data.synthesize.patients_per_specialty * len(self.sites[site].specialties)
