"""The key of a result: the hash of everything that it depends on.

That is the code that its function reaches, its inputs, the versions of the libraries that this code imports, and the keys of the
results before it. Code is followed by name through the package's own definitions, from a function to the functions, classes and
constants that it names, wherever they are imported from. What is hashed are syntax trees without docstrings: neither a comment
nor a word of a docstring changes a key, and an edit anywhere else changes those of the results that it can change.

Modules that carry a study or its results (`CARRIERS`) are not followed. What is looked up by name as the program runs (an SAE
variant, a source) is no name in the code: whoever computes with it gives it as one more root.
"""

import ast
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = "sae_stability"
SOURCE = Path(__file__).parent
CARRIERS = ("study", "store", "keys", "places", "errors", "loading", "experiments.experiment")
"""Modules that say what is wanted, and where results stand. They are not followed: what of them a result depends on is among its
inputs, and a new variant in the schema changes no SAE of the others."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
WITHOUT_EFFECT = {"tqdm", "jaxtyping", "psutil"}  # libraries that no number depends on


class Definition(NamedTuple):
    """A function, class or constant at the top level of a module of the package; or, without a name, the module as a whole."""

    module: str
    name: str


class Module(NamedTuple):
    """What a module of the package binds at its top level."""

    definitions: dict[str, list[ast.stmt]]
    """The statements that bind a name: usually one."""
    imports: dict[str, tuple[str, str]]
    """Names that are imported: the module, and the name in it (empty for the module itself)."""


def key_of(inputs: object, roots: Iterable = (), before: Iterable[str] = ()) -> str:
    """The key of a result with `inputs` (JSON values) that `roots` compute, behind the results whose keys are `before`.

    Roots are functions and classes of the package.
    """
    definitions = {Definition(root.__module__, root.__qualname__.partition(".")[0]) for root in roots}
    return _hash({"inputs": inputs, "before": list(before), **_reached(frozenset(definitions))})


def key_of_script(source: str, inputs: object, before: Iterable[str] = ()) -> str:
    """The key of what a script computes, such as the code cells of a chapter: its own code, and what of the package it reaches."""
    tree = ast.parse(source)
    module = _bound([statement for statement in tree.body if isinstance(statement, ast.Import | ast.ImportFrom)])
    named = frozenset(definition for statement in tree.body for definition in _named(statement, module, ""))
    return _hash({"inputs": inputs, "before": list(before), "script": _dump(tree), **_reached(named)})


@cache
def _reached(roots: frozenset[Definition]) -> dict[str, dict[str, str]]:
    """The code that definitions reach, by its digests, and the versions of the libraries that it imports."""
    reached = sorted(closure(roots))
    return {
        "code": {f"{definition.module}.{definition.name}": digest(definition) for definition in reached},
        "libraries": {name: _version(name) for name in libraries_of(reached)},
    }


@cache
def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


def _hash(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def closure(roots: Iterable[Definition]) -> set[Definition]:
    """All definitions of the package that `roots` reach, themselves included."""
    reached: set[Definition] = set()
    waiting = list(roots)
    while waiting:
        definition = waiting.pop()
        if definition not in reached:
            reached.add(definition)
            waiting += names_in(definition)
    return reached


@cache
def names_in(definition: Definition) -> frozenset[Definition]:
    """The definitions of the package that a definition names."""
    module = read(definition.module)
    statements = module.definitions[definition.name] if definition.name else _all(module)
    return frozenset(found for statement in statements for found in _named(statement, module, definition.module))


@cache
def digest(definition: Definition) -> str:
    """The hash of a definition's syntax tree, without docstrings and places."""
    module = read(definition.module)
    statements = module.definitions[definition.name] if definition.name else _all(module)
    return hashlib.sha256("\n".join(_dump(statement) for statement in statements).encode()).hexdigest()


def libraries_of(reached: Iterable[Definition]) -> list[str]:
    """The distributions that the code of some definitions imports: those of the standard library are Python's own."""
    imported: set[str] = set()
    for definition in reached:
        imported |= _external(definition)
    installed = _distributions()
    named = {installed[package][0] for package in imported if package in installed}
    return sorted(name.lower() for name in named if name.lower() not in WITHOUT_EFFECT)


@cache
def _distributions() -> dict[str, list[str]]:
    return {package: sorted(names) for package, names in importlib.metadata.packages_distributions().items()}


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {package: _version(package) for package in packages}


@cache
def read(module: str) -> Module:
    """The top level of a module of the package."""
    return _bound(ast.parse(_path(module).read_text(encoding="utf-8")).body, module)


def forget() -> None:
    """Read the package's files anew: they have changed since they were read."""
    for cached in (read, names_in, digest, _external, _top, _reached):
        cached.cache_clear()


def _path(module: str) -> Path:
    inside = SOURCE.joinpath(*module.split(".")[1:])
    return inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")


