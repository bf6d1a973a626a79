"""Memory limits of Linux control groups, which containers and batch systems set and psutil does not see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: From here on a version 1 limit means "none": the kernel's largest number, rounded to pages.
UNLIMITED = 2**60


def cgroup_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """The tightest memory limit over this process and what is left of it, both in bytes; None where there is none.

    Page cache that the kernel can drop counts as left. `root` is where /proc and /sys are looked for.
    """
    found = [pair for group in _groups(root) if (pair := _limit_and_left(group)) is not None]
    return min(found, key=lambda pair: pair[1]) if found else None


def _groups(root: Path) -> Iterator[Path]:
    """The memory groups of this process, innermost first, of either version of the interface."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
        else:
            continue
        # inside a container the path may be the host's; the container's own group is then at the base
        group = base / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(base))


def _limit_and_left(group: Path) -> tuple[int, int] | None:
    for limit_name, used_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is not None and used is not None and limit < UNLIMITED:
            return limit, max(limit - used + _statistic(group / "memory.stat", cache_name), 0)
    return None


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
