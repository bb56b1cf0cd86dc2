"""Changes to the text of a source file: one passage for another, and functions made extension points."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
MODULE = "megatron.core.extension_points"
IMPORT = f"from {MODULE} import extension_point\n"


class EditError(Exception):
    """The sources are not those that an edit is for."""


@dataclass(frozen=True)
class Edit:
    """``old`` becomes ``new`` in ``path``, where it must be ``count`` times."""

    path: str
    old: str
    new: str
    count: int = 1


def before(path: str, passage: str, added: str) -> Edit:
    """``added`` comes before a passage."""
    return Edit(path, passage, added + passage)


def after(path: str, passage: str, added: str) -> Edit:
    """``added`` comes after a passage."""
    return Edit(path, passage, passage + added)


@dataclass(frozen=True)
class Change:
    """One git patch.

    Attributes:
        subject: the first line of its commit message.
        body: the rest, in paragraphs.
        fixes: targets of the plug-in's hooks that the change makes needless.
        points: functions to make extension points, ``"package.module:Class.name"``.
        needs: changes without which this one cannot be applied, besides what these need.
        edits: passages.
        files: new files, by their path.
    """

    subject: str
    body: str
    fixes: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    needs: tuple[Change, ...] = ()
    edits: tuple[Edit, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    def apply(self, tree: Path) -> None:
        """Change the sources in ``tree``, which has the folder ``megatron``.

        Raises:
            EditError: naming the file and what is not there.
        """
        for path, text in self.files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        for edit in self.edits:
            _replace(tree / edit.path, edit)
        names_of: dict[str, list[str]] = {}
        for point in self.points:
            names_of.setdefault(path_of(tree, point), []).append(point.partition(":")[2])
        for path, names in names_of.items():
            file = tree / path
            file.write_text(with_points(file.read_text(), names, path))


def unit_test(path: str) -> dict[str, str]:
    """The file of a change that has its test, by its place among upstream's unit tests."""
    return {f"tests/unit_tests/{path}": (HERE / "unit_tests" / path).read_text()}


def new_file(name: str) -> dict[str, str]:
    """A file that a change adds to ``megatron.core.optimizer``."""
    return {f"megatron/core/optimizer/{name}": (HERE / "new_files" / name).read_text()}


def path_of(tree: Path, target: str) -> str:
    """The file of a target's module, from ``tree``.

    Raises:
        EditError: if there is none.
    """
    stem = target.partition(":")[0].replace(".", "/")
    for path in (f"{stem}.py", f"{stem}/__init__.py"):
        if (tree / path).is_file():
            return path
    raise EditError(f"{target}: no module {stem}.py")


def with_points(text: str, names: list[str], path: str) -> str:
    """``text`` with a decorator on each of the functions ``names``.

    A method that a decorator makes (a dataclass's ``__init__``) gets a line after its class.

    Raises:
        EditError: naming a function that is not there.
    """
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    additions: list[tuple[int, str]] = []  # after so many lines
    for name in names:
        node = find(tree, name)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            additions.append((node.lineno - 1, f"{' ' * node.col_offset}@extension_point\n"))
            continue
        owner = find(tree, name.rpartition(".")[0])
        if not isinstance(owner, ast.ClassDef) or not name.endswith(".__init__"):
            raise EditError(f"{path}: no function {name}")
        additions.append((owner.end_lineno or 0, f"\n\n{name} = extension_point({name})\n"))
    if IMPORT not in text:
        additions.append(_place_for_import(tree))
    for line, addition in sorted(additions, reverse=True):
        lines.insert(line, addition)
    return "".join(lines)


def find(tree: ast.AST, name: str) -> ast.AST | None:
    """The class or function ``name``, with dots for members, also under ``if`` and ``try``; the last one there is."""
    first, _, rest = name.partition(".")
    found: ast.AST | None = None
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.If, ast.Try)):
            found = find(node, name) or found
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == first:
            found = (find(node, rest) if rest else node) or found
    return found


def _place_for_import(tree: ast.Module) -> tuple[int, str]:
    """After how many lines the import goes, among the others of ``megatron`` by name, and its line."""
    place = None
    for node in tree.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        module = (node.names[0].name if isinstance(node, ast.Import) else node.module) or ""
        if not relative and not module.startswith("megatron.core"):
            continue
        if not relative and module < MODULE:
            place = node.end_lineno or 0, IMPORT
        elif place is None:
            place = node.lineno - 1, f"{IMPORT}\n" if relative else IMPORT
    if place is None:
        raise EditError("no import of megatron.core to put ours beside")
    return place


def _replace(file: Path, edit: Edit) -> None:
    text = file.read_text()
    found = text.count(edit.old)
    if found != edit.count:
        raise EditError(f"{edit.path}: {found} times, not {edit.count}: {edit.old.strip().splitlines()[0]!r}")
    file.write_text(text.replace(edit.old, edit.new))
