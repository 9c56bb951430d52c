"""Read a federation's YAML: every problem at once, each with file, key, value and the nearest valid key."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from clinifed.config import Federation
from clinifed.errors import ConfigError

__all__ = ["load_federation", "read_yaml", "validate"]

_M = TypeVar("_M", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in ``path``. Raises ConfigError where there is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def _override(content: dict[str, Any], setting: str) -> None:
    """Apply one ``key.sub=value`` to ``content``; the value is read as YAML."""
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {setting!r}: write it as key=value, for example --set rounds=3")
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {setting!r}: {parent!r} is {child!r}, not a group of settings")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not valid YAML: {error}") from error


def _fields_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Names of the settings beside the one at ``loc``, for a suggestion."""
    node: Any = model
    for part in loc[:-1]:
        if isinstance(node, type) and issubclass(node, BaseModel):
            field = node.model_fields.get(str(part))
            node = field.annotation if field else None
        else:  # dict[str, Model] or Model | None: look inside
            pass
        arguments = [a for a in getattr(node, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        if arguments and not (isinstance(node, type) and issubclass(node, BaseModel)):
            inner = arguments[0]
            # a dict consumes one more part of the location (its key); an optional does not
            node = inner if getattr(node, "__origin__", None) is not dict else _Keyed(inner)
        elif isinstance(node, _Keyed):
            node = node.model
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


class _Keyed:
    """A mapping from free names to ``model``, one step before ``model`` itself."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model


def _problem(source: str, model: type[BaseModel], error: Mapping[str, Any]) -> str:
    """One line for one pydantic error."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _fields_at(model, error["loc"]), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "remove it"
        return f"{source}: {key}: unknown key (value {error['input']!r}); {hint}"
    if error["type"] == "missing":
        return f"{source}: {key}: missing; this key is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not key:  # a rule over several keys names them itself
        return "\n".join(f"{source}: {line}" for line in message.splitlines())
    return f"{source}: {key}: {message} (value {error['input']!r})"


def validate(model: type[_M], content: Mapping[str, Any], source: str) -> _M:
    """``content`` as ``model``.

    Raises:
        ConfigError: with one line per problem.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [_problem(source, model, dict(e)) for e in error.errors(include_url=False)]
        raise ConfigError(*(line for text in lines for line in text.splitlines())) from None


def load_federation(path: Path, overrides: Sequence[str] = ()) -> Federation:
    """The federation in ``path``, with ``key=value`` overrides applied; relative paths count from
    ``data.root``, and that from the file.

    Raises:
        ConfigError: with every problem found.
    """
    content = read_yaml(path)
    for setting in overrides:
        _override(content, setting)
    return _absolute(validate(Federation, content, str(path)), path.resolve().parent)


def _absolute(federation: Federation, folder: Path) -> Federation:
    """The same federation with every relative path made absolute, by ``data.root`` and the YAML's ``folder``."""
    base = (folder / federation.data.root.expanduser()).resolve()

    def walk(value: Any) -> Any:
        if isinstance(value, BaseModel):
            changed = {name: walk(getattr(value, name)) for name in type(value).model_fields}
            return value.model_copy(update=changed)
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(walk(v) for v in value)
        if isinstance(value, Path):
            return base if value == federation.data.root else (base / value.expanduser()).resolve()
        return value

    absolute = walk(federation)
    assert isinstance(absolute, Federation)
    return absolute
