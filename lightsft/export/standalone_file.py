"""modeling_lightsft.py: one file made of those of `lightsft.standalone` that a strategy needs, for one base class.

Every file keeps its text but for its imports, which are put together on top: of files that are put in, none are needed.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from lightsft import standalone
from lightsft.errors import MergeError

MODULE = "modeling_lightsft"
_SHARED = standalone.__name__
_HEADER = '''"""{model} with what was trained on it, exported by lightsft {version}; it runs without lightsft.

Load it with trust_remote_code=True. config.json lists the parts (lightsft_parts); their tensors lie beside the base's.
"""
'''


def modelling_file(base: type[Any], config: type[Any], kinds: Iterable[type[Any]], version: str) -> str:
    """The text of the file, in which `Tuned<base>` subclasses `base`, `Tuned<config>` its configuration."""
    kinds = sorted(set(kinds), key=lambda kind: kind.__name__)
    files = list(_in_order([*(Path(inspect.getfile(kind)) for kind in kinds), _file("model")]))
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    _require_distinct(trees)
    bases = {"BaseModel": base, "BaseConfig": config}
    imports = [found for tree in trees.values() for found in _imports(tree) if found[1].split(" as ")[-1] not in bases]
    imports += [(kind.__module__, f"{kind.__name__} as {name}") for name, kind in bases.items()]
    bodies = "\n\n\n".join(_body(file, tree) for file, tree in trees.items())
    listed = ", ".join(f'"{kind.__name__}": {kind.__name__}' for kind in kinds)
    bodies = bodies.replace("KINDS: dict[str, Any] = {}", f"KINDS: dict[str, Any] = {{{listed}}}")
    for kind, name in ((base, "TunedModel"), (config, "TunedConfig")):
        bodies = bodies.replace(name, f"Tuned{kind.__name__}")
    bodies = bodies.replace('model_type = "lightsft"', f'model_type = "{model_type(config)}"')
    header = _HEADER.format(model=base.__name__, version=version)
    return "\n".join([header, *_import_lines(set(imports)), "", "", bodies, ""])


def model_type(config: type[Any]) -> str:
    """A type that transformers does not know: it would load the weights without the parts."""
    return f"lightsft-{config.model_type}"


def _in_order(wanted: Iterable[Path]) -> Iterator[Path]:
    """The files and those that they import, each once and after what it imports."""
    done: set[Path] = set()

    def visit(file: Path) -> Iterator[Path]:
        if file in done:
            return
        done.add(file)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and _is_shared(node):
                yield from visit(_file(str(node.module).removeprefix(f"{_SHARED}.")))
        yield file

    for file in wanted:
        yield from visit(file)


def _is_shared(node: ast.ImportFrom) -> bool:
    """Whether it imports from a file of `lightsft.standalone`."""
    return node.level == 1 or str(node.module).startswith(f"{_SHARED}.")


def _file(name: str) -> Path:
    return Path(str(standalone.__file__)).with_name(f"{name}.py")


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of each name that is imported; (module, "") of a whole module."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((name.name, "") for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not _is_shared(node):
            yield from ((str(node.module), ast.unparse(name)) for name in node.names)


def _import_lines(imports: set[tuple[str, str]]) -> Iterator[str]:
    """Statements in the usual order: the future, the standard library, other packages."""
    modules = sorted({module for module, _ in imports}, key=lambda module: (_group(module), module))
    for group, together in groupby(modules, _group):
        lines = []
        for module in together:
            names = sorted(name for owner, name in imports if owner == module and name)
            lines += [f"import {module}"] if (module, "") in imports else []
            lines += [f"from {module} import {', '.join(names)}"] if names else []
        yield from ["", *lines] if group else lines


def _group(module: str) -> int:
    if module == "__future__":
        return 0
    return 1 if module.split(".")[0] in sys.stdlib_module_names else 2


def _body(file: Path, tree: ast.Module) -> str:
    """What follows docstring and imports, under the docstring as a comment."""
    last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    said = "\n".join(f"# {line}".rstrip() for line in (ast.get_docstring(tree) or "").splitlines())
    code = "\n".join(file.read_text(encoding="utf-8").splitlines()[last:]).strip("\n")
    return f"# ---- {file.stem}\n#\n{said}\n\n{code}"


def _require_distinct(trees: dict[Path, ast.Module]) -> None:
    """In one file a name means one thing."""
    owners: dict[str, Path] = {}
    for file, tree in trees.items():
        for node in tree.body:
            name = getattr(node, "name", None)
            if name and owners.setdefault(name, file) != file:
                raise MergeError(
                    f"{owners[name].name} and {file.name} both define {name}",
                    expected="parts whose files can be put into one",
                    todo=f"give {name} another name in one of them",
                )
