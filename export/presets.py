"""The presets of ``presets.yaml``, checked: precisions, parity thresholds, and how engines are built."""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clinifed.evaluation.parity import Parity
from clinifed.load import read_yaml, validate

__all__ = [
    "DeployProfile",
    "Engine",
    "HalfPrecision",
    "Precision",
    "Presets",
    "Profile",
    "Quantization",
    "Thresholds",
    "load_presets",
]

_FILE = Path(__file__).with_name("presets.yaml")


class _Preset(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Profile(_Preset):
    """TensorRT's optimisation profile: images per request, and the number it is tuned for."""

    min: int = Field(ge=1)
    opt: int
    max: int = Field(le=64)  # clinifed.export.onnx.MAX_BATCH

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"needs min ≤ opt ≤ max, got {self.min}, {self.opt}, {self.max}")
        return self


class Engine(_Preset):
    """How engines are built."""

    profile: Profile
    compute_capabilities: tuple[str, ...] = ()  # TensorRT-RTX names, such as SM89; `tensorrt` takes the GPU it finds
    # `ampere-plus`: one engine for every GPU since Ampere, slower on each; `none`: for the building GPU's kind alone.
    hardware_compatibility: Literal["none", "ampere-plus"] = "none"
    version_compatible: bool = False  # may later TensorRT versions run it?
    workspace_mib: int | None = Field(None, ge=64)  # most scratch memory of the GPU; None: all there is


class DeployProfile(_Preset):
    """A kind of machine that engines are for."""

    targets: tuple[str, ...] = Field(min_length=1)  # used when --target is not given
    engine: Engine
    on_device: str | None = None  # engines can be built on this device only; the bundle holds what it needs


class HalfPrecision(_Preset):
    """What of an FP32 graph becomes 16 bits wide: everything but this."""

    dtype: Literal["float16", "bfloat16"] = "float16"
    keep_fp32_ops: tuple[str, ...]  # operators, wherever they stand
    keep_fp32_norm: tuple[str, ...]  # from these, which start an L2 norm, to what is read of it
    # A node stays FP32 if on the calibration images it reads or makes a value above this share of the type's largest.
    headroom: Annotated[float, Field(gt=0, le=1)] = 0.25


class Quantization(_Preset):
    """What becomes INT8: nodes of these operators that multiply by a weight, before the embedding."""

    op_types: tuple[str, ...] = Field(min_length=1)
    per_channel: bool  # one scale per output channel of a weight; activations always have one per tensor
    # SmoothQuant's alpha (Xiao et al. 2023, arXiv 2211.10438, eq. 4): how much of an outlier channel's range moves
    # from LayerNorm's output into the weights behind it. 0 folds nothing.
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Where the gate is missed, the most sensitive groups are left out one by one, up to this share of all nodes.
    most_left_out: Annotated[float, Field(ge=0, le=1)] = 0.0


class Thresholds(_Preset):
    """The parity with FP32 torch below which a precision is not packed."""

    cosine_mean: Annotated[float, Field(ge=-1, le=1)]
    top1_agreement: Annotated[float, Field(ge=0, le=1)]
    embedding_max_abs: float | None = Field(None, gt=0)  # an embedding has length 1
    logits_max_rel: float | None = Field(None, gt=0)  # of the largest logit

    def failures(self, parity: Parity) -> list[str]:
        """Every threshold that ``parity`` misses, in words; a figure that is not a number misses."""
        found = [
            f"{name} {getattr(parity, name):.6f} is below {limit}"
            for name, limit in (("cosine_mean", self.cosine_mean), ("top1_agreement", self.top1_agreement))
            if not getattr(parity, name) >= limit
        ]
        found += [
            f"{name} {getattr(parity, name):.3g} is above {limit:g}"
            for name, limit in (("embedding_max_abs", self.embedding_max_abs), ("logits_max_rel", self.logits_max_rel))
            if limit is not None and not getattr(parity, name) <= limit
        ]
        return found


class Precision(_Preset):
    """One precision: FP32 when it neither quantises nor halves."""

    quantize: Quantization | None = None
    half: HalfPrecision | None = None
    compute_capabilities: tuple[str, ...] | None = None  # of the profile's, those a builder supports at this precision
    parity: Thresholds


class Presets(_Preset):
    """The whole file."""

    calibration_images: int = Field(ge=1)
    parity_images: int = Field(ge=1)
    selection_images: int = Field(ge=1)
    profiles: dict[str, DeployProfile]
    precisions: dict[str, Precision]

    def engine_for(self, profile: str, precision: str) -> Engine:
        """How an engine of ``precision`` is built for ``profile``, keys of ``precisions`` and ``profiles``."""
        engine, fewer = self.profiles[profile].engine, self.precisions[precision].compute_capabilities
        if fewer is None:
            return engine
        left = tuple(name for name in engine.compute_capabilities if name in fewer)
        return engine.model_copy(update={"compute_capabilities": left})


@cache
def load_presets() -> Presets:
    """The presets that ship with clinifed.

    Raises:
        ConfigError: the file was edited and an entry is wrong; every wrong key is named.
    """
    return validate(Presets, read_yaml(_FILE), _FILE.name)
