"""The verbs of real federations: spelled as people spell them, and wrong arguments are said before anything is done."""

import json
import re
from pathlib import Path

import pytest

from clinifed import cli_federation
from clinifed.cli import build_parser, main
from clinifed.cli_federation import spelled_out
from clinifed.errors import ConfigError

ROOT = Path(__file__).parents[1]
YAML = "simulator_configs/smoke.yaml"
VERBS = [("poc", "run"), ("poc", "up"), ("poc", "submit"), ("poc", "status"), ("poc", "down")]
VERBS += [("provision",), ("preflight",), ("submit",), ("status",)]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (["poc", YAML], ["poc", "run", YAML]),
        (["poc", YAML, "--out", "x", "--json"], ["poc", "run", YAML, "--out", "x", "--json"]),
        *((["poc", verb, "x"], ["poc", verb, "x"]) for verb in ("run", "up", "submit", "status", "down")),
        (["poc"], ["poc"]),
        (["poc", "--help"], ["poc", "--help"]),
        (["submit", "poc"], ["submit", "poc"]),
        ([], []),
    ],
)
def test_poc_config_is_short_for_poc_run_config(said, meant):
    assert spelled_out(said) == meant
    assert spelled_out(tuple(said)) == meant


def test_both_spellings_run_the_same(tmp_path):
    asked = [
        build_parser().parse_args(spelled_out(["poc", *word, YAML, "--out", str(tmp_path)])) for word in ([], ["run"])
    ]
    assert vars(asked[0]) == vars(asked[1])
    assert asked[0].run is cli_federation._poc


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: clinifed {' '.join(verb)}" in said
    assert "--json" in said


def test_the_readme_names_every_verb():
    readme = (ROOT / "README.md").read_text()
    for verb in {verb[0] for verb in VERBS}:
        assert re.search(rf"clinifed {verb}\b", readme), verb


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == ConfigError.exit_code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


GIVEN = {"CONFIG": [YAML], "--admin-kit": ["--admin-kit", "kit"], "--out": ["--out", "run"]}


@pytest.mark.parametrize("missing", [(), *((name,) for name in GIVEN), ("CONFIG", "--out"), tuple(GIVEN)])
def test_submit_names_all_that_is_missing(capsys, tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    words = [word for name, given in GIVEN.items() if name not in missing for word in given]
    said = refused(capsys, "submit", *words)
    if missing:
        assert said == f"clinifed: submit: {', '.join(missing)} missing; or --resume RUN\n"
    else:
        assert YAML in said, "then the configuration is read, which is not there"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("beside", GIVEN.values(), ids=GIVEN)
def test_a_run_that_is_gone_on_with_takes_no_other_settings(capsys, tmp_path, beside):
    said = refused(capsys, "submit", "--resume", str(tmp_path), *beside)
    assert said == f"clinifed: --resume {tmp_path}: the run's configuration, kit and directory stand there\n"


@pytest.mark.parametrize(
    "words", [["submit", "--resume"], ["status"], ["poc", "submit"], ["poc", "status"], ["poc", "down"]]
)
def test_a_directory_without_a_run_is_refused(capsys, tmp_path, words):
    said = refused(capsys, *words, str(tmp_path))
    assert str(tmp_path) in said
    assert list(tmp_path.iterdir()) == []


def test_a_kit_that_is_none_is_refused(capsys, tmp_path):
    assert str(tmp_path) in refused(capsys, "preflight", str(tmp_path), "--offline")


@pytest.mark.parametrize("words", [["poc"], ["poc", "up"], ["provision"]])
def test_a_wrong_setting_is_told_before_anything_is_made(capsys, tmp_path, words):
    out = tmp_path / "out"
    said = refused(capsys, *words, str(ROOT / YAML), "--set", "roundz=3", "--out", str(out))
    assert "did you mean 'rounds'?" in said
    assert not out.exists()


def test_kits_are_told_by_name_in_json(capsys, tmp_path):
    main(["provision", str(ROOT / YAML), "--out", str(tmp_path / "kits"), "--json"])
    kits = json.loads(capsys.readouterr().out)
    assert {"server"} < set(kits)
    assert all(Path(path).is_dir() for path in kits.values())
