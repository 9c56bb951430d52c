"""The command line: every verb explains itself, speaks JSON when asked, and ends with its error's exit code."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from clinifed import errors
from clinifed.cli import build_parser, main
from clinifed.jobs.simulate import simulate
from clinifed.load import load_federation

ROOT = Path(__file__).parents[1]


def verbs(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                nested = list(verbs(child, (*path, name)))
                yield from nested or [(*path, name)]


VERBS = sorted(verbs(build_parser()))


def test_the_verbs_are_those_the_readme_shows() -> None:
    shown = set(
        re.findall(
            r"clinifed (demo|simulate|export|evaluate|job|basis|poc|provision|preflight|submit|status"
            r"|finetune|personalise|verify|inspect|bench|keys \w+|data \w+|models \w+|privacy +\w+)\b",
            (ROOT / "README.md").read_text(),
        )
    )
    assert {tuple(v.split()[:2]) for v in shown} >= {v[:2] for v in VERBS if v[0] == "privacy"}
    assert {v.split()[0] for v in shown} == {v[0] for v in VERBS}


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_and_json(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_synthesize_and_index_make_a_manifest_of_patients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hospitals"
    asked = ["data", "synthesize", "--out", str(out), "--site", "alder=radiology", "--json"]
    main([*asked, "--patients-per-specialty", "4", "--public-patients-per-specialty", "4", "--max-images", "1"])
    assert json.loads(capsys.readouterr().out)["sites"] == {"alder": ["radiology"]}
    folder, manifest = out / "alder", out / "alder" / "manifest.csv"
    index = ["data", "index", str(folder), "--out", str(manifest), "--specialties", "radiology", "--json"]
    main([*index, "--labels", str(folder / "labels.csv"), "--data-class", "synthetic", "--holdout", "0"])
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == said["patients"] >= 3
    assert said["skipped"] == {}
    assert [p.name for p in (out / "public").iterdir()]


def test_an_error_ends_with_its_code_and_names_every_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nroundz: 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(path), "--out", str(tmp_path / "run")])
    assert ended.value.code == errors.ConfigError.exit_code
    assert capsys.readouterr().err.count("clinifed: ") >= 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("threads", [0, 5])
def test_more_threads_than_sites_are_refused_before_anything_is_made(threads: int, tmp_path: Path) -> None:
    demo = load_federation(ROOT / "simulator_configs" / "demo.yaml")  # four sites
    with pytest.raises(errors.ConfigError, match=f"--threads {threads}: .* 1 to 4"):
        simulate(demo, tmp_path / "run", print, threads)
    assert not (tmp_path / "run").exists()


def test_a_report_is_of_public_patients_or_of_a_hospital_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "checkpoint", "--site", "policy.yaml", "--test", "manifest.csv"])
    assert ended.value.code == 2
    assert "either --test MANIFEST" in capsys.readouterr().err


def test_every_error_has_an_exit_code_of_its_family() -> None:
    tree = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.ClinifedError)]
    assert all(1 <= e.exit_code < 126 for e in tree)
    drawn = errors.__doc__ or ""
    assert [e.__name__ for e in tree if e.__name__ not in drawn] == []
