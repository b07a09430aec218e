"""No file imports another that imports it or lies above it, not even in functions or for types."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import histovar

ROOT = Path(histovar.__file__).parent
FILES = {
    ".".join(["histovar", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): file
    for file in ROOT.rglob("*.py")
}


def imported(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, wherever in it."""
    file = FILES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base
                if target in FILES:
                    yield target


def test_imports_have_no_circle():
    graph = {name: set(imported(name)) - {name} for name in FILES}
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def layers():
    """Which layer of the sketch in docs/architecture.md each package is in, from the top."""
    sketch = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text("utf-8").split("```")[1]
    found = {"histovar": 0, "demo": 0}  # what users import, and what runs all of it
    for number, layer in enumerate(re.split("─+", sketch)):
        found |= dict.fromkeys(re.findall(r"(\w+)/", layer), number)
        if "base" in layer:
            found["base"] = number
    return found


def package(name):
    """The package of a module; base of the files beside the packages."""
    part = name.split(".")[1] if "." in name else name
    return "base" if part.startswith("_") else part


def test_packages_import_from_those_below_them():
    layer = layers()
    assert set(layer) == {package(name) for name in FILES}
    upwards = [
        f"{name} imports {target}"
        for name in FILES
        for target in imported(name)
        if layer[package(name)] > layer[package(target)]
    ]
    assert not upwards
