"""Imports point strictly downward, heavy libraries have one door each, and nothing executable is loaded."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bmjax"

# Lowest first. A room is a folder, or a module beside them; within a room imports make no circle.
FLOORS = [
    ["environment", "registry", "files"],
    ["config", "layers", "download"],
    ["cpu", "attention", "backbones", "data"],
    ["weights"],
    ["model"],
    ["runs"],
    ["training"],
    ["analysis"],
    ["cli", "__init__"],
    ["__main__"],
]
MOST_ROOMS, MOST_FLOORS, FACE_LINES, MODULE_LINES = 18, 10, 40, 400
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

# Library -> the one file that imports it.
ONE_DOOR = {"orbax": "bmjax.runs.checkpoint", "wandb": "bmjax.runs.tracking"}
DEVICE_NAMES = {"Mesh", "AbstractMesh", "NamedSharding", "PartitionSpec", "make_mesh", "pmap", "shard_map", "set_mesh"}
EXECUTABLE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {module_name(path) for path in PACKAGE.rglob("__init__.py")}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST):
    """Every node but those under `if TYPE_CHECKING`."""
    yield node
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from walk(child)


def imports(module: str, source: str, known=SOURCES) -> set[str]:
    """Full names of the modules that a source imports anywhere, also within functions."""
    found = set()
    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from package import module` needs the package only for finding the module.
                found.add(full if full in known else base)
    return found - {module}


def top(module: str) -> str:
    """bmjax.attention.soft -> attention; bmjax -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports of a module that does not stand on a lower floor; within a package none is upward."""
    return [
        f"{a} -> {b}"
        for a, targets in sorted(edges.items())
        for b in sorted(targets)
        if top(a) != top(b) and FLOOR_OF[top(b)] >= FLOOR_OF[top(a)]
    ]


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A circle of imports, if there is one."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(edges.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return None

    for module in sorted(edges):
        if found := visit(module, []):
            return found
    return None


EDGES = {m: {t for t in imports(m, s) if t.split(".")[0] == "bmjax"} for m, s in SOURCES.items()}


def test_every_module_has_a_floor():
    assert {top(m) for m in SOURCES} <= set(FLOOR_OF), "add the new module to FLOORS, where it belongs"


def test_imports_point_strictly_downward():
    assert upward(EDGES) == []


def test_the_plan_is_small(capsys):
    """Prints the plan: rooms, floors, and imports between rooms."""
    between = {(top(a), top(b)) for a, targets in EDGES.items() for b in targets if top(a) != top(b)}
    rooms = {top(m) for m in SOURCES}
    with capsys.disabled():
        print(
            f"\n{len(rooms)} rooms on {len(FLOORS)} floors, {len(between)} imports between them, {len(SOURCES)} modules"
        )
    assert len(rooms) <= MOST_ROOMS
    assert len(FLOORS) <= MOST_FLOORS


def test_folders_have_faces_and_modules_stay_small():
    lines = {m: len(s.splitlines()) for m, s in SOURCES.items()}
    faces = PACKAGES - {"bmjax"}
    assert {m: lines[m] for m in faces if lines[m] >= FACE_LINES} == {}
    assert {m: n for m, n in lines.items() if n > MODULE_LINES} == {}


def test_only_the_seam_knows_of_the_cpu():
    """Nothing imports bmjax.cpu by a statement; bmjax.layers.dispatch asks for it by name."""
    assert [m for m, targets in EDGES.items() if top(m) != "cpu" and any(top(t) == "cpu" for t in targets)] == []


def test_there_is_no_circle():
    assert circle(EDGES) is None


def test_every_import_of_ours_exists():
    missing = [f"{m} -> {t}" for m, targets in EDGES.items() for t in targets if t not in SOURCES]
    assert missing == []


def test_the_walk_sees_what_it_must():
    source = "\n".join(
        [
            "import os, bmjax.training.loop",
            "from typing import TYPE_CHECKING",
            "if TYPE_CHECKING:",
            "    import bmjax.cli",
            "else:",
            "    import bmjax.runs.state",
            "from . import soft",
            "from ..layers import Conv",
            "from bmjax import registry",
            "def f():",
            "    from bmjax.model.create import create",
        ]
    )
    ours = {t for t in imports("bmjax.attention.se", source) if t.startswith("bmjax")}
    assert ours == {
        "bmjax.training.loop",
        "bmjax.runs.state",
        "bmjax.attention.soft",
        "bmjax.layers",
        "bmjax.registry",
        "bmjax.model.create",
    }
    assert upward({"bmjax.attention.se": ours}) == [
        f"bmjax.attention.se -> bmjax.{name}" for name in ("model.create", "runs.state", "training.loop")
    ]
    assert upward({"bmjax.data.load": {"bmjax.runs.state"}}) == ["bmjax.data.load -> bmjax.runs.state"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) is None


@pytest.mark.parametrize("library", ONE_DOOR)
def test_one_file_imports(library):
    doors = {m for m, s in SOURCES.items() if any(t.split(".")[0] == library for t in imports(m, s))}
    assert doors <= {ONE_DOOR[library]}


def names(source: str) -> set[str]:
    """Every name, attribute and imported name of a source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= set(node.name.split(".")) | {node.asname or ""}
    return found


def test_only_parallel_names_devices_layout():
    assert names("import jax\ny = jax.pmap(f)\nfrom jax.sharding import Mesh as M") >= {"pmap", "Mesh"}
    offenders = {m: names(s) & DEVICE_NAMES for m, s in SOURCES.items() if m != "bmjax.training.parallel"}
    assert {m: n for m, n in offenders.items() if n} == {}


def loads_executable(source: str) -> list[str]:
    """What a source uses that runs what it reads."""
    found = sorted({t.split(".")[0] for t in imports("m", source)} & EXECUTABLE)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            constant = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "allow_pickle" and not constant:
                found.append(ast.unparse(keyword))
        if ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load") and len(node.args) > 2:
            found.append(ast.unparse(node))
        if ast.unparse(node.func) == "torch.load":
            found.append("torch.load")
    return found


def test_nothing_executable_is_loaded():
    assert loads_executable("import pickle.x\nnp.load(f, allow_pickle=True)\nnp.save(f, allow_pickle=False)") == [
        "pickle",
        "allow_pickle=True",
    ]
    folders = [PACKAGE, ROOT / "experiments", ROOT / "tools"]
    sources = {path: path.read_text() for folder in folders for path in folder.rglob("*.py")}
    assert {str(p): found for p, s in sources.items() if (found := loads_executable(s))} == {}


def test_experiments_are_not_imported():
    assert [m for m, s in SOURCES.items() if {t.split(".")[0] for t in imports(m, s)} & {"experiments", "tools"}] == []


def fresh_modules(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    code += "\nimport json, sys\nprint(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_bmjax_loads_nothing_heavy():
    loaded = fresh_modules("import bmjax")
    assert "bmjax" in loaded
    heavy = {
        "wandb",
        "tensorflow_datasets",
        "orbax",
        "matplotlib",
        "tensorflow",
        "torch",
        "keras",
        "sklearn",
        "pyarrow",
    }
    assert loaded & heavy == set()


def test_the_public_api_exists_and_needs_no_tensorflow():
    loaded = fresh_modules("import bmjax\nfor name in bmjax.__all__: getattr(bmjax, name)")
    assert loaded & {"tensorflow", "torch", "keras"} == set()
