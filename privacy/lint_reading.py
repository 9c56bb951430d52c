"""Configuration files as flat lists of settings, as they stand: a wrong setting may be in nobody's schema.

A key gives a setting, and so does what hides in a value: the options of a script's command line, and the last part of
a class path. A job's Python code gives its calls, keyword arguments, imports and literal assignments. Names are
compared in one spelling, ``lower_snake_case``.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from clinifed.config import Federation
from clinifed.errors import ConfigError
from clinifed.policy import POLICY_FOLDER

__all__ = ["Document", "Kind", "Setting", "read_documents", "snake"]

Kind = Literal[
    "federation", "contract", "client", "server", "meta", "scopes", "resources", "policy", "code", "extra", "other"
]

# Under these keys of our own files come names that people choose (labels, prompts, CSV columns, tensors, officers).
_FREE = {"specialties", "labels", "columns", "values", "where", "shapes", "officers"}
_OURS: tuple[Kind, ...] = ("federation", "contract", "policy")


@dataclass(frozen=True)
class Setting:
    """One setting of a document."""

    key: str  # dotted, as a person finds it in the file; for code, its line
    name: str  # of the last part, in lower_snake_case
    value: Any


@dataclass(frozen=True)
class Document:
    """One file, or one contract inside a FLARE configuration."""

    path: Path
    kind: Kind
    content: Any
    settings: tuple[Setting, ...]
    prefix: str = ""  # the key at which the content stands in the file
    lacks_scopes: bool = False  # a site's policy, without FLARE's privacy.json beside its folder


def snake(text: str) -> str:
    """``SVTPrivacy``, ``noise-seed``, ``NUM_STEPS`` → ``svt_privacy``, ``noise_seed``, ``num_steps``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", text).replace("-", "_").lower()


def _values(key: str, value: str) -> Iterator[Setting]:
    """The settings that a text hides."""
    if re.search(r"(^|\s)--\w", value):
        try:
            words = shlex.split(value)
        except ValueError:  # an unbalanced quotation mark
            words = value.split()
        for word, following in zip(words, [*words[1:], "--"], strict=True):
            if word.startswith("--"):
                option, separator, given = word[2:].partition("=")
                setting: Any = given if separator else True if following.startswith("--") else following
                yield Setting(f"{key} --{option}", snake(option), setting)
    elif re.fullmatch(r"\w+(\.\w+)*", value) and ("." in value or value != value.lower()):
        yield Setting(key, snake(value.rpartition(".")[2]), value)


def _flatten(node: Any, key: str, ours: bool) -> Iterator[Setting]:
    parts = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for part, value in parts:
        inner = f"{key}[{part}]" if isinstance(part, int) and not isinstance(node, Mapping) else f"{key}.{part}"
        inner = inner.removeprefix(".")
        if ours and part in _FREE:
            continue
        chosen = ours and re.search(r"(^|\.)sites$", key)  # a site's name is no setting
        if isinstance(part, str) and not chosen:
            yield Setting(inner, snake(part), value)
        if isinstance(value, str):
            yield from _values(inner, value)
        yield from _flatten(value, inner, ours)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _literal(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else ast.unparse(node)


def _code(tree: ast.Module) -> Iterator[Setting]:
    """What a program calls, passes, imports, sets and compares with a round number."""
    for node in ast.walk(tree):
        found: list[tuple[Any, Any]] = []
        if isinstance(node, ast.Call):
            found = [(_name(node.func), ast.unparse(node)[:80])]
            found += [(word.arg, _literal(word.value)) for word in node.keywords if word.arg]
            found += [
                (str(a.value)[2:], True)
                for a in node.args
                if isinstance(a, ast.Constant) and str(a.value).startswith("--")
            ]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found = [(alias.name.rpartition(".")[2], "imported") for alias in node.names]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found = [(_name(target), node.value.value) for target in node.targets]
        elif isinstance(node, ast.Dict):
            keys = [(k, v) for k, v in zip(node.keys, node.values, strict=True) if k is not None]
            found = [(k.value if isinstance(k, ast.Constant) else _name(k), _literal(v)) for k, v in keys]
        elif isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant):
            found = [("compares_round", ast.unparse(node))] if "round" in _name(node.left).lower() else []
        for name, value in found:
            if isinstance(name, str) and name:
                yield Setting(f"line {getattr(node, 'lineno', 0)}: {name}", snake(name), value)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice)} stands there twice, and readers differ on which one counts")
    return content


