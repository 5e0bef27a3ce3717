"""Extras: the tested versions agree with what is asked for, and each runtime works where the others are not."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import backends

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
UNPINNED = {"tensorrt"}  # wants CUDA, and is not installed where the others are tested
PACKAGES = {  # what `import` finds of each extra
    "onnxruntime": {"onnx", "onnxruntime"},
    "openvino": {"onnx", "openvino"},
    "executorch": {"executorch", "torchao"},
    "tensorrt": {"tensorrt"},
}
ALONE = """
import sys, tempfile, torch
blocked = set(sys.argv[2:])

class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import backends
from profiles.errors import BackendUnavailable

for name in backends.registry.known():
    try:
        backends.load(name)
        print("here", name)
    except BackendUnavailable as error:
        print("absent", name, error)
runtime, model, x = backends.load(sys.argv[1]), torch.nn.Linear(3, 2).eval(), torch.randn(1, 3)
with tempfile.TemporaryDirectory() as folder:
    artifact = runtime.build(model, (x,), None, f"{folder}/model{runtime.SUFFIX}")
    found = runtime.session(artifact, model=model)((x,))[0]
print("differs by", abs(found - model(x).detach().numpy()).max())
print("imported", *blocked & {name.partition(".")[0] for name in sys.modules})
"""


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def asked(names: list[str]) -> list[Requirement]:
    """Return the requirements, those of the extras that they name in place of these."""
    found = []
    for requirement in map(Requirement, names):
        if requirement.name == PROJECT["name"]:
            found += [each for extra in sorted(requirement.extras) for each in asked(EXTRAS[extra])]
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_package_that_is_asked_for_has_a_tested_version_that_will_do(extra: str) -> None:
    tested = pins()
    for requirement in asked(EXTRAS[extra] if extra else PROJECT["dependencies"]):
        name = canonicalize_name(requirement.name)
        if name not in UNPINNED:
            assert name in tested, f"constraints.txt has no {name}"
            assert requirement.specifier.contains(tested[name]), (
                f"{requirement}, but constraints.txt has {tested[name]}"
            )


def test_the_tested_versions_want_each_other() -> None:
    """Each package, as its metadata has it, takes the tested versions of the others: all install together."""
    tested, compared = pins(), 0
    extras = {canonicalize_name(each.name): each.extras for own in EXTRAS.values() for each in asked(own)}
    for name, version in tested.items():
        try:
            own = distribution(name)
        except PackageNotFoundError:
            continue
        if own.version.partition("+")[0] != version:
            continue  # another version than the one tested: its wishes are another's
        for requirement in map(Requirement, own.requires or ()):
            wanted = canonicalize_name(requirement.name)
            applies = [
                not requirement.marker or requirement.marker.evaluate({"extra": extra})
                for extra in ("", *extras.get(name, ()))
            ]
            if wanted in tested and any(applies):
                compared += 1
                assert requirement.specifier.contains(tested[wanted]), f"{name} {version} wants {requirement}"
    if not compared:
        pytest.skip("none of the tested versions is installed here")


@pytest.mark.parametrize("name", backends.registry.known())
def test_the_pip_line_of_a_runtime_names_an_extra_that_brings_it(name: str) -> None:
    extra = re.fullmatch(r"pip install '?espalier(?:\[([\w-]+)\])?'?", backends.registry._module(name).EXTRA)
    assert extra is not None
    brought = asked(EXTRAS[extra[1]] if extra[1] else PROJECT["dependencies"])
    assert {"pytorch": "torch"}.get(name, name) in {each.name for each in brought}


def test_all_brings_what_every_other_extra_brings() -> None:
    every = {(each.name, str(each.specifier)) for each in asked(EXTRAS["all"])}
    for extra in set(PACKAGES) - UNPINNED:
        assert {each.name for each in asked(EXTRAS[extra])} <= {name for name, _ in every}, extra


@pytest.mark.parametrize("name", ["pytorch", *PACKAGES])
def test_a_runtime_works_where_no_other_is_installed_and_those_say_how_to_install_them(name: str) -> None:
    if name not in backends.installed():
        pytest.skip(f"{name} is not installed")
    if name == "executorch" and not os.environ.get("ESPALIER_LONG"):
        pytest.skip("takes ten seconds; ESPALIER_LONG=1 runs it")
    others = {"nncf", "ethosu", "sklearn"}.union(*PACKAGES.values()) - PACKAGES.get(name, set())
    command = [sys.executable, "-c", ALONE, name, *sorted(others)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("here")] == [f"here {each}" for each in sorted({name, "pytorch"})]
    absent = [line for line in lines if line.startswith("absent")]
    for line, other in zip(absent, sorted(set(PACKAGES) - {name}), strict=True):
        assert line.startswith(f"absent {other} {other} is not installed")
        assert line.endswith(f"pip install 'espalier[{other}]'")
    assert float(lines[-2].removeprefix("differs by")) < 1e-5
    assert lines[-1] == "imported"
