"""One torch thread in tests: spinning pools on shared cores ruin each other, and results stay bit-stable."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tools.programs import Programs

# How long an example takes says nothing about it: the cores may be shared.
settings.register_profile("shared cores", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared cores")


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Starts commands; ends them after the test."""
    with Programs(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def module_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """The same for processes that a module's tests share."""
    with Programs(tmp_path_factory.mktemp("programs")) as started:
        yield started
