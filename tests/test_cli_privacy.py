"""``clinifed privacy``: what a data scientist and a data protection officer type, and what they get."""

import json
from pathlib import Path

import pytest
import yaml

from clinifed.cli import main
from clinifed.errors import LedgerError, PrivacyError
from clinifed.policy import Budget
from clinifed.privacy.accountant import budget_units
from clinifed.privacy.ledger import Ledger
from clinifed.signing import public_key, read_signing_key

CONFIGS = Path(__file__).parents[1] / "simulator_configs"


@pytest.fixture
def typed(capsys):
    """Run a command line; returns (exit code, what it printed, what it complained of)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main(["privacy", *map(str, arguments)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def path(tmp_path) -> Path:
    """A ledger with one job of a tenth of the budget."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, "alder", Budget(epsilon=1.0, delta=1e-5))
    ledger.create()
    ledger.reserve("job", budget_units(1.0, 1e-5) // 10, "c" * 64)
    ledger.charge("job", 0, budget_units(1.0, 1e-5) // 10, "n")
    ledger.finish("job")
    return path


@pytest.mark.parametrize(("epsilon", "sigma"), [(1, 26.38), (3, 9.83), (8, 4.24)])
def test_a_plan_of_numbers_gives_the_published_sigma(typed, epsilon, sigma):
    code, out, _ = typed("plan", "--epsilon", epsilon, "--delta", "1e-5", "--rounds", 50, "--json")
    plan = json.loads(out)
    assert (code, plan["releases"]) == (0, 50)
    assert plan["noise_multiplier"] == pytest.approx(sigma, abs=0.005)
    assert epsilon * (1 - 1e-6) < plan["epsilon"] <= epsilon


def test_a_plan_counts_local_steps_and_reserve_rounds(typed):
    asked = ("plan", "--epsilon", 1, "--delta", "1e-5", "--rounds", 8, "--local-steps", 3, "--reserve-rounds", 2)
    assert json.loads(typed(*asked, "--json")[1])["releases"] == 30
    assert "in reserve" in typed(*asked)[1]


def test_a_plan_of_a_configuration_speaks_of_every_site_and_specialty(typed):
    code, out, _ = typed("plan", CONFIGS / "smoke.yaml", "--json")
    plan = json.loads(out)
    sites = yaml.safe_load((CONFIGS / "smoke.yaml").read_text())["sites"]
    expected = {(name, specialty) for name, site in sites.items() for specialty in site["specialties"]}
    assert code == 0
    assert {(row["site"], row["specialty"]) for row in plan["feasibility"]} == expected
    assert all("too small to learn anything" in row["verdict"] for row in plan["feasibility"])


def test_a_plan_without_its_numbers_says_which(typed):
    code, _, err = typed("plan", "--epsilon", 1)
    assert code == 2
    assert "--delta, --rounds" in err
    assert typed("plan", CONFIGS / "smoke.yaml", "--rounds", 3)[0] == 2


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.yaml")))
def test_every_shipped_configuration_passes_the_lint(typed, name):
    code, out, _ = typed("lint", CONFIGS / name)
    assert code == 0, out


def test_a_bad_configuration_does_not(typed, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text((CONFIGS / "smoke.yaml").read_text() + "\nearly_stopping: {metric: val_loss, patience: 3}\n")
    code, out, _ = typed("lint", bad, "--json")
    assert code == PrivacyError.exit_code
    assert json.loads(out)["findings"]


def test_an_audit_of_a_configuration_passes_and_fails_without_noise(typed, monkeypatch):
    from clinifed.privacy import noise, self_test

    code, out, err = typed("audit", CONFIGS / "smoke.yaml", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert {r["audit"] for r in report["audits"]} == {
        "noise ruler",
        "neighbour shift",
        "one run, canaries",
        "gradient inversion",
    }
    assert "epsilon 3" in err
    quiet = noise.NoiseSource.standard_normal
    monkeypatch.setattr(noise.NoiseSource, "standard_normal", lambda self, *where: 1e-9 * quiet(self, *where))
    monkeypatch.setattr(self_test, "self_test", lambda: None)  # or it would stop here, as it should
    code, out, _ = typed("audit", CONFIGS / "smoke.yaml", "--json")
    assert code == PrivacyError.exit_code
    failed = {r["audit"] for r in json.loads(out)["audits"] if not r["passed"]}
    assert failed >= {"noise ruler", "one run, canaries", "gradient inversion"}


def test_init_show_export_and_backup(typed, tmp_path):
    path = tmp_path / "ledger.jsonl"
    init = ("ledger", "init", path, "--site", "alder", "--epsilon", 1, "--delta", "1e-5")
    assert typed(*init)[0] == 0
    assert typed(*init)[0] == LedgerError.exit_code, "a ledger is never replaced"
    shown = typed("ledger", "show", path)[1]
    assert all(
        text in " ".join(shown.split()) for text in ("epsilon 0.000000 of 1", "add/remove", "delta 1e-05", "patient")
    )
    assert json.loads(typed("ledger", "export", path)[1])["chain"][0]["kind"] == "open"
    assert typed("ledger", "export", path, "--out", tmp_path / "export.json")[0] == 0
    assert (tmp_path / "export.json").stat().st_mode & 0o077 == 0
    assert typed("ledger", "backup", path)[0] == 0
    assert (tmp_path / "ledger.jsonl.backup" / "ledger.jsonl").read_bytes() == path.read_bytes()


def test_verify_is_zero_only_for_an_intact_chain_that_matches_its_anchor(typed, path, tmp_path):
    anchor, whole = Path(f"{path}.anchor"), path.read_bytes()
    assert typed("ledger", "verify", path)[0] == 0
    elsewhere = tmp_path / "head"
    anchor.rename(elsewhere)
    assert typed("ledger", "verify", path)[0] != 0
    assert typed("ledger", "verify", path, "--anchor", elsewhere)[0] == 0
    for content in (whole[:-2], whole.replace(b"charge", b"refuse"), b"", whole + b"{", whole.splitlines()[0] + b"\n"):
        path.write_bytes(content)
        assert typed("ledger", "verify", path, "--anchor", elsewhere)[0] == LedgerError.exit_code
    path.unlink()
    assert typed("ledger", "verify", path)[0] == LedgerError.exit_code


def test_a_budget_grows_by_a_second_persons_signature(typed, path, tmp_path):
    code, out, _ = typed("key", tmp_path / "officer.key", "--json")
    assert code == 0
    assert json.loads(out)["public_key"] == public_key(read_signing_key(tmp_path / "officer.key"))
    asked = ("ledger", "increase", path, "--epsilon", 2, "--requested-by", "steward", "--reason", "a second study")
    key = ("--key", tmp_path / "officer.key")
    assert typed(*asked, "--approved-by", "steward", *key)[0] == LedgerError.exit_code
    assert typed(*asked, "--approved-by", "dpo", *key)[0] == 0
    assert json.loads(typed("ledger", "show", path, "--json")[1])["budget_epsilon"] == 2


def test_a_budget_that_is_none_is_refused_with_its_value(typed, tmp_path):
    code, _, err = typed("ledger", "init", tmp_path / "l", "--site", "a", "--epsilon", 0, "--delta", "1e-5")
    assert code == 2
    assert "epsilon" in err
    assert not (tmp_path / "l").exists()
