"""Checks a source file's use of a TensorRT package against the package itself, without running the file.

``python calls.py MODULE FILE…`` prints JSON: ``problems``, and ``skipped``, the places that this package never reaches
because the file asks first (``hasattr``).

What it knows: ``trt`` is the package, by name; parameters, results and variables annotated ``trt.<Class>`` are objects
of that class; and pybind11 writes into each docstring what a call takes and returns. From there it follows every
attribute, method, enum member, number and name of arguments, assignment to a property, and method of a subclass.
"""

import ast
import enum
import importlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SIGNATURE = re.compile(r"^(?:\d+\. )?(?P<name>\w*)\((?P<parameters>.*)\) -> (?P<result>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Thing:
    """What is known of an expression's value."""

    kind: str  # package, class, object, function
    value: Any  # the package, the class, the object's class, or the function
    bound: bool = False


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    optional: bool


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, sign in enumerate(text):
        depth += (sign in "[(<") - (sign in "])>")
        if sign == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def signatures(function: Any) -> list[tuple[list[Parameter], str]]:
    """Every overload that the docstring names: parameters, ``self`` included, and the result's type."""
    found = []
    for match in _SIGNATURE.finditer(function.__doc__ or ""):
        if match["parameters"] == "*args, **kwargs":
            continue
        parameters = []
        for part in _split(match["parameters"]):
            name, _, rest = part.partition(":")
            kind, equals, _ = rest.partition(" = ")
            parameters.append(Parameter(name.strip(), kind.strip(), bool(equals)))
        found.append((parameters, match["result"].strip()))
    return found


@dataclass
class Checker:
    """One file against one package."""

    package: Any
    path: str
    problems: list[str] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)
    functions: dict[str, str] = field(default_factory=dict)  # the file's own → the class that it returns

    def __post_init__(self) -> None:
        classes = [value for value in vars(self.package).values() if isinstance(value, type)]
        self.vocabulary = {name for one in classes for name in dir(one) if "_" in name.strip("_")}

    def run(self, tree: ast.Module) -> list[str]:
        """Check the whole file; returns the places that were not reached."""
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (name := self._annotation(node.returns)):
                self.functions[node.name] = name
        self.block(tree.body, {})
        notes = [getattr(node, part, None) for node in ast.walk(tree) for part in ("annotation", "returns")]
        beside = {inner for note in notes if note for inner in ast.walk(note)}
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node not in beside]
        return [f"{Path(self.path).name}:{n.lineno} {n.attr}" for n in attributes if self._place(n) not in self.seen]

    def report(self, node: ast.AST, problem: str) -> None:
        self.problems.append(f"{Path(self.path).name}:{node.lineno}: {problem}")  # type: ignore[attr-defined]

    def _place(self, node: ast.Attribute) -> tuple[int, int]:
        return (node.end_lineno or 0, node.end_col_offset or 0)

    # Statements.

    def block(self, body: list[ast.stmt], names: dict[str, Thing]) -> bool:
        """Returns whether the block is left early, so that what follows it is not reached."""
        return any(self.statement(statement, names) for statement in body)

    def statement(self, node: ast.stmt, names: dict[str, Thing]) -> bool:
        match node:
            case ast.FunctionDef():
                own = dict(names)
                for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                    own.pop(argument.arg, None)
                    if cls := self._annotation(argument.annotation):
                        self._bind(own, argument.arg, argument, cls)
                for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d)):
                    self.value(default, names)
                for decorator in node.decorator_list:
                    self.value(decorator, names)
                self.block(node.body, own)
                return False
            case ast.ClassDef():
                for base in node.bases:
                    known = self.value(base, names)
                    if known and known.kind == "class":
                        self._subclass(node, known.value)
                self.block(node.body, dict(names))
                return False
            case ast.If():
                return self._if(node, names)
            case ast.Assign():
                value = self.value(node.value, names)
                for target in node.targets:
                    self._assign(target, value, names)
                return False
            case ast.AnnAssign():
                value = self.value(node.value, names) if node.value else None
                if isinstance(node.target, ast.Name) and (cls := self._annotation(node.annotation)):
                    self._bind(names, node.target.id, node, cls)
                else:
                    self._assign(node.target, value, names)
                return False
            case ast.Return() | ast.Raise() | ast.Continue() | ast.Break():
                self._children(node, names)
                return True
            case _:
                self._children(node, names)
                return False

    def _if(self, node: ast.If, names: dict[str, Thing]) -> bool:
        known = self._truth(node.test, names)
        self.value(node.test, names)
        if known is None:
            left = self.block(node.body, names)
            return self.block(node.orelse, names) and left
        return self.block(node.body if known else node.orelse, names)

    def _truth(self, node: ast.expr, names: dict[str, Thing]) -> bool | None:
        """What ``hasattr`` says in this package; None where that does not decide."""
        match node:
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                known = self._truth(inner, names)
                return None if known is None else not known
            case ast.BoolOp(op=ast.And(), values=values):
                return False if any(self._truth(value, names) is False for value in values) else None
            case ast.Call(func=ast.Name(id="hasattr"), args=[thing, ast.Constant(value=str(name))]):
                of = self.value(thing, names)
                return None if of is None or of.kind == "function" else hasattr(of.value, name)
        return None

    def _assign(self, target: ast.expr, value: Thing | None, names: dict[str, Thing]) -> None:
        if isinstance(target, ast.Name):
            names.pop(target.id, None)
            if value is not None:
                names[target.id] = value
        elif isinstance(target, ast.Attribute):
            self.value(target, names)
            owner = self.value(target.value, names)
            if owner and owner.kind == "object":
                slot = getattr(owner.value, target.attr, None)
                if isinstance(slot, property) and slot.fset is None:
                    self.report(target, f"{owner.value.__name__}.{target.attr} cannot be assigned")
        else:
            self._children(target, names)

    def _subclass(self, node: ast.ClassDef, base: type) -> None:
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                slot = getattr(base, method.name, None)
                if slot is None:
                    self.report(method, f"{base.__name__} has no {method.name} to override")
                    continue
                counts = {len(parameters) for parameters, _ in signatures(slot)}
                if counts and len(method.args.args) not in counts:
                    self.report(method, f"{base.__name__}.{method.name} takes {counts} arguments, self included")

    # Expressions.

    def value(self, node: ast.AST, names: dict[str, Thing]) -> Thing | None:
        match node:
            case ast.Name(id="trt"):
                return Thing("package", self.package)
            case ast.Name(id=name):
                return names.get(name)
            case ast.Attribute():
                return self._attribute(node, names)
            case ast.Call():
                return self._call(node, names)
            case ast.BoolOp(op=ast.And(), values=values):
                for value in values:
                    self.value(value, names)
                    if self._truth(value, names) is False:
                        break
                return None
        self._children(node, names)
        return None

    def _children(self, node: ast.AST, names: dict[str, Thing]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self.statement(child, names)
            else:
                self.value(child, names)

    def _attribute(self, node: ast.Attribute, names: dict[str, Thing]) -> Thing | None:
        owner = self.value(node.value, names)
        self.seen.add(self._place(node))
        if node.attr == "trt":
            return Thing("package", self.package)
        if owner is None or owner.kind == "function":
            if node.attr in self.vocabulary and not node.attr.startswith("__"):
                self.report(node, f".{node.attr}: say of which class the object is; TensorRT has such a name")
            return None
        if not hasattr(owner.value, node.attr):
            self.report(node, f"{owner.value.__name__} has no {node.attr}")
            return None
        found = getattr(owner.value, node.attr)
        if isinstance(found, type):
            return Thing("class", found)
        if isinstance(found, property):
            results = {result for _, result in signatures(found.fget)}
            return self._object(results.pop()) if len(results) == 1 else None
        if isinstance(found, enum.Enum) or (owner.kind == "class" and type(found).__module__ == owner.value.__module__):
            return Thing("object", type(found))
        return Thing("function", found, owner.kind == "object") if callable(found) else None

    def _call(self, node: ast.Call, names: dict[str, Thing]) -> Thing | None:
        given = [self.value(argument, names) for argument in node.args]
        named = {keyword.arg: self.value(keyword.value, names) for keyword in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id in self.functions:
            return self._object(self.functions[node.func.id])
        called = self.value(node.func, names)
        if called is None or called.kind in ("package", "object"):
            return None
        function, skip = (called.value.__init__, 1) if called.kind == "class" else (called.value, int(called.bound))
        overloads = signatures(function)
        if any(isinstance(argument, ast.Starred) for argument in node.args) or None in named:
            self.report(node, "unpacked arguments cannot be counted; write them out")
            return None
        fitting = [o for o in overloads if self._fits(o[0][skip:], given, named)]
        if overloads and not fitting:
            takes = " or ".join(f"({', '.join(p.name for p in o[0][skip:])})" for o in overloads)
            self.report(node, f"{ast.unparse(node)} does not fit {getattr(called.value, '__name__', '?')}{takes}")
        if called.kind == "class":
            return Thing("object", called.value)
        results = {result for _, result in fitting}
        return self._object(results.pop()) if len(results) == 1 else None

    def _fits(self, wanted: list[Parameter], given: list[Thing | None], named: dict[Any, Thing | None]) -> bool:
        if len(given) > len(wanted):
            return False
        left = wanted[len(given) :]
        if set(named) - {p.name for p in left} or any(not p.optional and p.name not in named for p in left):
            return False
        pairs = [*zip(wanted, given, strict=False), *((p, named[p.name]) for p in left if p.name in named)]
        return all(self._suits(parameter.type, value) for parameter, value in pairs)

    def _suits(self, wanted: str, value: Thing | None) -> bool:
        kind = self._object(wanted)
        return kind is None or value is None or value.kind != "object" or issubclass(value.value, kind.value)

    # Names of types.

    def _annotation(self, node: ast.expr | None) -> str | None:
        text = "" if node is None else ast.unparse(node).strip("'\"")
        return text.removeprefix("trt.") if text.startswith("trt.") else None

    def _bind(self, names: dict[str, Thing], name: str, node: ast.AST, cls: str) -> None:
        thing = self._object(cls)
        if thing is None:
            self.report(node, f"there is no class {cls}")
        else:
            names[name] = thing

    def _object(self, text: str) -> Thing | None:
        """An object of the class that ``text`` names in a docstring or annotation; None if it is not the package's."""
        found: Any = self.package
        parts = [part for part in text.split(".") if not part.startswith("tensorrt")]
        for part in parts:
            found = getattr(found, part, None)
        return Thing("object", found) if parts and isinstance(found, type) else None


def check(package: Any, source: str, path: str) -> tuple[list[str], list[str]]:
    """Problems, and places that were not reached."""
    checker = Checker(package, path)
    skipped = checker.run(ast.parse(source))
    return list(dict.fromkeys(checker.problems)), skipped


def main(module: str, paths: list[str]) -> None:
    """Print what was found in all of ``paths``."""
    package = importlib.import_module(module)
    problems, skipped = [], []
    for path in paths:
        found, missed = check(package, Path(path).read_text(), path)
        problems += found
        skipped += missed
    sys.stdout.write(json.dumps({"version": package.__version__, "problems": problems, "skipped": skipped}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
