"""Imports go downward: from every room of the package only to rooms on lower floors, and no file depends on itself."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fusedres"
# From the ground up; rooms on one floor know nothing of each other. "fusedres" itself is the public interface.
FLOORS = (
    ("kernels",),
    ("activation", "cache", "context"),
    ("operands", "arguments", "compiler", "measure", "tables"),
    ("plan", "vgpu"),
    ("runtime",),
    ("traffic",),
    ("ops",),
    ("autograd",),
    ("patterns",),
    ("functional",),
    ("nn",),
    ("swap",),
    ("models",),
    ("tuning",),
    ("fusedres",),
    ("train", "explain"),
    ("studies", "bench"),
    ("commands",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Device code is imported where it is launched, by the host file of the same op, and by nobody else.
LAUNCH = {"ops"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imported(path):
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from (one for one in [name if name in MODULES else node.module] if one in MODULES)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


IMPORTS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def room(module):
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize("name", sorted({room(module) for module in MODULES}))
def test_a_room_names_its_floor_and_imports_downward(name):
    assert name in FLOOR, f"{name} is a new room: give it a floor"
    upward = [
        f"{module} -> {other}"
        for module in MODULES
        for other in IMPORTS[module]
        if room(module) == name != room(other) and FLOOR[room(other)] >= FLOOR[name]
    ]
    assert upward == []


def test_device_code_imports_triton_alone_and_is_imported_by_ops_alone():
    foreign = {"torch", "numpy", "fusedres"}
    for module, path in MODULES.items():
        if room(module) != "kernels":
            assert room(module) in LAUNCH or not any(room(other) == "kernels" for other in IMPORTS[module]), module
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            outside = [name for name in names if name.split(".")[0] in foreign]
            assert all(name.startswith("fusedres.kernels") for name in outside), f"{module} imports {outside}"


def circles(imports):
    """The files that import themselves, by way of others."""

    def reached(module):
        found, waiting = set(), [module]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting.extend(new)
        return found

    return sorted(module for module in imports if module in reached(module))


def test_no_file_depends_on_itself():
    known = {"autograd", "patterns", "bench"}
    assert {room(module) for module in circles(IMPORTS)} <= known
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]


def test_a_planted_import_upward_is_seen(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("def late():\n    from fusedres.swap import fuse\n    import fusedres.nn.parts\n")
    assert set(imported(planted)) == {"fusedres.swap", "fusedres.nn.parts"}
