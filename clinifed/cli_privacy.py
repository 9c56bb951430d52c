"""``clinifed privacy``: plan, lint, audit, and the ledger, for the data scientist and the data protection officer."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from clinifed.errors import ConfigError, PrivacyError

__all__ = ["add_privacy_verbs"]


class _Console(Protocol):
    def progress(self, text: str) -> None: ...

    def result(self, content: Any, *tables: Any) -> None: ...


Run = Callable[[argparse.Namespace, _Console], None]


def _plan(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.jobs.plan import plan_federation, plan_tables
    from clinifed.privacy.plan import make_plan

    if args.config is not None:
        given = [name for name in ("epsilon", "delta", "rounds", "patients") if getattr(args, name) is not None]
        if given:
            raise ConfigError(f"--{given[0]} and a configuration say the same thing; use --set privacy.epsilon=… there")
        plan = plan_federation(args.config, args.set or (), cross_check=True)
    else:
        missing = [f"--{name}" for name in ("epsilon", "delta", "rounds") if getattr(args, name) is None]
        if missing:
            raise ConfigError(f"privacy plan: give a configuration, or {', '.join(missing)}")
        plan = make_plan(
            args.epsilon,
            args.delta,
            args.rounds,
            local_steps=args.local_steps,
            reserve_rounds=args.reserve_rounds,
            patients=args.patients,
            parameters=args.parameters,
            cross_check=True,
        )
    console.result(plan.to_dict(), *plan_tables(plan), *(f"note: {warning}" for warning in plan.warnings))


def _lint(args: argparse.Namespace, console: _Console) -> None:
    from dataclasses import asdict

    from clinifed.privacy.lint import lint

    findings = lint(args.config)
    lines = [f"{f.where}: {f.rule}: {f.found}\n  why: {f.why}\n  do: {f.remedy}" for f in findings]
    console.result(
        {"config": str(args.config), "findings": [asdict(f) for f in findings]},
        *(lines or [f"{args.config}: nothing to refuse"]),
    )
    if findings:
        sys.exit(PrivacyError.exit_code)


def _audit(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.jobs.audit import audit_federation

    report = audit_federation(args.config, args.set or (), console.progress)
    lines = [f"{'passed' if r['passed'] else 'FAILED'}  {r['audit']}: {r['says']}" for r in report["audits"]]
    console.result(report, *lines)
    if not all(r["passed"] for r in report["audits"]):
        sys.exit(PrivacyError.exit_code)


def _key(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.signing import make_signing_key, public_key

    public = public_key(make_signing_key(args.path))
    console.result({"key": str(args.path), "public_key": public}, f"private {args.path}", f"public  {public}")


def _init(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.privacy.ledger import Ledger

    Ledger(args.path, args.site, _budget(args.epsilon, args.delta), args.anchor).create()
    _show(args, console)


def _budget(epsilon: float, delta: float) -> Any:
    from clinifed.load import validate
    from clinifed.policy import Budget

    return validate(Budget, {"epsilon": epsilon, "delta": delta}, "command line")


def _show(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.jobs.report import ledger_tables
    from clinifed.privacy.officer import ledger_report

    report = ledger_report(args.path, args.anchor)
    console.result(report, *ledger_tables(report))


def _verify(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.privacy.officer import verify_ledger

    report = verify_ledger(args.path, args.anchor, args.published or ())
    console.result({"intact": True, **report}, f"{args.path}: intact, {report['records']} records, meets its anchor")


def _export(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.files import write_json
    from clinifed.privacy.officer import export_ledger

    content = export_ledger(args.path, args.anchor)
    if args.out is None:
        print(json.dumps(content, indent=2))
    else:
        write_json(args.out, content, 0o600)
        console.result(
            {"out": str(args.out), "records": content["records"]}, f"{content['records']} records in {args.out}"
        )


def _backup(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.privacy.officer import backup_ledger

    copy = backup_ledger(args.path, args.to or args.path.with_name(f"{args.path.name}.backup"), args.anchor)
    console.result({"backup": str(copy)}, f"{copy} and its anchor, verified")


def _migrate(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.privacy.ledger import Ledger, read_ledger

    state = read_ledger(args.path, args.anchor)[0]
    Ledger(args.path, state.site, _budget(state.epsilon_budget, state.delta), args.anchor).migrate()
    _show(args, console)


def _increase(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.privacy.ledger import Ledger, read_ledger
    from clinifed.signing import read_signing_key

    state = read_ledger(args.path, args.anchor)[0]
    ledger = Ledger(args.path, state.site, _budget(args.epsilon, state.delta), args.anchor)
    ledger.increase(args.epsilon, args.requested_by, args.approved_by, args.reason, read_signing_key(args.key))
    _show(args, console)


def _free(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.privacy.ledger import Ledger, read_ledger

    state, account, _ = read_ledger(args.path, args.anchor)
    if args.job not in account.jobs:
        raise ConfigError(f"{args.path}: no job {args.job!r}; `clinifed privacy ledger show` lists them")
    Ledger(args.path, state.site, _budget(state.epsilon_budget, state.delta), args.anchor).finish(args.job)
    _show(args, console)


def _touched(args: argparse.Namespace, console: _Console) -> None:
    from dataclasses import asdict

    from clinifed.jobs.withdrawal import touched_by, withdraw

    identity = sys.stdin.readline().rstrip("\n")  # on a command line it would stay in the shell's history
    gone = withdraw(identity, args.policy, args.issuer) if args.withdraw else None
    found = touched_by(identity, args.policy, args.issuer, args.card or ())
    lines = [
        f"job {t.job}: {len(t.rounds)} releases; models: {', '.join(t.checkpoints) or 'none of those given'}"
        for t in found
    ]
    content: dict[str, Any] = {"touched": [asdict(t) for t in found]}
    lines = lines or ["no release touched this patient's data"]
    if gone is not None:
        content["withdrawn"] = asdict(gone)
        lines.append(
            f"no later training reads this patient; embedding cache: {gone.rows} rows dropped, and {gone.shards} "
            "shards of which nobody can say whose"
        )
        if gone.listed:
            lines.append(
                f"the manifest still names {gone.listed} images of this patient: remove the files, and `clinifed data "
                "index` again"
            )
    console.result(content, *lines)


def add_privacy_verbs(privacy: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs below ``privacy``; ``verb(name, run, help, group)`` makes one with the common arguments."""
    plan = verb("plan", _plan, "what a federation would cost and could learn, before any training", privacy)
    plan.add_argument("config", type=Path, nargs="?", help="a federation's YAML; or give the numbers below")
    plan.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one setting of it")
    plan.add_argument("--epsilon", type=float, help="per patient, for all rounds together")
    plan.add_argument("--delta", type=float)
    plan.add_argument("--rounds", type=int)
    plan.add_argument("--local-steps", type=int, default=1, help="releases in a round (default: 1)")
    plan.add_argument(
        "--reserve-rounds", type=int, default=0, help="more rounds paid for, against crashes (default: 0)"
    )
    plan.add_argument("--patients", type=int, help="N₀ of one site, for the noise-to-signal estimate")
    plan.add_argument(
        "--parameters", type=int, default=1026, help="that train (default: 1026, a two-label BiomedCLIP head)"
    )
    lint = verb("lint", _lint, "refuse the ways in which an epsilon turns out wrong", privacy)
    lint.add_argument("config", type=Path, help="a YAML, a JSON, or a folder: federation, FLARE job, or site")
    audit = verb("audit", _audit, "attack the mechanism itself, on synthetic patients", privacy)
    audit.add_argument("config", type=Path, help="a federation's YAML")
    audit.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one setting of it")
    key = verb("key", _key, "make an Ed25519 signing key for a site or an officer", privacy)
    key.add_argument("path", type=Path, help="file to write, owner-only; the public half is printed")
    touched = verb(
        "touched", _touched, "which releases and models a patient's data touched; PatientID on stdin", privacy
    )
    touched.add_argument("--policy", type=Path, required=True, help="the site's policy file")
    touched.add_argument("--issuer", default="", help="IssuerOfPatientID, where the records have one")
    touched.add_argument("--card", type=Path, action="append", help="card.json of a checkpoint; repeatable")
    touched.add_argument(
        "--withdraw",
        action="store_true",
        help="the patient withdraws: no later training reads them, and the embeddings kept of them are dropped",
    )
    group = privacy.add_parser("ledger", help="the site's budget ledger").add_subparsers(
        title="verbs", required=True, metavar="VERB"
    )
    _ledger_verbs(group, verb)


