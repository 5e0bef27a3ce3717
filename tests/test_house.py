"""The rules of the house: imports point one way, public names are the documented ones, packages stay light."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = {"profiles": 0, "planner": 1, "backends": 2, "tools": 3}
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = ORDER[path.relative_to(ROOT).parts[0]]
    assert not {name for name in imported(path) if ORDER.get(name, -1) > own}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert length <= 45, f"{node.name} has {length} lines"


def test_profiles_do_not_import_torch() -> None:
    assert not {path.name for path in FILES if path.parts[-2] == "profiles" and "torch" in imported(path)}


@pytest.mark.parametrize("package", ORDER)
def test_importing_a_package_loads_no_runtime(package: str) -> None:
    heavy = ("onnxruntime", "openvino", "onnx", "sklearn", "executorch", "torchao", "nncf", "tensorrt")
    code = f"import sys, {package}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["profiles", "planner", "backends"])
def test_public_names_are_exactly_the_documented_ones(package: str) -> None:
    module = importlib.import_module(package)
    exported = {name for name in vars(module) if not name.startswith("_")}
    submodules = {path.stem for path in (ROOT / package).iterdir()}
    assert exported - submodules <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    row = re.search(rf"^\| `{package}` \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert row, f"the README has no row of public names for {package}"
    assert set(re.findall(r"`(\w+)`", row[1])) == set(module.__all__)


@pytest.mark.parametrize("package", ORDER)
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
