"""No import circles in the package, not even in functions or for types; the model does not import AnnData."""

import ast
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


def test_the_model_is_readable_alone():
    for name in FILES:
        if name.startswith("histovar.model."):
            others = {target for target in imported(name) if not target.startswith(("histovar.model", "histovar._"))}
            assert not others, f"{name} imports {others}"