def _ledger_verbs(group: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    def ledger(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        parser = verb(name, run, text, group)
        parser.add_argument("path", type=Path, help="the ledger, ledger.jsonl")
        parser.add_argument("--anchor", type=Path, help="the file of its head (default: PATH.anchor)")
        return parser

    init = ledger("init", _init, "open a site's ledger, once, for its lifetime")
    init.add_argument("--site", required=True)
    init.add_argument("--epsilon", type=float, required=True, help="lifetime budget per patient")
    init.add_argument("--delta", type=float, required=True)
    ledger("show", _show, "what was spent, by job")
    verify = ledger("verify", _verify, "exit 0 only for an intact chain that matches its anchor")
    published = "card.json, summary.json or rounds.jsonl whose heads of this site must be in the ledger; repeatable"
    verify.add_argument("--published", type=Path, action="append", metavar="FILE", help=published)
    export = ledger("export", _export, "everything as JSON, for the records of the data protection officer")
    export.add_argument("--out", type=Path, help="file to write, owner-only (default: stdout)")
    backup = ledger("backup", _backup, "a verified copy; refuses to replace a longer one")
    backup.add_argument("--to", type=Path, metavar="FOLDER", help="best on another disk (default: PATH.backup)")
    ledger("migrate", _migrate, "go on with a ledger of an older format")
    free = ledger("free", _free, "a run will not go on: what is left of its reservation returns to the budget")
    free.add_argument("--job", required=True, help="the run's name, as `show` lists it; it can be charged no more")
    increase = ledger("increase", _increase, "a larger budget, asked for by one person and signed by another")
    increase.add_argument("--epsilon", type=float, required=True, help="the new lifetime budget")
    increase.add_argument("--requested-by", required=True)
    increase.add_argument("--approved-by", required=True, help="an officer of the site's policy")
    increase.add_argument("--reason", required=True)
    increase.add_argument("--key", type=Path, required=True, help="the officer's signing key")
