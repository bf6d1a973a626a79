"""The direction of imports, and that what is installed belongs to this distribution alone."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: package -> what it may import of the project's own packages
ALLOWED = {
    "messaging": {"messaging"},
    "profiles": {"profiles"},
    "blocks": {"blocks", "messaging"},
    "edge": {"edge", "blocks", "messaging", "profiles"},
    "hub": {"hub", "blocks", "messaging", "profiles"},
}
OWN = {*ALLOWED, "tools", "tests"}


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_downwards_only(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad) for path in files if (bad := (imports(path) & OWN) - ALLOWED[package])
    }
    assert not wrong


@pytest.mark.parametrize("package", ["messaging"])
def test_messaging_knows_no_torch(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not imports(path) & {"torch", "transformers", "peft", "safetensors"}, path


def test_profiles_knows_torch_only_in_the_probe() -> None:
    for path in (ROOT / "profiles").rglob("*.py"):
        if path.stem != "probe":
            assert "torch" not in imports(path), path


def test_installed_names_belong_to_this_distribution_alone() -> None:
    owners = packages_distributions()
    for package in ALLOWED:
        if package not in owners:
            pytest.skip(f"{package} is not installed in {sys.prefix}")
        assert set(owners[package]) == {"fedsea"}


def test_tests_and_tools_are_not_packaged() -> None:
    owners = packages_distributions()
    assert not [name for name in ("tests", "tools") if "fedsea" in owners.get(name, [])]
