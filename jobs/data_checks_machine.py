"""Checks of the machine: model files, room for the embeddings, memory, GPU, and who may read what."""

import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil

from clinifed.config import Training
from clinifed.data.series import chosen_slices, frames_of
from clinifed.data.volumes import KEY_FRAME
from clinifed.errors import ClinifedError
from clinifed.jobs.data_checks_share import Shared
from clinifed.jobs.data_checks_site import Finding, Level, SiteUnderCheck
from clinifed.models.basis import read_basis
from clinifed.models.shards import LIMIT_BYTES, row_bytes
from clinifed.models.trunk import Projection, build_trunk

__all__ = ["cache_room", "gpu", "memory", "model_files", "permissions"]

_FEATURES = 768  # of ViT-B/16 before its projection, where no model says
_SPARE_BYTES = 1 << 30  # left on the disk for ledger, logs and everybody else
_PROCESS_BYTES = 1 << 30  # of Python, torch and the readers of images, measured about 0.7 GB


def model_files(site: SiteUnderCheck) -> Finding:
    """The base model is loaded, and its weights hash to what was agreed; so does the basis that heads train in."""
    if site.model_ref is None:
        return Finding(
            "WARN",
            ("nobody says which base model: no model_ref in the policy, no federation",),
            "give --federation CONFIG or --contract FILE",
            Shared(("no base model is named",)),
        )
    backbone = site.backbone
    assert backbone is not None
    says = [f"{site.model_ref}: {backbone.parameter_bytes / 1e6:.1f} MB, sha256 {backbone.sha256}"]
    if site.agreed is None:
        says.append("no contract to compare with; the federation's names this hash or the site is refused")
        return Finding("PASS", tuple(says), "", Shared(("base model loads", f"sha256 {backbone.sha256}")))
    if backbone.sha256 != site.agreed.base_model.sha256:
        says.append(f"the contract wants {site.agreed.base_model.sha256}")
        return Finding("FAIL", tuple(says), "install the same weights", Shared(("base model is another one",)))
    if (basis := site.agreed.base_model.basis_sha256) is not None and site.policy is not None:
        if site.policy.basis is None:
            said = (*says, f"the contract's heads train in basis {basis}, and the policy names none")
            remedy = "install its file, and name it under `basis` in the policy"
            return Finding("FAIL", said, remedy, Shared(("no basis is named",)))
        read_basis(site.policy.basis, basis)
        says.append(f"basis {basis}")
    return Finding("PASS", (*says, "as the contract says"), "", Shared(("base model is as the contract says",)))


def _features(site: SiteUnderCheck) -> int:
    """F, the numbers that are kept of one image: what the trunk that trains reads."""
    try:
        backbone = site.backbone
        trunk = None if backbone is None else build_trunk(backbone, site.training or Training())
    except ClinifedError:  # told by its own check
        return _FEATURES
    if isinstance(trunk, Projection):
        return trunk.projection.in_features
    if trunk is not None and trunk.shape:
        return math.prod(trunk.shape)
    linear = None if backbone is None else getattr(getattr(backbone.model.visual, "head", None), "proj", None)
    return int(getattr(linear, "out_features", _FEATURES))


def _rows(site: SiteUnderCheck) -> int:
    """At most: of a file of fewer frames than are wanted all are taken."""
    frames = frames_of(site.vocabulary)
    records = chosen_slices(site.records, frames)
    rows = sum(1 if r.series else frames.get(r.specialty, KEY_FRAME).count for r in records)
    return rows * (site.training.views if site.training else 1)


