"""The bundle as a model repository of NVIDIA Triton Inference Server, with a fast lane for emergencies.

::

    BUNDLE/  triton/clinifed_<precision>/config.pbtxt             for the ONNX Runtime backend, on GPU or CPU
                                        /labels_<specialty>.txt   so that a client can ask for names of classes
                                        /1/model.onnx             the same file as onnx/<precision>.onnx
             triton/clinifed_<precision>_tensorrt/…/1/model.plan  the same file as engines/tensorrt/<precision>.engine
             device/clinifed_<precision>_tensorrt/…               the same without a model: its engine is built on the
                                                                  machine that serves it

Engines of TensorRT-RTX are not for Triton: its backend loads those of the datacenter's TensorRT only.

Texts are written through Triton's own protobuf messages, and read back and checked. What the fields mean:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import onnx
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from clinifed.errors import ExportError
from clinifed.evaluation.parity import EMBEDDING, LOGITS, PIXELS, ZERO_SHOT
from clinifed.export.onnx import MAX_BATCH
from clinifed.export.presets import Profile, load_presets
from clinifed.files import write_atomic

__all__ = [
    "DEFAULT_PRIORITY",
    "DEVICE",
    "PRIORITIES",
    "REPOSITORY",
    "Backend",
    "Interface",
    "Priority",
    "check_config",
    "model_config",
    "model_name",
    "write_repository",
]

REPOSITORY = "triton"  # folders of a bundle
DEVICE = "device"
CONFIG = "config.pbtxt"
VERSION = "1"

Backend = Literal["onnxruntime", "tensorrt"]

# Triton's platform and the name it expects of the model's file.
_PLATFORMS: dict[Backend, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime_onnx", "model.onnx"),
    "tensorrt": ("tensorrt_plan", "model.plan"),
}
# A request waits this long for others to share its batch: well under what a person notices.
_QUEUE_DELAY_US = 2000


@dataclass(frozen=True)
class Priority:
    """One lane of the queue. A waiting request of a lower level always goes first; a running batch is never stopped."""

    level: int  # what a request says as its `priority`, 1 first
    timeout_us: int = 0  # a request that waited longer is refused; 0: it waits as long as it takes

    @property
    def policy(self) -> Any:
        """As Triton's ``ModelQueuePolicy``."""
        action = model_config_pb2.ModelQueuePolicy
        if not self.timeout_us:
            return action(timeout_action=action.DELAY)
        # A request may ask for less time than this, not for more.
        return action(
            timeout_action=action.REJECT, default_timeout_microseconds=self.timeout_us, allow_timeout_override=True
        )


# A worklist may come again; an emergency is never refused for having waited.
PRIORITIES: dict[str, Priority] = {
    "emergency": Priority(1),
    "urgent": Priority(2),
    "routine": Priority(3, timeout_us=2_000_000),
}
DEFAULT_PRIORITY = "routine"


@dataclass(frozen=True)
class Interface:
    """What a graph takes and gives; the same at every precision."""

    size_px: int  # S, of the input (B, 3, S, S)
    outputs: Mapping[str, int]  # name → width of (B, width), float32
    labels: Mapping[str, Sequence[str]]  # specialty → its labels, in the order of the logits

    @classmethod
    def of(cls, graph: onnx.ModelProto, labels: Mapping[str, Sequence[str]]) -> Self:
        """Read ``graph``, with the labels of each of its specialties.

        Raises:
            ExportError: an input or output is not what an exported graph has, or labels do not fit it.
        """
        problems = []
        inputs = {value.name: _dims(value) for value in graph.graph.input}
        outputs = {value.name: _dims(value) for value in graph.graph.output}
        size = inputs.get(PIXELS, (0, 0, 0, 0))[-1]
        if list(inputs.values()) != [(0, 3, size, size)] or not size:
            problems.append(f"graph: inputs are {inputs}; needs one, {PIXELS!r} of (batch, 3, S, S)")
        for name, dims in outputs.items():
            if len(dims) != 2 or dims[0] or not dims[1]:
                problems.append(f"graph: output {name!r} is {dims}; needs (batch, a fixed width)")
                continue
            specialty = _specialty(name)
            if specialty is None and name != EMBEDDING:
                problems.append(f"graph: output {name!r} is none of {EMBEDDING}, {LOGITS}…, {ZERO_SHOT}…")
            elif specialty is not None and len(labels.get(specialty, ())) != dims[1]:
                problems.append(f"graph: output {name!r} is {dims[1]} wide; labels are {labels.get(specialty)}")
        for specialty, names in labels.items():
            # Triton's file of labels has one a line.
            problems += [
                f"labels.{specialty}: {name!r} is not one line of text"
                for name in names
                if not name.strip() or len(name.splitlines()) != 1
            ]
        if problems:
            raise ExportError(*problems)
        known = {name for name in map(_specialty, outputs) if name is not None}
        return cls(size, {n: d[1] for n, d in outputs.items()}, {n: labels[n] for n in labels if n in known})


