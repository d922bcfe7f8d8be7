"""The house has two kinds of rooms: the method at the root, and machinery that it does not know."""

import ast
import sys

import pytest
from conftest import ROOT

SCRIPTS = {path.stem: path for path in ROOT.glob("*.py")}
PLUMBING = {f"plumbing.{path.stem}": path for path in (ROOT / "plumbing").glob("*.py")}
FILES = SCRIPTS | PLUMBING
METHOD = ("clsgen", "model", "attention", "metrics", "text_metrics")
RUNTIME = {"torch", "numpy", "safetensors", "tokenizers", "tqdm"}


def imports_of(path):
    """The full names of all modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


OURS = {name: imports_of(path) & FILES.keys() for name, path in FILES.items()}


def test_the_files_are_there():
    """Fails if this test reads an empty folder and so can never fail."""
    assert set(METHOD) < SCRIPTS.keys() and len(PLUMBING) > 5
    assert "model" in OURS["plumbing.checkpoint"] and "run" in OURS["train"]


def test_nothing_imports_in_a_circle():
    """Fails if clsgen imports run, or anything else leads back to where it came from."""
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for imported in OURS[name]:
                visit(imported, [*path, name])
            done.add(name)

    for name in FILES:
        visit(name, [])


@pytest.mark.parametrize("name", METHOD)
def test_the_method_knows_nothing_of_the_plumbing(name):
    """Fails if a file of the method needs machinery to be read."""
    assert not [module for module in imports_of(FILES[name]) if module.startswith("plumbing")]


def test_clsgen_imports_torch_alone():
    """Fails if the method's file needs any other file or package to be read."""
    outside = {name.split(".")[0] for name in imports_of(SCRIPTS["clsgen"])}
    assert outside - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", FILES)
def test_five_packages_at_run_time(name):
    """Fails if a script needs a package that requirements.txt does not install."""
    outside = {module.split(".")[0] for module in imports_of(FILES[name]) - FILES.keys()}
    assert outside - set(sys.stdlib_module_names) <= RUNTIME