def _kind(path: Path, content: Any) -> Kind:
    keys = set(content) if isinstance(content, Mapping) else set()
    policy = path.parent.name == POLICY_FOLDER and {"site", "ledger", "budget"} & keys
    kinds: tuple[tuple[Kind, Any], ...] = (
        ("contract", "promise" in keys),
        ("scopes", "scopes" in keys or path.name.startswith("privacy.json")),
        ("client", "executors" in keys or path.name.startswith("config_fed_client")),
        ("server", "workflows" in keys or path.name.startswith("config_fed_server")),
        ("meta", "deploy_map" in keys or path.name.startswith("meta.json")),
        ("resources", "class_allow_list" in keys or path.name.startswith("resources.json")),
        ("policy", policy or {"site", "ledger", "manifest", "budget"} <= keys),
        ("federation", ".y" in path.name and len(keys & set(Federation.model_fields)) >= 3),
    )
    return next((kind for kind, fits in kinds if fits), "other")


def _contracts(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The contracts inside a FLARE configuration, with their keys; they are taken out of ``content``."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for part, value in list(parts):
        inner = (f"{key}[{part}]" if isinstance(content, list) else f"{key}.{part}").removeprefix(".")
        if isinstance(value, str) and value.startswith("{") and '"promise"' in value:
            value = json.loads(value, object_pairs_hook=_unique)  # as it travels in our jobs
        if isinstance(value, dict) and "promise" in value:
            content[part] = None
            yield inner, value
        else:
            yield from _contracts(value, inner)


def _document(path: Path, kind: Kind, content: Any, prefix: str = "", lacks_scopes: bool = False) -> Document:
    settings = tuple(_code(content)) if kind == "code" else tuple(_flatten(content, prefix, kind in _OURS))
    return Document(path, kind, content, settings, prefix, lacks_scopes)


def _parse(path: Path) -> Any:
    """The content of a file; None for an empty one. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            return ast.parse(text)
        if ".json" in path.name:
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a YAML or JSON file, or a folder"
        ) from error
    except (yaml.YAMLError, ValueError, SyntaxError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid, so nothing can be said of it: {error}; mend the file") from error


def _read(path: Path, in_job: bool) -> Iterator[Document]:
    """The documents of one file of a folder; none, if it is no configuration."""
    name = path.name.removesuffix(".default")  # FLARE takes the defaults where there is no other file
    if name.endswith(".conf"):
        raise ConfigError(f"{path}: HOCON cannot be checked here; write the same as JSON, which FLARE reads as well")
    if name.endswith((".json", ".yaml", ".yml")):
        content = _parse(path)
        kind = _kind(path, content)
        try:
            inner = list(_contracts(content)) if kind in ("client", "server") else []
        except ValueError as error:
            raise ConfigError(f"{path}: a contract in it is not valid JSON: {error}; make the job anew") from error
        lacks = (
            kind == "policy" and path.parent.name == POLICY_FOLDER and not (path.parents[1] / "privacy.json").exists()
        )
        yield _document(path, kind, content, lacks_scopes=lacks)
        for prefix, contract in inner:
            yield _document(path, "contract", contract, prefix)
    elif in_job:
        yield Document(path, "extra", None, ())
        if name.endswith(".py"):
            yield _document(path, "code", _parse(path))


def read_documents(path: Path) -> list[Document]:
    """Every document of a YAML or JSON file, or of a folder of them.

    Raises:
        ConfigError: with every file that cannot be read or is not valid; or there is nothing to read.
    """
    if not path.exists():
        raise ConfigError(f"{path}: not there; give a YAML or JSON file, or a folder")
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    jobs = {file.parent for file in files if file.name == "meta.json"}
    documents: list[Document] = []
    problems: list[str] = []
    for file in files:
        in_job = "custom" in file.relative_to(path).parts or any(job in file.parents for job in jobs)
        try:
            documents += _read(file, in_job)
        except ConfigError as error:
            problems += error.problems
        except RecursionError:
            problems.append(f"{file}: nested without end; mend the file")
    if not documents and not problems:
        problems.append(f"{path}: no YAML or JSON here to check; give a configuration, or a folder of some")
    if problems:
        raise ConfigError(*problems)
    return documents