def cache_room(site: SiteUnderCheck) -> Finding:
    """What the embeddings take, and what the disk has."""
    rows, each = _rows(site), row_bytes(_features(site))
    needed = rows * each
    says = [f"embeddings: {_size(needed)} ({rows:,} rows of {each:,} bytes)"]
    if needed > LIMIT_BYTES:
        says.append(f"the cache keeps at most {_size(LIMIT_BYTES)}; the rest is computed again in every job")
    if site.policy is None:
        return Finding("PASS", (*says, "no policy, so no disk is looked at"), "", Shared(("no disk was looked at",)))
    folder = _existing(site.policy.cache)
    free = shutil.disk_usage(folder).free
    says.append(f"free on the disk of the cache: {_size(free)}")
    level: Level = "PASS"
    if free < min(needed, LIMIT_BYTES) + _SPARE_BYTES or needed > LIMIT_BYTES:
        level = "WARN"
    if free < min(needed, LIMIT_BYTES):
        level = "FAIL"
    if not os.access(folder, os.W_OK | os.X_OK):
        says, level = [*says, "this user cannot write there"], "FAIL"
    remedy = "another disk (`cache` of the policy), or more room" if level != "PASS" else ""
    return Finding(level, tuple(says), remedy, Shared(("the embeddings fit",) if level == "PASS" else ()))


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def memory(site: SiteUnderCheck) -> Finding:
    """Available memory against an estimate: the model, the rows, three batches of pixels, and the process itself."""
    try:
        backbone = site.backbone
    except ClinifedError:
        backbone = None
    batch, side = (
        (site.training.batch_size if site.training else 64),
        (backbone.preprocess.size_px if backbone else 224),
    )
    model = backbone.parameter_bytes if backbone else 0
    needed = _PROCESS_BYTES + 2 * model + _rows(site) * 4 * _features(site) + 3 * batch * 3 * side * side * 4
    free = psutil.virtual_memory().available
    says = (f"about {_size(needed)} needed, {_size(free)} available",)
    if free < needed:
        remedy = "a smaller training.batch_size, a machine with more memory, or fewer processes beside"
        return Finding("WARN", says, remedy, Shared(("memory is short",)))
    return Finding("PASS", says, "", Shared(("memory suffices",)))


def gpu(site: SiteUnderCheck) -> Finding:
    """Whether torch sees a GPU; without one all is done on the CPU."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old, which the answer tells as well
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if _cuda() else []
    if not names:
        return Finding("PASS", (f"none; {os.cpu_count()} CPU cores are used",), "", Shared(("no GPU",)))
    return Finding("PASS", (", ".join(names),), "", Shared(("GPU present",)))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def permissions(site: SiteUnderCheck) -> Finding:
    """Files that name, key or count patients are their owner's alone."""
    open_to_others, foreign, missing = [], [], []
    for what, path, needed in _private(site):
        if not path.exists():
            missing += [what] if needed else []
            continue
        state = path.stat()
        if state.st_mode & 0o077:
            open_to_others.append(f"{what} ({path}, mode {state.st_mode & 0o777:o})")
        if state.st_uid != os.getuid():
            foreign.append(f"{what} ({path})")
    says = [f"others may read or enter: {text}" for text in open_to_others]
    says += [f"belongs to another user: {text}" for text in foreign]
    says += [f"missing: {what}" for what in missing]
    words = [
        *(["others may read what is private"] if open_to_others else []),
        *(f"missing: {what}" for what in missing),
    ]
    if open_to_others or missing:
        remedy = "chmod 600 for files, 700 for folders" if open_to_others else "see `clinifed data index`, `privacy`"
        return Finding("FAIL", tuple(says), remedy, Shared(tuple(words)))
    if foreign:
        return Finding("WARN", tuple(says), "run as the owner, or chown", Shared(("some files are another user's",)))
    return Finding("PASS", ("all private files are their owner's alone",), "", Shared(("owner-only",)))


def _private(site: SiteUnderCheck) -> Iterator[tuple[str, Path, bool]]:
    """(what, where, whether it must be there)."""
    yield "manifest", site.manifest_path, True
    yield "manifest's meta file", site.manifest_path.with_suffix(".meta.json"), True
    yield "site.key", site.manifest_path.parent / "site.key", False
    if site.policy is None:
        return
    yield "signing key", site.policy.signing_key, True
    yield "ledger", site.policy.ledger, True
    yield "outbox", site.policy.outbox_folder, False
    yield "cohorts", site.policy.cohorts_folder, False
    yield "embedding cache", site.policy.cache, False
    yield "diary", site.policy.diary, False
    yield "log", site.policy.log, False


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
