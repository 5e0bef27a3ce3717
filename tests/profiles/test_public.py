"""The public face of the package, and what importing it costs."""

import subprocess
import sys

import profiles


def test_all_is_exact() -> None:
    assert set(profiles.__all__) == {
        "BackendUnavailable",
        "BuildError",
        "EspalierError",
        "Fit",
        "Machine",
        "PlanError",
        "Profile",
        "ProfileError",
        "detect",
        "fit",
        "load",
        "names",
        "why",
        "why_not",
    }
    assert all(hasattr(profiles, name) for name in profiles.__all__)


def test_importing_and_detecting_loads_no_runtime() -> None:
    heavy = {"torch", "numpy", "onnxruntime", "openvino", "planner", "backends", "tools"}
    code = f"import sys, profiles; profiles.detect(); print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
