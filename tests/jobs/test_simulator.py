"""FLARE's simulator in a process tree of its own: where it keeps what is temporary."""

import multiprocessing
import tempfile

import pytest

from clinifed.jobs.simulator import _scratch


@pytest.mark.parametrize("deep", [0, 40, 120])
def test_a_socket_fits_into_the_scratch_folder_however_deep_the_run_lies(tmp_path, monkeypatch, deep):
    workspace = tmp_path / ("x" * deep or "run") / "flare"
    workspace.mkdir(parents=True)
    scratch = _scratch(workspace)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    with multiprocessing.get_context("spawn").Manager() as manager:  # what FLARE's simulator does
        assert manager.dict() is not None
    if deep == 0 and len(str(workspace)) < 70:
        assert scratch.is_relative_to(workspace)
    assert scratch.stat().st_mode & 0o777 in (0o700, 0o755)
