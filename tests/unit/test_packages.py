"""The order of packages is the one that CONTRIBUTING.md draws: imports lead down, and never in a circle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_muon"

Packages = dict[str, tuple[int, set[str]]]
"""Of each package its height in the picture, and the libraries that it may import."""


@dataclass
class Source:
    """A file: what it imports at its top, in functions, and for types only; (module, line) each.

    Attributes:
        name: of the module.
        statements: its imports.
        calls: of ``import_module``, with a name that is written out.
        reads_arguments: whether it asks for the arguments of the process.
    """

    name: str
    statements: list[tuple[str, int]] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)
    reads_arguments: bool = False

    @property
    def package(self) -> str:
        return package_of(self.name)


def package_of(module: str) -> str:
    """The folder of a module, or its own name if it lies at the top."""
    return [*module.split("."), "__init__"][1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def read(name: str, text: str, modules: set[str]) -> Source:
    source = Source(name)
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import():
                source.statements += [(alias.name, node.lineno) for alias in node.names]
            case ast.ImportFrom(module=str(module), level=0):
                names = {alias.name for alias in node.names}
                full = {f"{module}.{each}" if f"{module}.{each}" in modules else module for each in names}
                source.statements += [(each, node.lineno) for each in sorted(full)]
                source.reads_arguments |= "get_args" in names and module != "typing"
            case ast.ImportFrom():
                raise AssertionError(f"{name}:{node.lineno}: give the module's whole name")
            case ast.Call(func=ast.Name("import_module") | ast.Attribute(attr="import_module")):
                source.calls += [(word.value, node.lineno) for word in node.args if isinstance(word, ast.Constant)]
            case ast.Attribute(attr="get_args"):
                source.reads_arguments = True
            case ast.Constant(value=str(word)):
                source.reads_arguments |= word.endswith("get_args")
    return source


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    paths = {module_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    return [read(name, path.read_text(), set(paths)) for name, path in paths.items()]


@pytest.fixture(scope="module")
def packages() -> Packages:
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    rows = [line.split("|")[1:3] for line in lines if line.startswith("    | ")]
    found: Packages = {}
    for height, (names, outside) in enumerate(reversed(rows)):
        for package in names.split():
            assert package not in found, f"{package} stands in the picture twice"
            found[package] = height, set(outside.split())
    return found


def arrows(sources: list[Source]) -> Iterator[tuple[str, str, str]]:
    """(package, package that it imports, text for messages) of all imports that lead out of a package."""
    for source in sources:
        for module, line in source.statements + source.calls:
            if module.split(".")[0] == PACKAGE and package_of(module) != source.package:
                yield source.package, package_of(module), f"{source.name}:{line} imports {module}"


def test_every_file_has_a_package(sources: list[Source], packages: Packages) -> None:
    assert {source.package for source in sources} == packages.keys()


def test_no_package_imports_one_above_or_beside_it(sources: list[Source], packages: Packages) -> None:
    up = [text for package, other, text in arrows(sources) if packages[other][0] >= packages[package][0]]
    assert not up, "\n".join(up)


def test_packages_import_the_libraries_that_they_may(sources: list[Source], packages: Packages) -> None:
    """``tools`` is none of them: an installed package does without."""
    found: dict[str, set[str]] = {package: set() for package in packages}
    for source in sources:
        found[source.package] |= {module.split(".")[0] for module, _ in source.statements + source.calls}
    known = {PACKAGE, *sys.stdlib_module_names}
    expected = {package: names for package, (_, names) in packages.items()}
    assert {package: names - known for package, names in found.items()} == expected


def test_no_files_import_each_other_in_a_circle(sources: list[Source]) -> None:
    graph = {source.name: {module for module, _ in source.statements} for source in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_only_the_plugin_reads_the_arguments_of_the_process(sources: list[Source]) -> None:
    """Others get what they need as parameters: they work without ``megatron.training``."""
    assert {source.package for source in sources if source.reads_arguments} <= {"plugin"}


SAMPLE = """
import a.b
from typing import get_args
def function():
    from c import d
if TYPE_CHECKING:
    import e
importlib.import_module("f.g")
"""


def test_all_kinds_of_imports_are_seen() -> None:
    source = read("sample", SAMPLE, {"c.d"})
    assert {module for module, _ in source.statements} == {"a.b", "typing", "c.d", "e"}
    assert source.calls == [("f.g", 8)] and not source.reads_arguments


@pytest.mark.parametrize(
    "text", ["from megatron.training import get_args", "x.get_args()", "Patch('megatron.training:get_args')"]
)
def test_all_ways_to_the_arguments_are_seen(text: str) -> None:
    assert read("sample", text, set()).reads_arguments
