"""The files under deploy/: sound units, limits that are there, images that hold what is packaged."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = ("fedsea-hub.service", "fedsea-edge.service")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_has_no_mistakes(unit: str, tmp_path: Path) -> None:
    # That the command is executable is checked too, and nothing is installed here.
    text = re.sub(r"/opt/fedsea/bin/\w+", "/bin/true", (DEPLOY / unit).read_text())
    (tmp_path / unit).write_text(text)
    done = analyze("verify", tmp_path / unit)
    assert (done.returncode, done.stderr.strip()) == (0, "")


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_is_hardened(unit: str) -> None:
    done = analyze("security", "--offline=true", "--threshold=20", DEPLOY / unit)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_has_its_limits(unit: str) -> None:
    lines = (DEPLOY / unit).read_text().splitlines()
    for setting in ("MemoryHigh=", "MemoryMax=", "TasksMax=", "LimitNOFILE=", "TimeoutStopSec=", "RestartSec="):
        assert any(line.startswith(setting) for line in lines), setting
    for line in ("User=fedsea", "UMask=0077", "NoNewPrivileges=yes", "ProtectSystem=strict", "LimitCORE=0"):
        assert line in lines
    assert f"Restart={'always' if 'hub' in unit else 'on-failure'}" in lines


def test_options_in_the_units_and_images_exist() -> None:
    hub, edge = (ROOT / "hub" / "cli.py").read_text(), (ROOT / "edge" / "cli.py").read_text()
    of_hub = ("fedsea-hub.service", "hub.env", "Dockerfile")
    for names, source in ((of_hub, hub), (("fedsea-edge.service", "edge.env"), edge)):
        for name in names:
            used = "\n".join(
                line for line in (DEPLOY / name).read_text().splitlines() if re.match("Exec|CMD|FEDSEA", line)
            )
            for option in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", used):
                parameter = re.search(rf"^    {option.replace('-', '_')}: ", source, re.MULTILINE)
                assert f'"--{option}"' in source or parameter, f"{name}: --{option}"


def services() -> dict[str, dict[str, Any]]:
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    found: dict[str, dict[str, Any]] = content["services"]
    return found


@pytest.mark.parametrize("name", ["hub", "edge"])
def test_containers_have_the_limits_of_the_units(name: str) -> None:
    service = services()[name]
    unit = (DEPLOY / f"fedsea-{name}.service").read_text()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "10001:10001"
    assert f"TasksMax={service['pids_limit']}\n" in unit
    assert f"LimitNOFILE={service['ulimits']['nofile']}\n" in unit
    assert f"TimeoutStopSec={service['stop_grace_period'].removesuffix('s')}\n" in unit
    memory = re.search(r"MemoryMax=(\d+)G", unit)
    assert memory is not None
    assert f":-{memory[1]}g}}" in service["mem_limit"]
    assert service["mem_limit"] == service["memswap_limit"]


def test_the_health_check_is_a_program() -> None:
    command = services()["hub"]["healthcheck"]["test"]
    assert command[:3] == ["CMD", "python", "-c"]
    compile(command[3], "health check", "exec")


def test_the_image_holds_every_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = {name.partition(".")[0] for name in packages}
    text = (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE)) == tops
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert all((ROOT / name).exists() and f"!{name}" in allowed for name in copied)
