"""Running an engine needs a GPU; without one, what is tested is that this is said. The calls: see test_bindings."""

import sys

import numpy as np
import pytest
import torch

from clinifed.errors import ExportError
from clinifed.export.execute import run_engine, why_not
from clinifed.export.presets import load_presets
from clinifed.export.tensorrt import BuiltEngine

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def engine() -> BuiltEngine:
    options = load_presets().engine_for("workstation", "fp16")
    return BuiltEngine(b"vtrt", "tensorrt-rtx", "tensorrt_rtx", options.compute_capabilities, options, None, None, ())


@without_gpu
def test_without_a_gpu_the_reason_says_so() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert why_not("tensorrt-rtx") == "engine never executed: torch finds no GPU here"


def test_without_the_package_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    reason = why_not("tensorrt")
    assert reason is not None
    assert reason.startswith("engine never executed: target 'tensorrt': the package tensorrt is not installed")


@without_gpu
def test_an_engine_that_cannot_be_run_here_is_refused_before_it_is_loaded(engine: BuiltEngine) -> None:
    with pytest.raises(ExportError, match="engine never executed"):
        run_engine(engine, np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_engine_that_is_none_is_refused_with_the_runtimes_words(engine: BuiltEngine) -> None:
    with pytest.raises(ExportError):
        run_engine(engine, np.zeros((1, 3, 8, 8), np.float32))
