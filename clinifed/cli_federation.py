"""``clinifed poc``, ``provision``, ``preflight``, ``submit``, ``status``: federations of real processes."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from clinifed.errors import INTERRUPTED, ConfigError, FederationError

__all__ = ["add_federation_verbs", "spelled_out"]

_STEPS = ("up", "submit", "status", "down")
_RUN = "run"


class _Console(Protocol):
    def progress(self, text: str) -> None: ...

    def result(self, content: Any, *tables: Any) -> None: ...


def spelled_out(argv: Sequence[str]) -> list[str]:
    """``clinifed poc CONFIG`` is short for ``clinifed poc run CONFIG``."""
    words = list(argv)
    short = words[:1] == ["poc"] and len(words) > 1 and not words[1].startswith("-")
    return [*words[:1], _RUN, *words[1:]] if short and words[1] not in (*_STEPS, _RUN) else words


def _federation(args: argparse.Namespace) -> Any:
    from clinifed.load import load_federation

    return load_federation(args.config, args.set or ())


def _told(summary: dict[str, Any], console: _Console) -> None:
    from clinifed.jobs.report import DISCLAIMER, summary_tables

    console.result(summary, *summary_tables(summary), DISCLAIMER)


def _poc(args: argparse.Namespace, console: _Console) -> None:
    federation = _federation(args)
    from clinifed.jobs.poc import poc

    _told(poc(federation, args.out, console.progress), console)


def _up(args: argparse.Namespace, console: _Console) -> None:
    federation = _federation(args)
    from clinifed.jobs.poc import poc_up

    poc_up(federation, args.out, console.progress)
    console.result({"out": str(args.out)}, f"up; next: clinifed poc submit {args.out}")


@contextmanager
def _goes_on(out: Path, console: _Console) -> Iterator[None]:
    """Ctrl-C ends the watching, not the run: it is the server's."""
    try:
        yield
    except KeyboardInterrupt:
        console.progress(f"interrupted; the run goes on at the server: clinifed submit --resume {out} follows it")
        raise SystemExit(INTERRUPTED) from None


def _poc_submit(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.jobs.poc import poc_submit

    with _goes_on(args.out, console):
        _told(poc_submit(args.out, console.progress), console)


def _down(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.jobs.poc import poc_down

    poc_down(args.out, console.progress)
    console.result({"out": str(args.out)}, "down")


def _status(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.jobs.status import federation_status, status_tables

    status = federation_status(args.place)
    console.result(status, *status_tables(status))


def _provision(args: argparse.Namespace, console: _Console) -> None:
    federation = _federation(args)
    from clinifed.jobs.provision import provision

    kits = provision(federation, args.out, console.progress)
    console.result({name: str(path) for name, path in kits.items()}, *(f"{n:24} {p}" for n, p in kits.items()))


def _preflight(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.jobs.preflight import preflight

    found = preflight(args.kit, flare=not args.offline)
    lines = [f"{'refused' if problems else 'ok':8} {name}" for name, problems in found.checks.items()]
    console.result(found.to_dict(), *lines, *(f"note: {note}" for note in found.notes))
    if found.problems:
        raise FederationError(*found.problems)


def _submit(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.jobs.submit import resume, submit

    given = [f"--{name.replace('_', '-')}" for name in ("admin_kit", "out") if getattr(args, name) is not None]
    if args.resume is not None:
        if args.config is not None or given:
            raise ConfigError(f"--resume {args.resume}: the run's configuration, kit and directory stand there")
        with _goes_on(args.resume, console):
            _told(resume(args.resume.resolve(), console.progress), console)
        return
    missing = [name for name, value in (("CONFIG", args.config), ("--admin-kit", args.admin_kit)) if value is None]
    missing += [] if args.out is not None else ["--out"]
    if missing:
        raise ConfigError(f"submit: {', '.join(missing)} missing; or --resume RUN")
    federation = _federation(args)
    with _goes_on(args.out, console):
        _told(submit(federation, args.admin_kit, args.out.resolve(), console.progress), console)


def add_federation_verbs(verbs: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs; ``verb(name, run, help, group)`` makes one with the common arguments."""

    def config(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
        parser.add_argument("config", type=Path, nargs=nargs, help="a federation's YAML")
        parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one setting, e.g. rounds=3")

    text = "the sites of a configuration as real FLARE processes on this machine: `clinifed poc CONFIG --out DIR`"
    group = verbs.add_parser("poc", help=text, description=text).add_subparsers(
        title="verbs", required=True, metavar="CONFIG | VERB"
    )
    for name, run, help_text in (
        (_RUN, _poc, "prepare, start, run, stop; the word may be left out"),
        ("up", _up, "prepare and start"),
    ):
        parser = verb(name, run, help_text, group)
        config(parser)
        parser.add_argument("--out", type=Path, required=True, help="run directory to make")
    for name, run, help_text in (
        ("submit", _poc_submit, "run it, or go on with it"),
        ("down", _down, "stop it"),
    ):
        verb(name, run, help_text, group).add_argument("out", type=Path, help="the run directory of `poc up`")
    verb("status", _status, "what it is doing", group).add_argument("place", type=Path, help="its run directory")

    kits = verb("provision", _provision, "signed startup kits for the server, every hospital and the coordinator")
    config(kits)
    kits.add_argument("--out", type=Path, required=True, help="folder of the kits; again with a new site adds its kit")

    check = verb("preflight", _preflight, "is this startup kit what it must be? then FLARE's own preflight-check")
    check.add_argument("kit", type=Path)
    check.add_argument("--offline", action="store_true", help="leave FLARE's check out, which needs the server")

    submit = verb("submit", _submit, "run a federation on sites that are up, and follow it")
    config(submit, "?")
    submit.add_argument("--admin-kit", type=Path, metavar="DIR", help="the coordinator's startup kit")
    submit.add_argument("--out", type=Path, help="run directory to make")
    submit.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this directory")

    status = verb("status", _status, "what a running federation is doing")
    status.add_argument("place", type=Path, help="a run directory, or the coordinator's startup kit")
