"""Mirrors of models on the Hugging Face hub: one commit, a closed list of files, each compared with the hub's listing.

BiomedCLIP's configuration names a second repository, from which open_clip would fetch the architecture of the text
tower whenever it is loaded; its configuration is mirrored too, so that the directory needs no network.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from clinifed.errors import ModelError
from clinifed.files import file_sha256
from clinifed.models.mirror import Mirror, Source, listing, write_mirror
from clinifed.models.model_files import CONFIG, MIRROR, PICKLES, TEXT_CONFIG, WEIGHTS, ModelFiles, text_cfg
from clinifed.models.tokenizer import load_tokenizer
from clinifed.models.tower import load_tower

__all__ = ["cached_mirror", "fetch_mirror"]

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0  # for an answer about a repository; weights take as long as they take
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_REPOSITORY = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "added_tokens.json")
_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")


@dataclass(frozen=True)
class _File:
    """What the hub says of one file at one commit."""

    size: int
    sha256: str | None  # of large files
    blob: str  # git's name of small ones: SHA-1 of "blob SIZE\0" and the content

    def is_in(self, path: Path) -> bool:
        """Whether ``path`` holds these bytes."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return file_sha256(path) == self.sha256
        content = path.read_bytes()
        return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == self.blob


@dataclass(frozen=True)
class _Repository:
    """One repository at one commit, and all of its files."""

    api: HfApi
    source: Source
    files: Mapping[str, _File]

    def fetch(self, name: str, target: Path) -> None:
        """Put one file at ``target``. Raises ModelError where what came is not what the hub lists."""
        staging = target.parent / f".{target.name}.fetched"
        try:
            path = self.api.hf_hub_download(
                self.source.repository, name, revision=self.source.revision, local_dir=staging
            )
        except Exception as error:  # huggingface_hub and its HTTP client each raise their own kinds
            raise _unreachable(self.source.repository, error) from error
        if not self.files[name].is_in(Path(path)):
            raise ModelError(
                f"hf-hub:{self.source.repository}: {name} at {self.source.revision} is not what the hub lists "
                f"({self.files[name].size} bytes); it changed on the way, and nothing was kept"
            )
        Path(path).replace(target)
        shutil.rmtree(staging)


def fetch_mirror(ref: str, out: Path, revision: str | None = None, text_revision: str | None = None) -> Mirror:
    """Mirror a model of the hub into ``out``, so that ``local-dir:OUT`` loads without a network.

    Args:
        ref: ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION``.
        out: directory to make.
        revision: commit; default: the newest one, which is recorded.
        text_revision: commit of the repository of the text tower's configuration, likewise.

    Guarantees:
        - Only files of a closed list are fetched, and none of them is pickled.
        - Every file is what the hub lists at that commit, or nothing is left behind.
        - The mirror was loaded once, with its tokenizer, before it got its name.

    Raises:
        ModelError: the reference is wrong, the hub cannot be reached or lacks something, or a file changed on the way.
    """
    name, pinned = _parts(ref)
    if pinned and revision and pinned != revision:
        raise ModelError(f"{ref}: names one revision, and --revision {revision} another; say it once")
    wrong = [text for text in (revision or pinned, text_revision) if text and not _COMMIT.match(text)]
    if wrong:
        raise ModelError(
            *(
                f"{ref}: revision {text!r} is no commit; a branch or a tag moves, so say the commit it is at "
                "(40 hexadecimal digits), or none for the newest"
                for text in wrong
            )
        )
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: is there already; a mirror is made in a directory of its own")
    repository = _repository(name, revision or pinned)
    weights = _weights(repository)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        mirror = _fill(partial, repository, weights, text_revision)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return mirror


def cached_mirror(ref: str) -> ModelFiles:
    """The mirror of ``hf-hub:OWNER/NAME@REVISION`` in the hub's own cache, made where it is absent.

    Without a revision the hub is asked for the newest commit, and the reference that is returned names it.

    Raises:
        ModelError: as :func:`fetch_mirror`.
    """
    name, revision = _parts(ref)
    revision = revision or _repository(name, None).source.revision
    pinned = f"hf-hub:{name}@{revision}"
    root = Path(constants.HF_HOME) / "clinifed" / f"{name.replace('/', '--')}@{revision}"
    if not (root / MIRROR).is_file():
        log.info("%s is fetched into %s", pinned, root)
        fetch_mirror(pinned, root)
    return ModelFiles(pinned, root)


def _parts(ref: str) -> tuple[str, str | None]:
    name, _, revision = ref.removeprefix("hf-hub:").partition("@")
    if not ref.startswith("hf-hub:") or not _REPOSITORY.match(name):
        raise ModelError(f"{ref!r}: no model of the hub; say 'hf-hub:OWNER/NAME', or 'hf-hub:OWNER/NAME@COMMIT'")
    return name, revision or None