def _dims(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Sizes; 0 where a dimension is free."""
    return tuple(int(d.dim_value) for d in value.type.tensor_type.shape.dim)


def _specialty(output: str) -> str | None:
    """Whose logits ``output`` holds; None for the embedding."""
    for prefix in (LOGITS, ZERO_SHOT):
        if output.startswith(prefix):
            return output.removeprefix(prefix)
    return None


def _labels_file(specialty: str) -> str:
    return f"labels_{specialty}.txt"


def model_name(precision: str, backend: Backend) -> str:
    """The model's name in Triton."""
    return f"clinifed_{precision}" + ("_tensorrt" if backend == "tensorrt" else "")


def model_config(precision: str, backend: Backend, interface: Interface, profile: Profile) -> str:
    """The text of ``config.pbtxt``: float32 tensors, dynamic batching, three priorities, warm-up.

    Args:
        precision: a key of ``precisions`` in ``presets.yaml``.
        backend: who runs the model.
        interface: of its graph.
        profile: a request and a batch hold at most ``max`` images; batches of ``opt`` are preferred.

    Raises:
        ExportError: the configuration is not one that Triton takes, or does not fit the graph.
    """
    pb = model_config_pb2
    platform, file = _PLATFORMS[backend]
    pixels = [3, interface.size_px, interface.size_px]
    kinds = pb.ModelInstanceGroup
    on_gpu = backend == "tensorrt" or _needs_gpu(precision)
    config = pb.ModelConfig(
        name=model_name(precision, backend),
        platform=platform,
        backend=backend,
        default_model_filename=file,
        max_batch_size=profile.max,
        version_policy=pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=1)),
        input=[pb.ModelInput(name=PIXELS, data_type=pb.TYPE_FP32, dims=pixels)],
        dynamic_batching=pb.ModelDynamicBatching(
            preferred_batch_size=sorted({profile.opt, profile.max}),
            max_queue_delay_microseconds=_QUEUE_DELAY_US,
            priority_levels=len(PRIORITIES),
            default_priority_level=PRIORITIES[DEFAULT_PRIORITY].level,
            priority_queue_policy={priority.level: priority.policy for priority in PRIORITIES.values()},
        ),
        # AUTO is the GPU where there is one.
        instance_group=[kinds(count=1, kind=kinds.KIND_GPU if on_gpu else kinds.KIND_AUTO)],
    )
    for name, width in interface.outputs.items():
        specialty = _specialty(name)
        labels = "" if specialty is None else _labels_file(specialty)
        config.output.append(pb.ModelOutput(name=name, data_type=pb.TYPE_FP32, dims=[width], label_filename=labels))
    for size in sorted({profile.min, profile.opt}):
        image = pb.ModelWarmup.Input(data_type=pb.TYPE_FP32, dims=pixels, zero_data=True)
        config.model_warmup.append(pb.ModelWarmup(name=f"batch_{size}", batch_size=size, inputs={PIXELS: image}))
    for specialty in interface.labels:
        # For the client: Triton itself reads the priority of each request.
        priority = PRIORITIES.get(specialty, PRIORITIES[DEFAULT_PRIORITY])
        config.parameters[f"priority_{specialty}"].string_value = str(priority.level)
    text: str = text_format.MessageToString(config)
    check_config(text, interface)
    return text


def _needs_gpu(precision: str) -> bool:
    """ONNX Runtime has no BF16 kernels on a CPU."""
    presets = load_presets().precisions
    if precision not in presets:
        raise ExportError(f"precision {precision!r} is not known; use {', '.join(presets)}")
    half = presets[precision].half
    return half is not None and half.dtype == "bfloat16"


