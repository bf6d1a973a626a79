import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CODE = """
from hub.pages import ask_for_huge_pages
{ask}
import hub.engine
import torch
kept = torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(open("/proc/self/smaps").read())
"""


_PLAIN = """
import mmap
kept = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
kept.madvise(mmap.MADV_HUGEPAGE)
kept.write(bytes([1]) * len(kept))
print(open("/proc/self/smaps").read())
"""


def _huge_kib(code: str) -> int:
    """Of the memory of a process that fills 64 MiB, what lies in huge pages."""
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"AnonHugePages: +(\d+) kB", out)))


def test_the_hubs_tensors_lie_in_huge_pages() -> None:
    if not _MODE.exists() or "[madvise]" not in _MODE.read_text():
        pytest.skip("needs Linux with huge pages for those who ask (transparent_hugepage/enabled: madvise)")
    if _huge_kib(_PLAIN) < 48 << 10:
        pytest.skip("this machine's memory is too scattered for huge pages")
    assert _huge_kib(_CODE.format(ask="ask_for_huge_pages()")) >= 32 << 10
    assert _huge_kib(_CODE.format(ask="")) == 0


_SERVING = """
import os, sys, types

class Serve(types.ModuleType):
    def __getattr__(self, name):
        if name == "Options":
            print(os.environ.get("THP_MEM_ALLOC_ENABLE"), "torch" in sys.modules)
            return dict
        if name == "serve":
            return lambda options: None
        raise AttributeError(name)

sys.modules["hub.serve"] = Serve("hub.serve")
sys.argv = ["hub", "serve"]
from hub.cli import main
main()
"""


def test_hub_serve_asks_before_it_imports_what_brings_torch() -> None:
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    run = subprocess.run([sys.executable, "-c", _SERVING], env=env, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["1", "False"], run.stderr


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from hub.pages import ask_for_huge_pages

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    ask_for_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
