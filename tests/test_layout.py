"""The layout: imports run one way, without a circle, importing does nothing, and no function is long."""

import ast
import graphlib
from pathlib import Path

import pytest
from helpers import REPOSITORY

MODULES = {f"training.{path.stem}": path for path in (REPOSITORY / "training").glob("*.py")}
SCRIPTS = {path.stem: path for path in REPOSITORY.glob("*.py")}
DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def project_imports(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, at its top or within a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    folders = ("training", "tools", "benchmarks")
    return {name for name in names if name in SCRIPTS or name in MODULES or name.split(".")[0] in folders[1:]}


def test_imports_run_one_way_and_in_no_circle():
    graph = {name: project_imports(path) for name, path in MODULES.items()}
    assert not set().union(*graph.values()) - set(MODULES), "a part imports the story, a script or a tool"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    assert not graph["training.config"] and graph["training.files"] == {"training.config"}  # the ground
    assert project_imports(SCRIPTS["common"]) <= set(MODULES)
    assert project_imports(SCRIPTS["mobilenetv4_baseline"]) == {"common", "training.cpu"}
    assert project_imports(SCRIPTS["mobilenetv4_enhanced"]) == {"common", "mobilenetv4_baseline", "training.cpu"}


@pytest.mark.parametrize("path", [*MODULES.values(), *SCRIPTS.values()], ids=lambda path: path.stem)
def test_importing_does_nothing_and_no_function_is_longer_than_60_lines(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guarded = isinstance(node, ast.If | ast.Try) and not any(isinstance(part, ast.Expr) for part in node.body)
        program = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert docstring or guarded or program or isinstance(node, DEFINITIONS), f"line {node.lineno} acts"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60}
