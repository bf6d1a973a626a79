"""What is fuzzed: modules with `run`, a function of bytes that must end well or in the one named error of its kind,
and `seeds`, valid inputs that the fuzzer begins with. Anything else that `run` raises is a fault."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

#: Modules beside this one. Each is imported when it is wanted: some need torch.
NAMES = ("decode", "layout", "join_string", "upload", "planes")


@dataclass(frozen=True)
class Target:
    """A function to fuzz, and inputs that get far in it."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def target(name: str) -> Target:
    """One of NAMES, imported."""
    module = importlib.import_module(f"tools.fuzz.{name}")
    return Target(module.run, module.seeds)
