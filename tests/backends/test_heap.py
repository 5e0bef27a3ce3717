"""Memory that is freed while something is timed is not taken from the process."""

import os
import subprocess
import sys

import pytest

from backends import heap

SCRIPT = """
import resource, torch
from backends import heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12 << 20).sum()  # 48 MiB, above what malloc keeps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
print(faults())
with heap.held():
    faults()
    print(faults())
print(faults())
"""


def run(**environment: str) -> list[int]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env={**own, **environment}
    )
    return [int(line) for line in done.stdout.split()]


needs_glibc = pytest.mark.skipif(not heap.kept(), reason="only glibc's malloc, with its own settings, is told to keep")


@needs_glibc
def test_what_is_freed_inside_stays_and_what_is_freed_outside_goes() -> None:
    before, inside, after = run()
    assert before > 20  # at the least, in pages of 2 MiB
    assert inside < before / 10
    assert after > 20


@needs_glibc
def test_the_environment_does_the_same() -> None:
    assert max(run(**heap.ENVIRONMENT)) < 10


def test_what_the_user_chose_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "10")
    assert not heap.kept()


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    assert not heap.kept()
    with heap.held():
        pass
