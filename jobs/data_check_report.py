"""The findings of ``clinifed data check`` as a table, as a page, and in the form that may leave the site."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from clinifed.files import OWNER_ONLY, write_atomic
from clinifed.jobs.data_check import DataCheck

__all__ = ["check_table", "write_page", "write_shareable"]

_COLOURS = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
_Row = tuple[str, str, Sequence[str], str]  # level, check, lines, remedy

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; }
th, td { border: 1px solid #767676; padding: .25rem .6rem; text-align: left; vertical-align: top; }
td { white-space: pre-wrap; }
.PASS { border-left: .5rem solid #00594c; } .WARN { border-left: .5rem dashed #8a5a00; }
.FAIL { border-left: .5rem double #a3000f; font-weight: 600; }
"""


def check_table(found: DataCheck) -> Table:
    """The whole table, for the site's own eyes."""
    table = Table(title=f"data check: {found.verdict}", show_lines=True)
    table.add_column("", no_wrap=True)
    for column in ("check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for level, name, lines, remedy in _own(found):
        # Text, not markup: a path may hold brackets.
        table.add_row(Text(level, _COLOURS[level]), Text(name), Text("\n".join(lines)), Text(remedy))
    return table


def _own(found: DataCheck) -> list[_Row]:
    return [(f.level, name, f.says, f.remedy) for name, f in found.findings.items()]


def _outside(found: DataCheck) -> list[_Row]:
    return [(row.level or "–", row.name, row.lines, "") for row in found.shared()]


def write_page(found: DataCheck, path: Path) -> None:
    """One HTML file that loads nothing, owner-only; it names images by row and holds paths, so it stays at the site."""
    note = "For the site's own eyes: this page holds paths and exact counts."
    page = _page(f"Data check of {found.site.name or 'a site'}: {found.verdict}", note, _own(found))
    write_atomic(path, page.encode(), OWNER_ONLY)


def write_shareable(found: DataCheck, path: Path) -> None:
    """What may leave the site: as JSON, HTML or text, by the suffix of ``path``; owner-only until somebody sends it.

    Raises:
        PrivacyError: something of the site's rows or images would be in it; nothing is written.
    """
    content = found.shared_dict()
    if path.suffix.lower() == ".json":
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    elif path.suffix.lower() in (".html", ".htm"):
        text = _page(f"Data check of {found.public_name}", str(content["note"]), _outside(found))
    else:
        lines = [f"data check of {found.public_name}", str(content["note"]), ""]
        for level, name, told, _ in _outside(found):
            lines += [f"{level:4}  {name}", *(f"        {line}" for line in told)]
        text = "\n".join([*lines, ""])
    write_atomic(path, text.encode(), OWNER_ONLY)


def _page(title: str, note: str, rows: Iterable[_Row]) -> str:
    body = "".join(
        f'<tr><td class="{escape(level)}">{escape(level)}</td><th scope="row">{escape(name)}</th>'
        f"<td>{escape(chr(10).join(lines))}</td><td>{escape(remedy)}</td></tr>\n"
        for level, name, lines, remedy in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("level", "check", "found", "what to do"))
    # The policy lets the page load nothing, whatever a path might try.
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n<p>{escape(note)}</p>\n<table><tr>{head}</tr>\n{body}</table>\n</body></html>\n"
    )
