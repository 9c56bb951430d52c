"""The report: it loads nothing, escapes everything, is the same every time, and says what passed and what it is not."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from clinifed.evaluation.parity import Outputs, Parity, compare
from clinifed.export.bundle import ExportReport, Row
from clinifed.export.presets import load_presets
from clinifed.export.report import PAGE, write_report
from clinifed.export.selection import HeadChoice
from clinifed.files import write_json

HOSTILE = '<script>alert("x")</script>&$x^2$'
THRESHOLDS = {name: preset.parity for name, preset in load_presets().precisions.items()}
LABELS = {
    "emergency": {"labels": ["mild", HOSTILE], "head": "trained", "reason": "not below zero-shot"},
    HOSTILE: {"labels": ["no", "yes"], "head": "zero-shot", "reason": f"below {HOSTILE}"},
}


def parity(noise: float = 1e-3, broken: bool = False) -> Parity:
    rng = np.random.default_rng(0)
    own = ["emergency"] * 20 + [HOSTILE] * 20
    embedding = rng.standard_normal((40, 8)).astype(np.float32)
    logits = {name: rng.standard_normal((40, 2)).astype(np.float32) for name in LABELS}
    moved = {name: value + np.float32(noise) * rng.standard_normal(value.shape) for name, value in logits.items()}
    other = embedding + np.float32(noise) * rng.standard_normal(embedding.shape).astype(np.float32)
    if broken:
        moved["emergency"][3] = np.nan
        other[3] = np.nan
    labels = rng.integers(2, size=40).tolist()
    return compare(Outputs(embedding, logits), Outputs(other, moved), own, labels, [i // 2 for i in range(40)])


ROWS = (
    Row("fp32", parity(1e-7), (), 4_000_000, "ONNX Runtime on the CPU"),
    Row(
        "fp16",
        parity(),
        (),
        2_000_000,
        "ONNX Runtime on the CPU",
        engines={"tensorrt-rtx": {"bytes": 2_100_000, "parity": "engine never executed: torch finds no GPU here"}},
        deferred={"tensorrt": f"no GPU here {HOSTILE}"},
        notes={"smoothing_folds": 5},
    ),
    Row(
        "int8",
        parity(0.5, broken=True),
        ("cosine_mean nan is below 0.9985",),
        1_000_000,
        "CPU",
        kept=("/blocks.0/qkv",),
    ),
)


def report(rows: tuple[Row, ...] = ROWS, **changes: Any) -> ExportReport:
    return ExportReport(Path("out"), rows, {"emergency": HeadChoice("trained", "")}, **changes)


def write(folder: Path, what: ExportReport, images: int | None = 40) -> str:
    folder.mkdir()
    write_json(folder / "labels.json", LABELS)
    test = {
        "manifest_sha256": "ab" * 32,
        "data_class": "public" if images else "hospital",
        "images": images,
        "skipped": images and 1,
    }
    write_json(folder / "parity.json", {"test": test})
    path = write_report(folder, what, THRESHOLDS)
    assert path == folder / PAGE
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report") / "bundle", report())


class Tags(HTMLParser):
    """Every tag with its attributes, and that each is closed."""

    VOID = ("meta", "br", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    assert not {tag for tag, _ in tags.found} & {"script", "link", "img", "iframe", "object", "base", "form"}
    for tag, attributes in tags.found:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert str(value).startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "default-src 'none'" in page


def test_names_are_shown_as_they_are_and_not_obeyed(page: str) -> None:
    assert HOSTILE not in page
    assert text(page).count(HOSTILE) > 10  # in tables and in plots


def test_the_same_report_gives_the_same_bytes_whatever_the_settings_of_matplotlib(page: str, tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        assert write(tmp_path / "again", report()) == page
        assert dict(mpl.rcParams) == before
    assert not re.search(r"\d\d:\d\d:\d\d|Matplotlib v", page)


def test_every_identifier_is_unique_and_every_reference_meets_one(page: str) -> None:
    identifiers = [value for _, attributes in Tags(page).found if (value := attributes.get("id"))]
    assert len(identifiers) == len(set(identifiers))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert references
    assert references <= set(identifiers)


def test_plots_are_whole_drawings_with_a_text_for_those_who_do_not_see_them(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3 * len(ROWS)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert root.get("aria-label")
    assert "1 of them broken" in page


def test_each_precision_says_what_it_passed_and_missed(page: str) -> None:
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, flags=re.DOTALL))
    assert set(sections) == {"fp32", "fp16", "int8"}
    assert "missed" not in sections["fp16"]
    assert sections["fp16"].count("<td>passed</td>") == 2
    assert sections["fp32"].count("<td>passed</td>") == 4  # it has limits for single numbers as well
    assert sections["int8"].count("<td>missed</td>") == 1
    assert "not packed: cosine_mean nan is below 0.9985" in sections["int8"]
    assert "/blocks.0/qkv" in sections["int8"]
    assert "smoothing_folds: 5" in sections["fp16"]


def test_an_engine_that_was_not_executed_is_never_passed_off_as_measured(page: str) -> None:
    section = page[page.index('<section id="fp16">') : page.index('<section id="int8">')]
    assert "engine never executed: torch finds no GPU here" in section
    assert "Engines executed" not in section
    assert "no GPU here" in section


def test_an_executed_engine_has_figures_of_its_own(tmp_path: Path) -> None:
    ran = parity(2e-3)
    engines = {"tensorrt": {"bytes": 5, "parity": "of the engine itself"}}
    row = Row("fp16", parity(), (), 9, "CPU", engines=engines, engine_parity={"tensorrt": ran})
    page = write(tmp_path / "bundle", report((row,)))
    assert "never executed</td>" not in page
    assert f"{ran.cosine_mean:.7g}" in page[page.index("Engines executed") :]


def test_every_difference_stands_in_the_table_with_its_interval(page: str) -> None:
    shown = text(page)
    for row in ROWS:
        for by_figure in row.parity.differences.values():
            for figure in by_figure.values():
                for value in figure.to_dict().values():
                    assert value is None or f"{value:.7g}" in shown
    assert "95% intervals from 1000 draws of patients" in shown
    assert "0 is inside" in shown
    assert "no interval" in shown  # AUROC of the broken model


def test_the_page_says_what_its_figures_are_not(page: str) -> None:
    assert "Agreement with FP32 is not clinical accuracy" in page
    assert "Nothing here says how fast an engine is" in page


def test_images_that_are_not_public_are_not_plotted_one_by_one(tmp_path: Path) -> None:
    page = write(tmp_path / "bundle", report(exportable=False, reasons=("made of a hospital's images",)), images=None)
    assert page.count("<svg") == len(ROWS)  # the differences of whole specialties
    assert "1 − cosine of an image" not in page
    assert "This bundle may not leave the hospital" in page


def test_the_report_of_a_broken_model_is_written(tmp_path: Path) -> None:
    nothing = Outputs(np.full((4, 3), np.nan, np.float32), {"emergency": np.full((4, 2), np.nan, np.float32)})
    something = Outputs(np.ones((4, 3), np.float32), {"emergency": np.ones((4, 2), np.float32)})
    broken = compare(something, nothing, ["emergency"] * 4, [0, 1, 0, 1])
    row = Row("fp16", broken, tuple(THRESHOLDS["fp16"].failures(broken)), 1)
    page = write(tmp_path / "bundle", report((row,)))
    assert page.count("<td>missed</td>") == 2
    assert "4 of them broken" in page


def test_a_comparison_without_labels_has_no_table_of_differences(tmp_path: Path) -> None:
    one = Outputs(np.ones((4, 3), np.float32), {"emergency": np.eye(4, 2, dtype=np.float32)})
    page = write(tmp_path / "bundle", report((Row("fp32", compare(one, one, ["emergency"] * 4), (), 1),)))
    assert page.count("<svg") == 2
    assert "intervals from" not in page


def test_labels_come_from_the_bundle(page: str) -> None:
    assert "mild" in text(page)