def _repository(name: str, revision: str | None) -> _Repository:
    """What the hub lists of a repository. One short question, so that a missing network is known at once."""
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
        raise _unreachable(name, OSError("HF_HUB_OFFLINE is set"))
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    try:
        info: Any = api.model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    except RevisionNotFoundError as error:
        raise ModelError(f"hf-hub:{name}: has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"hf-hub:{name}: no such repository, or a private one (set HF_TOKEN)") from error
    except Exception as error:
        raise _unreachable(name, error) from error
    if not _COMMIT.match(info.sha or "") or (revision and info.sha != revision):
        raise ModelError(f"hf-hub:{name}: asked for {revision or 'the newest commit'}, the hub gave {info.sha!r}")
    files = {
        entry.rfilename: _File(int(entry.size or 0), entry.lfs.sha256 if entry.lfs else None, str(entry.blob_id))
        for entry in info.siblings or ()
    }
    return _Repository(api, Source(name, info.sha), files)


def _unreachable(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"hf-hub:{name} could not be fetched ({type(error).__name__}: {error}). Without internet, mirror the model "
        f"to a directory where there is one (`clinifed models fetch hf-hub:{name} --out DIR`), and use 'local-dir:DIR'"
    )


def _weights(repository: _Repository) -> str:
    """The file of weights; only safetensors count."""
    for name in WEIGHTS:
        if name in repository.files:
            return name
    pickles = sorted(name for name in repository.files if name.endswith(PICKLES))
    source = repository.source
    there = (
        f"it has {', '.join(pickles)}, which is pickled: it may run anything, and is not fetched. " if pickles else ""
    )
    raise ModelError(
        f"hf-hub:{source.repository}: no {' or '.join(WEIGHTS)} at {source.revision}; {there}Name a revision that has "
        "one (a conversion's pull request has a commit of its own), or a directory of your own with 'local-dir:DIR'"
    )


def _fill(folder: Path, repository: _Repository, weights: str, text_revision: str | None) -> Mirror:
    """Fetch everything into ``folder``, load it once, and describe it."""
    if CONFIG not in repository.files:
        raise ModelError(f"hf-hub:{repository.source.repository}: no {CONFIG} at {repository.source.revision}")
    others = [name for name in _LICENSES if name in repository.files]
    for name in (CONFIG, *others):
        repository.fetch(name, folder / name)
    said = text_cfg(folder / CONFIG)
    text = _text_repository(said, repository, text_revision)
    if text is not None:
        (folder / "text").mkdir()
        found = TEXT_CONFIG if text is repository else "config.json"
        if found not in text.files:
            raise ModelError(f"hf-hub:{text.source.repository}: no {found} at {text.source.revision}")
        text.fetch(found, folder / TEXT_CONFIG)
    tokenizer = _tokenizer_repository(said, repository, text)
    for name in _TOKENIZER:
        if name in tokenizer.files:
            tokenizer.fetch(name, folder / name)
    if tokenizer is text and tokenizer is not repository and "config.json" in tokenizer.files:
        # Old tokenizers do not name their class; transformers takes it from the configuration beside them.
        shutil.copyfile(folder / TEXT_CONFIG, folder / "config.json")
    repository.fetch(weights, folder / weights)
    files = ModelFiles(f"hf-hub:{repository.source.repository}@{repository.source.revision}", folder)
    load_tokenizer(files)
    mirror = Mirror(
        model=repository.source,
        text=None if text is None or text is repository else text.source,
        tokenizer=tokenizer.source,
        state_sha256=load_tower(files, text=False).sha256,
        files=listing(folder),
    )
    write_mirror(folder, mirror)
    return mirror


def _text_repository(said: Mapping[str, Any], model: _Repository, revision: str | None) -> _Repository | None:
    """Where the text tower's configuration is; None where the architecture is open_clip's own."""
    if "hf_model_name" not in said:
        return None
    if TEXT_CONFIG in model.files:
        return model
    name = str(said["hf_model_name"])
    if not _REPOSITORY.match(name):
        raise ModelError(
            f"hf-hub:{model.source.repository}: {CONFIG} takes its text tower from {name!r}, which is no repository"
        )
    return _repository(name, revision)


def _tokenizer_repository(said: Mapping[str, Any], model: _Repository, text: _Repository | None) -> _Repository:
    """The model's own repository where it has a tokenizer, else the one that its configuration names."""
    name = str(said.get("hf_tokenizer_name", ""))
    if not name or any(file in model.files for file in ("tokenizer.json", "vocab.txt")):
        return model
    if text is not None and text.source.repository == name:
        return text
    return _repository(name, None)
