"""Importing: the package is light, and each heavy library is loaded where it belongs only."""

import subprocess
import sys

import pytest


def loaded(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import clinifed",
        "import clinifed.cli",
        "import clinifed.cli; clinifed.cli.build_parser()",
        "import clinifed.load",
    ],
)
def test_the_front_door_loads_neither_torch_nor_flare(statement: str) -> None:
    assert not loaded(statement) & {"torch", "nvflare", "open_clip", "monai", "pydicom"}


def test_the_server_side_needs_no_model() -> None:
    assert not loaded("import clinifed.aggregators.flare") & {"torch", "open_clip", "opacus", "monai", "transformers"}


@pytest.mark.parametrize("module", ["privacy.engine", "models.adapters", "evaluation.metrics", "executors.trainer"])
def test_the_core_does_not_load_flare(module: str) -> None:
    assert "nvflare" not in loaded(f"import clinifed.{module}")
