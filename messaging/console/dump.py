"""A snapshot as a JSON file, for other processes to read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any


def write_snapshot(path: Path, snapshot: Any) -> None:
    """Write a dataclass to the file atomically; a reader sees the old one or the new one, never half of it."""
    text = json.dumps(_plain(dataclasses.asdict(snapshot)), allow_nan=False)
    fresh = path.with_name(path.name + ".new")
    # For the owner alone: it tells who trains here, and the log may say more.
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(fresh, path)


def read_snapshot(path: Path) -> dict[str, Any]:
    """The fields of the snapshot in the file; raises OSError, or ValueError where it holds none."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no snapshot")
    return fields


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
