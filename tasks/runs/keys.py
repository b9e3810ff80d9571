"""The code's part of a stage's key: the code that shapes the result, and nothing else.

A module counts with all modules of this repository that it imports, except those that transfer, store or show results.
Of each module the code counts, not comments and messages.
"""

import ast
import importlib.metadata
import threading
from collections.abc import Sequence
from functools import cache

from tasks.files import REPOSITORY, digest

PARSING = threading.Lock()
"""In several threads at once, Python 3.11 sometimes fails to parse."""
SHAPES_NOTHING = (
    "tasks.files",
    "tasks.findings",
    "tasks.settings",
    "tasks.addresses",
    "tasks.errors",
    "tasks.runs",
    "tasks.sources",
    "tasks.pixels.packed",
    "tasks.pixels.masks",
    "tasks.pixels.shards",
    "tasks.devices.contact_sheet",
    "tasks.devices.answers",
    "tasks.preparing.mask_shards",
)
"""Rooms and modules that transfer, store or show results and change none: what matters of them is in a stage's inputs.
``SHAPES_RESULTS`` names the exceptions in these rooms."""
SHAPES_RESULTS = ("tasks.runs.manifest", "tasks.sources.layout")


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in packages}


def code_version(module: str) -> str:
    """A hash of the code of a module and of all modules of this repository that it imports and that shape its result.

    Modules that shape no result, and what only they import, are left out. So are words: see ``strip_words``.
    """
    return digest({name: strip_words(source_of(name)) for name in sorted(imported_modules(module))})


@cache
def source_of(module: str) -> str:
    """The source of a module or package of this repository; empty for anything else, such as a name in a module."""
    path = REPOSITORY.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text() if path.exists() else ""


def shapes_results(module: str) -> bool:
    """Whether the code of a module belongs in the key of a stage that imports it."""
    carried = any(module == name or module.startswith(f"{name}.") for name in SHAPES_NOTHING)
    return module.startswith("tasks.") and (module in SHAPES_RESULTS or not carried)


def imported_modules(module: str) -> set[str]:
    """The module, and those under ``tasks`` that it imports, directly or through others, and that shape its result."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [n for n in names_imported(source_of(name)) if shapes_results(n) and source_of(n)]
    return found


@cache
def names_imported(text: str) -> frozenset[str]:
    """All imports in a module's source, as ``module`` and ``module.name``."""
    found: set[str] = set()
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


@cache
def strip_words(text: str) -> str:
    """A module's code without comments, docstrings, and texts of errors, log lines and artifacts."""
    return ast.dump(_Silence().visit(_parse(text)))


class _Silence(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        call = node.value.func if isinstance(node.value, ast.Call) else None
        says = isinstance(call, ast.Name) and (call.id == "print" or call.id.startswith("show_"))
        return None if says or isinstance(node.value, ast.Constant) else node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc, None)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        ours = str(node.module).startswith("tasks.")
        return None if ours and not shapes_results(str(node.module)) else node


def _parse(text: str) -> ast.Module:
    with PARSING:
        return ast.parse(text)
