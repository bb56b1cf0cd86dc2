"""The messages that the package raises, as its source has them: what ``docs/troubleshooting.md`` is compared with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_muon"
HOLE = "\N{HORIZONTAL ELLIPSIS}"
"""Stands for what is known at run time alone."""

SENTENCES = (("optimizers/agreement.py", "unequal_gradients"), ("optimizers/groups.py", "no_matrix"))
"""Functions that return words of messages."""


@dataclass(frozen=True)
class Message:
    """A ``raise`` with its text, in which each value of a run is a :data:`HOLE`."""

    place: str
    function: str
    text: str


def messages() -> Iterator[Message]:
    """All of the package, but for exits with a status and what is raised once more.

    Where the exception is given no words, the sentences of its function are taken, which put the message together.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        place = path.relative_to(PACKAGE).as_posix()
        made: dict[ast.Call, ast.FunctionDef] = {}  # the innermost function, which a walk comes to last
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                made |= {call: function for inner in ast.walk(function) if (call := _exception(inner))}
        for call, function in made.items():
            text = HOLE.join(map(_text, call.args))
            yield Message(place, function.name, text if has_words(text) else _sentences(function))
        for name in (name for file, name in SENTENCES if file == place):
            (function,) = (each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == name)
            yield Message(place, name, _sentences(function))


def _exception(node: ast.AST) -> ast.Call | None:
    """The exception that a statement raises, or returns for another to raise."""
    made = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
    if not isinstance(made, ast.Call):
        return None
    name = ast.unparse(made.func)
    if name == "SystemExit":
        return made if isinstance(made.args[0], ast.JoinedStr) else None
    its_own = not re.match(r"(\w+\.)?_[a-z]", name)  # not that of a function that returns it
    return made if (isinstance(node, ast.Raise) and its_own) or name.endswith("Error") else None


def _sentences(function: ast.FunctionDef) -> str:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    inner = (each for part in body for each in ast.walk(part))
    texts = (_text(each) for each in inner if isinstance(each, (ast.Constant, ast.JoinedStr)))
    return HOLE.join(each for each in texts if len(each.split()) > 3)


def has_words(text: str) -> bool:
    """Whether there is more than values and punctuation."""
    return len(re.findall(r"[A-Za-z]{2,}", text)) > 1


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return HOLE
