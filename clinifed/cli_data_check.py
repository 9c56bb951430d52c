"""``clinifed data check`` and ``clinifed data wipe``: a site looks at what it has, and removes what it derived."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from clinifed.errors import ConfigError, DataError

__all__ = ["add_check_verbs"]


class _Console(Protocol):
    def progress(self, text: str) -> None: ...

    def result(self, content: Any, *tables: Any) -> None: ...


def _check(args: argparse.Namespace, console: _Console) -> None:
    if args.set and args.federation is None:
        raise ConfigError("--set overrides settings of --federation CONFIG, which is missing")
    from clinifed.jobs.data_check import data_check, site_under_check
    from clinifed.jobs.data_check_report import check_table, write_page, write_shareable

    site = site_under_check(
        args.policy,
        manifest=args.manifest,
        federation=args.federation,
        overrides=args.set or (),
        contract=args.contract,
        name=args.site,
        sample=args.sample,
        minimum=args.minimum,
    )
    found = data_check(site, console.progress)
    console.result(found.to_dict(), check_table(found))
    if args.html is not None:
        write_page(found, args.html)
    if args.share is not None:
        write_shareable(found, args.share)
    if found.failed:
        raise DataError(*(f"data check: {name} failed" for name in found.failed))


def _wipe(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.load import read_yaml, validate
    from clinifed.models.shards import wipe
    from clinifed.policy import SitePolicy

    folder: Path = args.place
    if folder.is_file():
        folder = validate(SitePolicy, read_yaml(folder), str(folder)).cache
    wiped = wipe(folder)
    content = {"folder": str(folder), "shards": wiped.shards, "bytes": wiped.size_bytes, "overwritten": False}
    console.result(
        content,
        f"{wiped.shards} shards, {wiped.size_bytes / 1e6:.1f} MB removed from {folder}",
        "removed is not overwritten: on an SSD, in snapshots and in backups the bytes may live on; encrypt the disk "
        "where that matters",
    )


def add_check_verbs(data_verbs: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``check`` and ``wipe`` to the verbs of ``clinifed data``; ``verb(name, run, help, group)`` makes one."""
    check = verb("check", _check, "may and can this site take part? one table; exit code 3 where not", data_verbs)
    check.add_argument("policy", type=Path, nargs="?", metavar="SITE.yaml", help="the site's policy file")
    check.add_argument("--manifest", type=Path, help="the site's manifest, where there is no policy yet")
    check.add_argument("--federation", type=Path, metavar="CONFIG", help="a federation's YAML to hold it against")
    check.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one setting of the federation")
    check.add_argument("--contract", type=Path, metavar="FILE", help="the agreed contract, as JSON")
    check.add_argument("--site", metavar="NAME", help="the site's name in the federation")
    check.add_argument("--sample", type=int, metavar="N", help="open so many images, evenly chosen (default: all)")
    check.add_argument("--minimum", type=int, default=10, help="least count told in --share (default: 10)")
    check.add_argument("--html", type=Path, metavar="FILE", help="also write the table as a page, for the site itself")
    check.add_argument("--share", type=Path, metavar="FILE", help="also write what may leave: .json, .html or text")

    wipe = verb("wipe", _wipe, "remove a site's embedding cache", data_verbs)
    wipe.add_argument("place", type=Path, metavar="CACHE|SITE.yaml", help="the cache's folder, or the site's policy")
