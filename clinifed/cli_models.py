"""``clinifed models``: base models as directories that need no network."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

__all__ = ["add_models_verbs"]


class _Console(Protocol):
    def progress(self, text: str) -> None: ...
    def result(self, content: Any, *tables: Any) -> None: ...


def _fetch(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.models.backbone import BIOMEDCLIP
    from clinifed.models.hub import fetch_mirror

    ref = args.ref or BIOMEDCLIP
    console.progress(f"fetching {ref}")
    mirror = fetch_mirror(ref, args.out, args.revision, args.text_revision)
    console.result(
        {"out": str(args.out), **mirror.to_dict()},
        f"{mirror.model.repository} at {mirror.model.revision}",
        *(
            f"{what} from {source.repository} at {source.revision}"
            for what, source in (("text tower's configuration", mirror.text), ("tokenizer", mirror.tokenizer))
            if source is not None and source != mirror.model
        ),
        f"{len(mirror.files)} files, {sum(size for size, _ in mirror.files.values()) / 1e6:.1f} MB, weights "
        f"{mirror.state_sha256}",
        f"use it as model.ref: local-dir:{args.out.absolute()}",
    )


def _verify(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.models.mirror import check_mirror
    from clinifed.models.model_files import ModelFiles
    from clinifed.models.specialties import SPECIALTIES
    from clinifed.models.tokenizer import load_tokenizer, prompt_problems

    mirror = check_mirror(args.folder)
    tokenizer = load_tokenizer(ModelFiles(f"local-dir:{args.folder}", args.folder.absolute()))
    problems = {
        name: prompt_problems(tokenizer, [text for texts in specialty.labels.values() for text in texts])
        for name, specialty in SPECIALTIES.items()
    }
    console.result(
        {"folder": str(args.folder), **mirror.to_dict(), "prompt_problems": problems},
        f"{len(mirror.files)} files are those of {mirror.model.repository} at {mirror.model.revision}",
        f"its tokenizer knows every prompt of {', '.join(name for name, found in problems.items() if not found)}",
        *(f"{name}: {problem}" for name, found in problems.items() for problem in found),
    )


def add_models_verbs(verbs: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``fetch`` and ``verify`` to the verbs of ``clinifed models``."""
    fetch = verb("fetch", _fetch, "mirror a model of the Hugging Face hub, at one commit, into a directory", verbs)
    fetch.add_argument("ref", nargs="?", help="hf-hub:OWNER/NAME, with @COMMIT if you like (default: BiomedCLIP)")
    fetch.add_argument("--out", type=Path, required=True, help="directory to make")
    fetch.add_argument("--revision", metavar="COMMIT", help="the model's commit (default: the newest, recorded)")
    fetch.add_argument(
        "--text-revision", metavar="COMMIT", help="commit of the repository with the text tower's configuration"
    )
    verify = verb("verify", _verify, "compare a mirror with its mirror.json, and test its tokenizer", verbs)
    verify.add_argument("folder", type=Path, metavar="DIR")
