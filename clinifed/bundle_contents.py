"""What is inside a bundle, as its own files tell it: figures and lineage, of any shape, taken from nobody's word.

A bundle may come from a stranger, an older or a newer version. So whatever is missing or of another shape is None
("not stated") and never an error.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from clinifed.bundle import LOCAL, Contents
from clinifed.bundle_files import shown
from clinifed.bundle_signed import MAX_JSON_BYTES, parse_object
from clinifed.errors import BundleError

__all__ = ["describe", "told"]

_ENGINES = (".engine", ".plan")
_FIGURES = ("cosine_mean", "cosine_min", "logits_max_abs", "top1_agreement")
_CLAIM = ("epsilon", "delta", "unit", "relation", "scope", "ledger_head")
_ABSENT = "not stated"


def _at(content: Any, *path: str) -> Any:
    """What stands at ``path`` in nested objects, or None."""
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _objects(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of an object that are objects themselves."""
    if isinstance(content, Mapping):
        yield from ((str(name), entry) for name, entry in content.items() if isinstance(entry, Mapping))


def _json(contents: Contents, name: str) -> Mapping[str, Any]:
    """A JSON object of the bundle; empty where there is none.

    Raises:
        BundleError: the file was changed after the bundle was checked.
    """
    entry = contents.files.get(name)
    if entry is None or entry.bytes > MAX_JSON_BYTES:
        return {}
    content = contents.read(name)
    try:
        return parse_object(content, name)
    except BundleError:
        return {}


def _precisions(parity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {
            **{key: _at(row, key) for key in ("packed", "onnx_bytes", "runtime", "no_engine")},
            **{figure: _at(row, "parity", figure) for figure in _FIGURES},
        }
        for name, row in _objects(_at(parity, "precisions"))
    }


def _sites(card: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "specialties": _at(site, "specialties"),
            "rounds_accepted": _at(site, "rounds_accepted"),
            **{key: _at(site, "privacy", key) for key in _CLAIM},
        }
        for name, site in _objects(_at(card, "sites"))
    }


def describe(contents: Contents) -> dict[str, Any]:
    """What a bundle says of itself, as JSON values; only sizes, hashes, ``verified`` and keys are our own findings.

    Raises:
        BundleError: a file was changed after the bundle was checked.
    """
    manifest = contents.manifest
    card, parity = _json(contents, "card.json"), _json(contents, "parity.json")
    lineage = _at(manifest, "lineage")
    source = {**card, **(lineage if isinstance(lineage, Mapping) else {})}
    names = _at(source, "specialties")
    return {
        "verified": not contents.unvouched,
        "key": contents.key,
        "unvouched": list(contents.unvouched),
        "manifest_sha256": contents.manifest_sha256,
        "exportable": contents.exportable,
        "reasons": list(contents.reasons),
        "files": {name: entry.bytes for name, entry in contents.files.items()},
        "precisions": _precisions(parity),
        "engines": {name: entry.bytes for name, entry in contents.files.items() if name.endswith(_ENGINES)},
        "profile": _at(manifest, "profile"),
        "test": _at(parity, "test"),
        "lineage": {
            **{key: _at(source, key) for key in ("federation", "job", "rounds", "contract_sha256")},
            "base_model": _at(source, "base_model"),
            "specialties": list(names) if isinstance(names, Mapping | list) else None,
            "heads": _at(manifest, "heads"),
            "sites": _sites(source),
        },
        "calibration": _at(manifest, "calibration"),
        "tools": _at(manifest, "tools"),
        LOCAL: {
            model: {
                "key": engine.key,
                "onnx": engine.onnx,
                "files": {name: entry.bytes for name, entry in engine.files.items()},
            }
            for model, engine in contents.local.items()
        },
    }


def _text(value: Any, limit: int = 100) -> str:
    """Any value as one line for a terminal."""
    if value is None:
        return _ABSENT
    if isinstance(value, Mapping):
        return shown(", ".join(f"{k} {_text(v, limit)}" for k, v in value.items()), limit) or "none"
    if isinstance(value, list):
        return shown(", ".join(_text(v, limit) for v in value), limit) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return shown(f"{value:.6g}" if isinstance(value, float) else value, limit)


def _size(value: Any) -> str:
    return f"{value / 1e6:.2f} MB" if isinstance(value, int) else _text(value)


def _epsilon(site: Mapping[str, Any]) -> str:
    relation = str(site["relation"] or "").replace("_", "/")
    return (
        f"epsilon {_text(site['epsilon'])} per {_text(site['unit'])} ({_text(relation or None)}, delta "
        f"{_text(site['delta'])}, {_text(site['scope'])})"
    )


def told(found: Mapping[str, Any]) -> list[str]:
    """What :func:`describe` found, in lines for people; the first says whether anybody vouches for the rest."""
    lines = ["VERIFIED" if found["verified"] else "NOT VERIFIED"]
    lines += [f"signed by     {found['key']}"] if found["key"] else []
    lines += [f"  {_text(reason, 300)}" for reason in found["unvouched"]]
    total = sum(found["files"].values())
    lines += [
        f"files         {len(found['files'])}, {_size(total)}, each as the manifest says",
        "exportable    yes" if found["exportable"] else "exportable    NO",
        *(f"  {_text(reason, 300)}" for reason in found["reasons"]),
    ]
    for name, row in found["precisions"].items():
        figures = ", ".join(f"{figure} {_text(row[figure])}" for figure in _FIGURES)
        packed = {True: _size(row["onnx_bytes"]), False: "not packed"}.get(row["packed"], _ABSENT)
        lines.append(f"precision     {_text(name)}: {packed}; {figures}; measured through {_text(row['runtime'])}")
        if row["no_engine"]:
            lines.append(f"  no engine   {_text(row['no_engine'], 300)}")
    lines += [f"engine        {name}, {_size(size)}" for name, size in found["engines"].items()]
    lineage = found["lineage"]
    lines += [
        f"base model    {_text(lineage['base_model'])}",
        f"federation    {_text(lineage['federation'])}, {_text(lineage['rounds'])} rounds, job {_text(lineage['job'])}",
        f"specialties   {_text(lineage['specialties'])}; heads: {_text(lineage['heads'])}",
    ]
    lines += [f"site          {_text(name)}: {_epsilon(site)}" for name, site in lineage["sites"].items()]
    lines += [
        f"calibration   {_text(found['calibration'], 300)}",
        f"test set      {_text(found['test'], 300)}",
        f"profile       {_text(found['profile'])}",
        f"tools         {_text(found['tools'], 600)}",
    ]
    for model, engine in found[LOCAL].items():
        total = sum(engine["files"].values())
        lines.append(
            f"local engine  {model}: {_size(total)} from {engine['onnx']}; key {engine['key'] or 'unknown: not judged'}"
        )
    return lines
