"""What the hooks stand on: a fingerprint of each of upstream's functions that is hooked, from the sources.

Nothing is imported, so any version can be read, on any machine.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tools.upstream.edits import EditError, find, path_of

__all__ = ["differences", "fingerprints", "hooked"]

Seams = dict[str, dict[str, str]]
"""By target: ``signature`` (of functions) and ``sha256`` of its source."""


def hooked() -> list[str]:
    """The targets in Megatron-LM of all hooks, of the plug-in and of the CPU runtime, each once."""
    from megatron_muon import cpu, plugin

    targets = [target for target, _ in (*plugin.describe(), *cpu.describe())]
    return sorted({target for target in targets if target.startswith("megatron.")})


def fingerprints(sources: Path, targets: Iterable[str]) -> Seams:
    """The fingerprint of each target; those that do not exist are left out.

    Args:
        sources: the folder that has ``megatron``.
        targets: ``"package.module:name"`` or ``"package.module:Class.name"``.
    """
    found = {target: _fingerprint(sources, target) for target in targets}
    return {target: seam for target, seam in found.items() if seam is not None}


def differences(expected: Seams, found: Seams) -> list[str]:
    """What has changed, a line for each target, by its name."""
    lines = []
    for target, seam in expected.items():
        now = found.get(target)
        if now is None:
            lines.append(f"{target}: does not exist")
        elif now.get("signature") != seam.get("signature"):
            lines.append(f"{target}: signature {now.get('signature')}, was {seam.get('signature')}")
        elif now != seam:
            lines.append(f"{target}: source has changed")
    return lines


def _fingerprint(sources: Path, target: str) -> dict[str, str] | None:
    try:
        path = sources / path_of(sources, target)
    except EditError:
        return None
    text, tree = _parsed(path)
    name = target.partition(":")[2]
    node = find(tree, name)
    if node is not None:
        seam = {"sha256": _hash([_source(text, node)])}
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            seam["signature"] = f"({ast.unparse(node.args)})"
        return seam
    owner = find(tree, name.rpartition(".")[0]) if "." in name else None
    if owner is not None:  # inherited, or made by a decorator: what the class is decides
        return {"sha256": _hash([_source(text, owner)])}
    statements = [_source(text, node) for node in _binding(tree, name)]
    return {"sha256": _hash(statements)} if statements else None


@cache
def _parsed(path: Path) -> tuple[list[str], ast.Module]:
    text = path.read_text()
    return text.splitlines(), ast.parse(text)


def _source(lines: list[str], node: ast.AST) -> str:
    """The lines of a definition with its decorators."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines[first - 1 : node.end_lineno])  # type: ignore[attr-defined]


def _hash(passages: list[str]) -> str:
    return hashlib.sha256("\n".join(passages).encode()).hexdigest()


def _binding(tree: ast.AST, name: str) -> Iterator[ast.AST]:
    """The statements of a module that give ``name`` a value, or change what it holds."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, (ast.If, ast.Try, ast.For, ast.ExceptHandler, ast.With)):
            yield from _binding(node, name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            if any((alias.asname or alias.name) == name for alias in node.names):
                yield node
        elif isinstance(node, ast.stmt) and any(
            isinstance(each, ast.Name) and each.id == name for each in ast.walk(node)
        ):
            yield node
