"""The documentation's examples are what the code reads, and every command in it exists."""

import json
import re
from pathlib import Path

import pytest
import yaml

from clinifed.cli import build_parser
from clinifed.executors.filters import privacy_scope
from clinifed.policy import POLICY_FOLDER, find_policy
from clinifed.privacy.lint import lint

ROOT = Path(__file__).parents[1]
PRIVACY = (ROOT / "docs" / "privacy.md").read_text()


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", PRIVACY, re.S)
    assert found, kind
    return found[1]


def test_the_example_policy_and_scope_make_a_site_folder_that_the_linter_passes(tmp_path: Path) -> None:
    folder = tmp_path / "local" / POLICY_FOLDER
    folder.mkdir(parents=True)
    text = re.sub(r"[0-9a-f]{4}…", "ab" * 32, block("yaml"))
    (folder / "alder.yaml").write_text(text)
    policy = find_policy(tmp_path / "local", "alder")
    assert set(yaml.safe_load(text)) <= set(type(policy).model_fields)
    assert json.loads(block("json")) == privacy_scope()
    (tmp_path / "local" / "privacy.json").write_text(block("json"))
    (tmp_path / "local" / "resources.json").write_text(
        json.dumps({"class_allow_list": ["clinifed.executors.flare.SiteExecutor"], "allow_log_streaming": False})
    )
    assert lint(tmp_path / "local") == []


@pytest.mark.parametrize("page", ["README.md", "docs/privacy.md", "docs/architecture.md", "SECURITY.md"])
def test_every_verb_that_is_named_exists(page: str) -> None:
    said = re.findall(r"clinifed ((?:privacy ledger|privacy|data) )?([a-z]+)", (ROOT / page).read_text())
    helps = build_parser()
    for group, verb in {(g.strip(), v) for g, v in said if g or v in ("demo", "simulate", "export", "evaluate", "job")}:
        if (group, verb) == ("privacy", "ledger"):
            continue
        with pytest.raises(SystemExit) as ended:
            helps.parse_args([*group.split(), verb, "--help"])
        assert ended.value.code == 0, f"{group} {verb}"
