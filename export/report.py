"""``report/parity.html``: what was measured of each precision, for a person; one file that loads nothing.

Plots are drawn with matplotlib's objects, without its global state, and stand in the page as SVG. The same report gives
the same bytes under the same version of matplotlib.
"""

import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from clinifed.evaluation.intervals import FIGURES, LEVEL, REPLICATES, Difference
from clinifed.evaluation.parity import Parity
from clinifed.export.bundle import ExportReport, Row
from clinifed.export.presets import Thresholds
from clinifed.files import write_atomic

__all__ = ["PAGE", "write_report"]

PAGE = "report/parity.html"
_NAMES = dict(zip(FIGURES, ("AUROC", "balanced accuracy", "calibration error (ECE)"), strict=True))
_MARKERS = dict(zip(FIGURES, "os^", strict=True))  # shapes and strokes, so that nothing is told by colour alone
_STROKES = ("solid", "dashed", "dotted", "dashdot")
_INK = "#1a1a1a"
_INKS = (_INK, "#0b5cad", "#a33b00", "#5b2a86", "#00594c")  # each at least 6:1 on white
_SMALLEST = 1e-9  # of a logarithmic axis; float32 does not tell cosines apart that are closer to 1 than 6e-8

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; }
th, td { border: 1px solid #767676; padding: .25rem .6rem; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
section { border-top: 2px solid #1a1a1a; margin-top: 2.5rem; }
code { overflow-wrap: anywhere; }
"""

_LIMITS = (
    "Agreement with FP32 is not clinical accuracy. A faithful copy of a model that errs errs with it.",
    "The images are a public or synthetic test set, not the patients, scanners or prevalences of any hospital. "
    "Where they are not public, no image is plotted.",
    f"An interval holds what another draw of the same kind of patients could have given, at {LEVEL:.0%}. Of twenty "
    "such intervals about one misses a true difference of 0 by chance; a wide one shows that the set is small. "
    "One that leaves 0 out says that a difference is there, not that it matters.",
    "An engine on a GPU adds in other orders, and in part in other widths, than ONNX Runtime on a CPU. An engine that "
    "was never executed was not measured.",
    "Nothing here says how fast an engine is.",
)


def write_report(bundle: Path, report: ExportReport, thresholds: Mapping[str, Thresholds]) -> Path:
    """Write :data:`PAGE`; returns its path.

    Args:
        bundle: the directory, with ``labels.json`` and ``parity.json``.
        report: of the same export.
        thresholds: precision → what its parity was held against.
    """
    labels = json.loads((bundle / "labels.json").read_text())
    test = json.loads((bundle / "parity.json").read_text())["test"]
    with _drawing():
        public = test["images"] is not None
        sections = [_section(row, thresholds[row.precision], plotted=public) for row in report.rows]
    body = [
        "<h1>Parity of the exported precisions with the model in FP32</h1>",
        "" if report.exportable else _list("This bundle may not leave the hospital:", report.reasons),
        _summary(report),
        f"<p>Reference: torch, FP32, on the CPU. Test set: {escape(str(test['data_class']))}, manifest "
        f"<code>{escape(str(test['manifest_sha256']))}</code>, images: {escape(_text(test['images']))}, "
        f"unreadable: {escape(_text(test['skipped']))}.</p>",
        _table(
            "Specialties",
            ("specialty", "labels, in the order of the logits", "head", "why"),
            [(name, ", ".join(entry["labels"]), entry["head"], entry["reason"]) for name, entry in labels.items()],
        ),
        _list("What these figures do not say", _LIMITS),
        *sections,
    ]
    # The policy lets the page load nothing, whatever a label might try.
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Parity</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
    ) + "\n".join([*filter(None, body), "</body></html>\n"])
    path = bundle / PAGE
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, page.encode())
    return path


def _summary(report: ExportReport) -> str:
    rows = [
        (row.precision, _verdict(row), _size(row.onnx_bytes), row.parity.cosine_mean, row.parity.top1_agreement)
        for row in report.rows
    ]
    return _table("Precisions", ("precision", "verdict", "ONNX", "cosine, mean", "same decision"), rows)


def _section(row: Row, limits: Thresholds, *, plotted: bool) -> str:
    """All of one precision."""
    name, parity = row.precision, row.parity
    measured = {
        "cosine_mean": ("≥", limits.cosine_mean, parity.cosine_mean),
        "top1_agreement": ("≥", limits.top1_agreement, parity.top1_agreement),
        "embedding_max_abs": ("≤", limits.embedding_max_abs, parity.embedding_max_abs),
        "logits_max_rel": ("≤", limits.logits_max_rel, parity.logits_max_rel),
    }
    missed = {failure.split()[0] for failure in row.failures}
    gate = [
        (figure, f"{sign} {limit:g}", value, "missed" if figure in missed else "passed")
        for figure, (sign, limit, value) in measured.items()
        if limit is not None
    ]
    figures = [_bars(f"{name}-cosine", parity, limits), _steps(f"{name}-logits", parity)] if plotted else []
    if parity.differences:
        figures.append(_forest(f"{name}-forest", parity))
    files = [("ONNX", _size(row.onnx_bytes), row.runtime)]
    files += [
        (f"{target} engine", _size(size), str(row.engines[target].get("parity", "engine never executed")))
        for target, size in row.engine_bytes.items()
    ]
    files += [(f"{target} engine", "none", why) for target, why in row.deferred.items()]
    executed = [
        (target, p.cosine_mean, p.cosine_min, p.logits_max_abs, p.top1_agreement)
        for target, p in row.engine_parity.items()
    ]
    others = [
        ("images", str(parity.images)),
        ("cosine, smallest", parity.cosine_min),
        ("embedding, largest difference", parity.embedding_max_abs),
        ("logits, largest difference", parity.logits_max_abs),
        *((f"same decision, {specialty}", value) for specialty, value in parity.top1_by_specialty.items()),
    ]
    parts = [
        f"<h2>{escape(name)}: {escape(_verdict(row))}</h2>",
        _table("Files", ("file", "size", "measured with"), files),
        _table("Thresholds", ("figure", "limit", "measured", "verdict"), gate),
        _table("More of the ONNX", ("figure", "measured"), others),
        _table("Engines executed", ("engine", "cosine, mean", "smallest", "logits", "same decision"), executed),
        *figures,
        _differences(parity),
        _list("Nodes left unquantised, so that the thresholds are met", row.kept),
        _list("The conversion", (f"{key}: {value}" for key, value in row.notes.items())),
    ]
    return f'<section id="{escape(name)}">\n' + "\n".join(filter(None, parts)) + "\n</section>"


def _verdict(row: Row) -> str:
    return f"not packed: {'; '.join(row.failures)}" if row.failures else "packed"


def _differences(parity: Parity) -> str:
    def told(d: Difference) -> str:
        if d.covers_zero is None:
            return "no interval"
        return "0 is inside" if d.covers_zero else "0 is outside"

    rows = [
        (specialty, _NAMES[figure], d.reference, d.candidate, d.difference, d.low, d.high, told(d))
        for specialty, by_figure in parity.differences.items()
        for figure, d in by_figure.items()
    ]
    caption = f"This precision − FP32, {LEVEL:.0%} intervals from {REPLICATES} draws of {parity.resampled}"
    return _table(caption, ("specialty", "figure", "FP32", "here", "difference", "low", "high", "interval"), rows)


def _text(value: object) -> str:
    """A cell's text; a dash where a figure is undefined."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table, or nothing where it has no rows."""

    def cell(value: object) -> str:
        start = '<td class="n">' if value is None or isinstance(value, float) else "<td>"
        return f"{start}{escape(_text(value))}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    columns = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return f"<table><caption>{escape(caption)}</caption><tr>{columns}</tr>\n{body}</table>" if body else ""


def _list(title: str, items: Iterable[str]) -> str:
    body = "".join(f"<li>{escape(item)}</li>\n" for item in items)
    return f"<h3>{escape(title)}</h3>\n<ul>{body}</ul>" if body else ""


def _bars(name: str, parity: Parity, limits: Thresholds) -> str:
    distance = 1 - parity.per_image.cosine
    figure, axes = _axes(2.6)
    finite = distance[np.isfinite(distance)].clip(_SMALLEST, 2)
    axes.hist(finite, bins=_log_bins(2), facecolor="#d0d0d0", edgecolor=_INK, hatch="//")
    axes.axvline(1 - limits.cosine_mean, color=_INK, linestyle="dashed", label="limit for the mean")
    axes.set(xscale="log", xlabel="1 − cosine of an image's embedding, here and in FP32", ylabel="images")
    axes.legend()
    broken = len(distance) - len(finite)
    return _svg(name, figure, f"Embeddings: {len(distance)} images, {broken} of them broken and not drawn.")


def _steps(name: str, parity: Parity) -> str:
    figure, axes = _axes(2.6)
    for index, (specialty, values) in enumerate(parity.per_image.logit_differences.items()):
        gaps = np.abs(values[np.isfinite(values)]).clip(_SMALLEST, 1e3)
        stroke = _STROKES[index % len(_STROKES)]
        axes.hist(
            gaps, bins=_log_bins(1e3), histtype="step", color=f"C{index}", linestyle=stroke, label=_plain(specialty)
        )
    axes.set(xscale="log", xlabel="|logit here − logit in FP32|", ylabel="logits")
    axes.legend(title="head, on images of its own specialty")
    return _svg(
        name, figure, f"Logits: each head's differences on its own images; smaller ones are drawn at {_SMALLEST:g}."
    )


def _forest(name: str, parity: Parity) -> str:
    rows = [(s, f, d) for s, by_figure in parity.differences.items() for f, d in by_figure.items()]
    figure, axes = _axes(1 + 0.28 * len(rows))
    for place, (_, kind, d) in enumerate(rows):
        if d.low is not None and d.high is not None:
            axes.plot([d.low, d.high], [place, place], color=_INK, linewidth=1.5)
        if d.difference is not None:
            axes.plot([d.difference], [place], marker=_MARKERS[kind], color=_INK, markerfacecolor="white")
        else:
            axes.text(0, place, " undefined", color=_INK, verticalalignment="center")
    axes.axvline(0, color=_INK, linestyle="dashed", linewidth=1)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="this precision − FP32")
    axes.set_yticks(range(len(rows)), [_plain(f"{s}: {_NAMES[f]}") for s, f, _ in rows])
    return _svg(name, figure, "Difference of each figure, with its interval; the table below has the numbers.")


def _log_bins(largest: float) -> list[float]:
    edges: list[float] = np.geomspace(_SMALLEST, largest, 49).tolist()
    return edges


@contextmanager
def _drawing() -> Iterator[None]:
    """matplotlib as it comes, whatever this machine's settings are, and text as text; put back afterwards."""
    with matplotlib.style.context("default"), warnings.catch_warnings():
        matplotlib.rcParams["svg.hashsalt"] = "clinifed"
        matplotlib.rcParams["svg.fonttype"] = "none"
        warnings.simplefilter("ignore", UserWarning)  # a glyph that the layout's own font lacks; the reader's draws it
        yield


def _plain(text: str) -> str:
    """Not mathematics, whatever a name holds."""
    return text.replace("$", r"\$")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(name: str, figure: Figure, caption: str) -> str:
    """The figure as an element of the page, its identifiers made unique by ``name``."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{escape(name)}-", drawing)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f"<figure>\n{drawing}<figcaption>{escape(caption)}</figcaption>\n</figure>"
