"""The layout: packages, folder map, links and disk say the same; folders are flat; the README's tree is the disk's."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = [name.removeprefix("clinifed.") for name in SETUP["packages"] if "." in name]


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listing.stdout.splitlines()]


def test_packages_folder_map_links_and_disk_agree() -> None:
    assert set(SETUP["packages"]) == set(SETUP["package-dir"])
    for folder in FOLDERS:
        assert SETUP["package-dir"][f"clinifed.{folder}"] == folder
        link = ROOT / "clinifed" / folder
        assert link.is_symlink(), f"clinifed/{folder} must be a link"
        assert link.readlink() == Path("..") / folder
        assert (ROOT / folder / "__init__.py").is_file()
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == {"clinifed", *FOLDERS}
    links = {p.name for p in (ROOT / "clinifed").iterdir() if p.is_symlink()}
    assert links == set(FOLDERS)


def test_folders_are_flat() -> None:
    nested = [p for p in tracked() if p.suffix == ".py" and p.parts[0] in FOLDERS and len(p.parts) > 2]
    assert nested == []


def test_no_file_is_longer_than_the_ceiling() -> None:
    long = {str(p): n for p in tracked() if p.suffix == ".py" and (n := len((ROOT / p).read_text().splitlines())) > 500}
    assert long == {}


def test_tests_mirror_the_folders() -> None:
    mirrored = {p.parts[1] for p in tracked() if p.parts[0] == "tests" and len(p.parts) > 2} - {"e2e", "faults"}
    assert mirrored <= set(FOLDERS)


def test_the_readme_tree_has_one_line_for_each_file() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", readme, re.S)
    assert tree, "README.md lacks its tree"
    listed: set[str] = set()
    folder = ""
    for line in tree[1].splitlines():
        name = line.split()[0] if line.strip() else ""
        if not name:
            continue
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            listed.add(name)
        else:
            listed.add(folder + name)
    shown = {
        str(p)
        for p in tracked()
        if p.suffix in {".py", ".yaml", ".json"}
        and p.parts[0] in {"clinifed", *FOLDERS}
        and p.name != "__init__.py"
        and len(p.parts) == 2
    }
    files = {name for name in listed if not name.endswith("/")}
    assert shown - files == set(), "missing from the README's tree"
    gone = {name for name in files if not (ROOT / name).exists()}
    assert gone == set(), "in the README's tree, not on disk"


FORBIDDEN = [r"/work/", r"https?://[\w.-]*(pypi|pythonhosted|debian|npmjs)\.(org|com)", r"\bfacts page\b"]


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_file_names_a_registry_or_a_machine(pattern: str) -> None:
    found = [
        str(p)
        for p in tracked()
        if p.name != "test_layout.py"
        and (ROOT / p).is_file()
        and p.suffix not in {".safetensors"}
        and re.search(pattern, (ROOT / p).read_text(errors="replace"))
    ]
    assert found == []