def check_config(text: str, interface: Interface) -> None:
    """Refuse a ``config.pbtxt`` that Triton would, as far as can be told without it, or that does not fit the graph.

    Raises:
        ExportError: with every problem.
    """
    pb = model_config_pb2
    try:
        config = text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise ExportError(f"{CONFIG}: not a model configuration: {error}") from error
    where, problems = f"{CONFIG} of {config.name or 'a model without a name'}", []
    batching, most = config.dynamic_batching, config.max_batch_size
    if not 1 <= most <= MAX_BATCH:
        problems.append(f"{where}: max_batch_size is {most}; the graph takes 1 to {MAX_BATCH}")
    sizes = [*batching.preferred_batch_size, *(warmup.batch_size for warmup in config.model_warmup)]
    if not all(1 <= size <= most for size in sizes):
        problems.append(f"{where}: preferred and warm-up batches are {sizes}; max_batch_size is {most}")
    levels, default = batching.priority_levels, batching.default_priority_level
    if not 1 <= default <= levels:
        problems.append(f"{where}: default_priority_level is {default}; must be in [1, {levels}]")
    policies = sorted(batching.priority_queue_policy)
    if policies and not 1 <= policies[0] <= policies[-1] <= levels:
        problems.append(f"{where}: priority_queue_policy has levels {policies}; must be in [1, {levels}]")
    pixels = (PIXELS, pb.TYPE_FP32, (3, interface.size_px, interface.size_px))
    if (found := [(v.name, v.data_type, tuple(v.dims)) for v in config.input]) != [pixels]:
        problems.append(f"{where}: input is {found}; the graph has {pixels}")
    wanted = [(name, pb.TYPE_FP32, (width,)) for name, width in interface.outputs.items()]
    if (found := [(v.name, v.data_type, tuple(v.dims)) for v in config.output]) != wanted:
        problems.append(f"{where}: output is {found}; the graph has {wanted}")
    if not config.platform and not config.backend:
        problems.append(f"{where}: names neither platform nor backend")
    if problems:
        raise ExportError(*problems)


def write_repository(bundle: Path, interface: Interface, profile: Profile, on_device: Iterable[str] = ()) -> list[Path]:
    """Write ``triton/`` and ``device/`` beside the models of ``bundle``; returns the folders of the models.

    Every ``onnx/<precision>.onnx`` and ``engines/tensorrt/<precision>.engine`` that is there is served.

    Args:
        bundle: the directory, before its manifest is written.
        interface: of the graphs.
        profile: of the engines.
        on_device: precisions whose ``tensorrt`` engine is built where it is served.

    Raises:
        ExportError: there is no model, or a configuration is wrong; nothing of it was written.
    """
    sources: list[tuple[str, Backend, Path | None]] = []
    sources += [(path.stem, "onnxruntime", path) for path in sorted((bundle / "onnx").glob("*.onnx"))]
    sources += [(path.stem, "tensorrt", path) for path in sorted((bundle / "engines" / "tensorrt").glob("*.engine"))]
    built = {precision for precision, backend, _ in sources if backend == "tensorrt"}
    sources += [(precision, "tensorrt", None) for precision in on_device if precision not in built]
    problems = [f"{bundle / folder} exists" for folder in (REPOSITORY, DEVICE) if (bundle / folder).exists()]
    if not sources:
        problems.append(f"{bundle}: no onnx/<precision>.onnx and no engines/tensorrt/<precision>.engine to serve")
    if problems:
        raise ExportError(*problems)
    texts = [model_config(precision, backend, interface, profile) for precision, backend, _ in sources]
    folders = []
    for (precision, backend, model), text in zip(sources, texts, strict=True):
        folder = bundle / (DEVICE if model is None else REPOSITORY) / model_name(precision, backend)
        folder.mkdir(parents=True)
        write_atomic(folder / CONFIG, text.encode())
        for specialty, labels in interface.labels.items():
            write_atomic(folder / _labels_file(specialty), "".join(f"{label}\n" for label in labels).encode())
        if model is not None:
            (folder / VERSION).mkdir()
            _link(model, folder / VERSION / _PLATFORMS[backend][1])
        folders.append(folder)
    return folders


def _link(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
