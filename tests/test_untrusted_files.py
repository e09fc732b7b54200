"""No file that is read can run code: weights are loaded as weights alone, and pickles of files name their classes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import fusedres

PACKAGE = Path(fusedres.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

# Pickles of pipes between a process and those that it started; no file.
OWN_PROCESSES = {"compiler/ahead.py", "compiler/worker.py"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with what is called as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_weights_are_loaded_as_weights_alone():
    loads = [call for tree in SOURCES.values() for name, call in calls(tree) if name == "torch.load"]
    assert loads
    for call in loads:
        (given,) = [keyword.value for keyword in call.keywords if keyword.arg == "weights_only"]
        assert isinstance(given, ast.Constant) and given.value is True


def test_pickles_are_read_from_own_processes_alone():
    loaders = ("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open")
    found = {path for path, tree in SOURCES.items() for name, _ in calls(tree) if name in loaders}
    assert found <= OWN_PROCESSES
    for path, tree in SOURCES.items():
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "pickle"]
        assert not imported, path  # or the calls would go by other names
        asked = [keyword for _, call in calls(tree) for keyword in call.keywords if keyword.arg == "allow_pickle"]
        assert all(isinstance(keyword.value, ast.Constant) and not keyword.value.value for keyword in asked), path


def test_readers_of_pickled_files_choose_their_classes():
    readers = {
        path: node
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "pickle.Unpickler" for base in node.bases)
    }
    assert readers.keys() - OWN_PROCESSES == {"train/cifar.py"}
    methods = {node.name for node in readers["train/cifar.py"].body if isinstance(node, ast.FunctionDef)}
    assert "find_class" in methods
