"""An engine run on a GPU, for its own parity with torch. Where there is none, a reason of a few words.

Only a GPU could show that :func:`run_engine` is right, and the tests do without one: they check its calls by name,
number of arguments and kind of object against the bindings of TensorRT 10.16, 11.4 and TensorRT-RTX, and no further.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from clinifed.errors import ExportError
from clinifed.evaluation.parity import PIXELS, Outputs
from clinifed.export.builder import Toolkit
from clinifed.export.tensorrt import BuiltEngine, check_target, toolkit

if TYPE_CHECKING:
    import tensorrt as trt  # for annotations alone

__all__ = ["run_engine", "why_not"]


def why_not(target: str, compute_capabilities: tuple[str, ...] = ()) -> str | None:
    """Why engines of ``target`` cannot be run here; None if they can.

    Args:
        target: a key of :data:`clinifed.export.tensorrt.TARGETS`.
        compute_capabilities: those that the engine names, if it names any.
    """
    try:
        check_target(target)
    except ExportError as error:
        return f"engine never executed: {error.problems[0]}"
    if not torch.cuda.is_available():
        return "engine never executed: torch finds no GPU here"
    own = "SM{}{}".format(*torch.cuda.get_device_capability())
    if compute_capabilities and own not in compute_capabilities:
        return f"engine never executed: it is for {', '.join(compute_capabilities)}, and the GPU here is {own}"
    return None


@torch.no_grad()
def run_engine(engine: BuiltEngine, pixels: NDArray[np.float32]) -> Outputs:
    """Run an engine that was just built here on the first GPU.

    Args:
        engine: executable code: never one that somebody else made.
        pixels: (N, 3, S, S) float32, normalised; N ≥ 1, in batches of the engine's profile.

    Raises:
        ExportError: engines cannot be run here (:func:`why_not`), or the engine does not load or fails; with the
            runtime's own words.
    """
    if reason := why_not(engine.target, engine.compute_capabilities):
        raise ExportError(reason)
    kit = toolkit(engine.target)
    kit.lines.clear()
    runtime = kit.trt.Runtime(kit.logger)
    if engine.lean_runtime == "inside":
        runtime.engine_host_code_allowed = True  # its own runtime is code for the processor
    loaded = runtime.deserialize_cuda_engine(engine.data)
    if loaded is None:
        raise ExportError(str(kit.fail("the engine does not load")))
    context = loaded.create_execution_context()
    if context is None:
        raise ExportError(str(kit.fail("the engine cannot be prepared for execution, maybe for lack of memory")))
    names = _outputs(kit, loaded)
    fewest, most = engine.options.profile.min, engine.options.profile.max
    stream = torch.cuda.Stream()
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    with torch.cuda.stream(stream):
        for start in range(0, len(pixels), most):
            batch = pixels[start : start + most]
            # The last batch may be below the profile: filled up with its last image, which is cut off again.
            filled = np.concatenate([batch, np.repeat(batch[-1:], max(0, fewest - len(batch)), axis=0)])
            found = _run(kit, context, names, torch.from_numpy(filled).cuda(), stream)
            for name, value in found.items():
                parts[name].append(value[: len(batch)].cpu().numpy())
    return Outputs.of({name: np.concatenate(values) for name, values in parts.items()})


def _outputs(kit: Toolkit, engine: trt.ICudaEngine) -> list[str]:
    """The outputs' names; everything must be float32, as the graphs are on the outside."""
    trt = kit.trt
    names = []
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if engine.get_tensor_dtype(name) != trt.DataType.FLOAT:
            raise ExportError(f"the engine's {name!r} is {engine.get_tensor_dtype(name)}; it must be float32")
        if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
            names.append(name)
    return names


def _run(
    kit: Toolkit,
    context: trt.IExecutionContext,
    names: list[str],
    pixels: torch.Tensor,
    stream: torch.cuda.Stream,
) -> dict[str, torch.Tensor]:
    """One batch, (B, 3, S, S) on the GPU; returns the outputs there, (B, …), when they are ready."""
    pixels = pixels.contiguous()
    _must(kit, context.set_input_shape(PIXELS, tuple(pixels.shape)), f"{tuple(pixels.shape)} does not fit the engine")
    _must(kit, context.set_tensor_address(PIXELS, pixels.data_ptr()), f"{PIXELS!r} gets no memory")
    found = {}
    for name in names:
        shape = tuple(context.get_tensor_shape(name))
        _must(kit, min(shape) >= 0, f"the shape of {name!r} is not known")
        found[name] = torch.empty(shape, dtype=torch.float32, device=pixels.device)
        _must(kit, context.set_tensor_address(name, found[name].data_ptr()), f"{name!r} gets no memory")
    _must(kit, context.execute_async_v3(stream.cuda_stream), f"the engine fails on a batch of {len(pixels)}")
    stream.synchronize()
    return found


def _must(kit: Toolkit, done: bool, what: str) -> None:
    if not done:
        raise ExportError(str(kit.fail(what)))