def _is_module(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE and _path(name).is_file()


def _bound(body: list[ast.stmt], module: str = "") -> Module:
    definitions: dict[str, list[ast.stmt]] = {}
    imports: dict[str, tuple[str, str]] = {}
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            imports |= _imported(statement, module)
        else:
            for name in _binds(statement):
                definitions.setdefault(name, []).append(statement)
    return Module(definitions, imports)


def _imported(statement: ast.Import | ast.ImportFrom, module: str) -> dict[str, tuple[str, str]]:
    if isinstance(statement, ast.Import):
        return {(name.asname or name.name.partition(".")[0]): (name.name, "") for name in statement.names}
    names = {name.asname or name.name: name.name for name in statement.names}
    source = statement.module or ""
    return {
        local: (f"{source}.{name}", "") if _is_module(f"{source}.{name}") and name not in _top(source) else (source, name)
        for local, name in names.items()
    }


@cache
def _top(module: str) -> set[str]:
    """Names that a module of the package defines or imports: they hide modules of the same name below it."""
    if not _is_module(module) or _path(module).name != "__init__.py":
        return set()
    bound = set()
    for statement in ast.parse(_path(module).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom):
            bound |= {name.asname or name.name for name in statement.names if statement.module != module}
        elif not isinstance(statement, ast.Import):
            bound |= set(_binds(statement))
    return bound


def _binds(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top level of a module binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
    elif isinstance(statement, ast.If | ast.Try | ast.With | ast.For):
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                yield from _binds(child)


def _all(module: Module) -> list[ast.stmt]:
    return [statement for statements in module.definitions.values() for statement in statements]


def _named(statement: ast.AST, module: Module, name: str) -> Iterator[Definition]:
    """The definitions of the package that a statement names, by a name or as an attribute of a module."""
    imports = dict(module.imports)
    for node in ast.walk(statement):
        if isinstance(node, ast.Import | ast.ImportFrom):  # inside a function
            imports |= _imported(node, name)
    for node in _free(statement, frozenset()):
        base, *attributes = _parts(node)
        if base in module.definitions:
            yield Definition(name, base)
        elif base in imports:
            source, inside = imports[base]
            yield from _resolved(source, inside) if inside or not attributes else _attribute(source, attributes)


def _parts(node: ast.expr) -> list[str]:
    """`a`, `b` and `c` of `a.b.c`."""
    if isinstance(node, ast.Attribute):
        return [*_parts(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def _free(node: ast.AST, bound: frozenset[str]) -> Iterator[ast.Name | ast.Attribute]:
    """The names in a tree that it does not bind itself, each with what is asked of it: `a.b.c` is one, and not three."""
    if isinstance(node, ast.Name):
        if node.id not in bound:
            yield node
        return
    if isinstance(node, ast.Attribute):
        base: ast.expr = node
        while isinstance(base, ast.Attribute):
            base = base.value
        if isinstance(base, ast.Name):
            if base.id not in bound:
                yield node
            return
    inner = bound
    if isinstance(node, FUNCTIONS):
        inner = bound | _local(node)
    elif isinstance(node, COMPREHENSIONS):
        inner = bound | {name.id for part in node.generators for name in ast.walk(part.target) if isinstance(name, ast.Name)}
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):  # decorators, defaults and annotations belong to the scope around
                yield from _free(child, inner if field in ("body", "elt", "key", "value", "generators") else bound)


def _local(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> set[str]:
    """The names that a function binds: its parameters, and what it assigns."""
    parameters = function.args
    named = [*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs, parameters.vararg, parameters.kwarg]
    bound = {parameter.arg for parameter in named if parameter is not None}
    waiting: list[ast.AST] = [*function.body] if isinstance(function.body, list) else [function.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            bound |= {node.name} if hasattr(node, "name") else set()
        elif not isinstance(node, COMPREHENSIONS):
            waiting += list(ast.iter_child_nodes(node))
    return bound


def _attribute(module: str, attributes: list[str]) -> Iterator[Definition]:
    """What `module.name` and `package.module.name` stand for."""
    for attribute in attributes:
        if not _is_module(f"{module}.{attribute}") or attribute in _top(module):
            yield from _resolved(module, attribute)
            return
        module = f"{module}.{attribute}"


def _resolved(module: str, name: str) -> Iterator[Definition]:
    """Where a name of a module is defined; nothing for what is not the package's."""
    if not _is_module(module) or module.partition(".")[2] in CARRIERS:
        return
    bound = read(module)
    if not name or name in bound.definitions:
        yield Definition(module, name)
    elif name in bound.imports:
        yield from _resolved(*bound.imports[name])


@cache
def _external(definition: Definition) -> frozenset[str]:
    """Packages from elsewhere that a definition uses."""
    module = read(definition.module)
    statements = module.definitions[definition.name] if definition.name else _all(module)
    imports = dict(module.imports)
    nodes = [node for statement in statements for node in ast.walk(statement)]
    inside: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            local = _imported(node, definition.module)
            imports |= local
            inside |= set(local)
    used = inside | {node.id for node in nodes if isinstance(node, ast.Name)}
    packages = {imports[name][0].partition(".")[0] for name in used if name in imports}
    return frozenset(packages - {PACKAGE} - set(sys.stdlib_module_names))


def _dump(tree: ast.AST) -> str:
    return ast.dump(_without_docstrings(tree))


def _without_docstrings(tree: ast.AST) -> ast.AST:
    """A copy of a tree in which no string stands alone, as docstrings do (of fields too)."""
    copied = ast.parse(ast.unparse(tree))
    for node in ast.walk(copied):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                setattr(node, field, [statement for statement in body if not _is_text(statement)])
    return copied


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
