"""What takes long says how far it is, on a terminal and off it; what does not says nothing."""

from __future__ import annotations

import io
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from messaging.console import Journal, LiveView, View, plain_lines
from messaging.console.tasks import Task, TaskLines, Tasks

MIB = 1 << 20
VIEW: View[str] = View(lambda text, width, height: Text(f"{text} {width}x{height}", end=""), str, str)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fetching(clock: Clock) -> Task:
    """120 of 480 MiB in 12 s, 20 of them there before."""
    task = Task("fetching blocks", 480 * MIB, "bytes", clock)
    task.found(20 * MIB)
    for _ in range(24):
        clock.now += 0.5
        task.advance(100 * MIB / 24)
    return task


def test_a_line_has_amount_speed_and_time_left() -> None:
    assert fetching(Clock()).line() == "fetching blocks: 120 MiB of 480 MiB, 8.3 MiB/s, 43 s left"


def test_the_speed_is_that_of_late() -> None:
    clock = Clock()
    task = fetching(clock)
    for _ in range(40):
        clock.now += 0.5
        task.advance(MIB / 2)
    assert "1.0 MiB/s" in task.line()
    clock.now += 60
    assert "MiB/s" not in task.line() or "KiB/s" in task.line() or "0." in task.line()


def test_without_a_total_it_says_how_long_or_how_much() -> None:
    clock = Clock()
    probing, tokens = Task("probing this machine", None, "bytes", clock), Task("held-out loss", None, "tokens", clock)
    clock.now += 7
    tokens.advance(1234)
    assert probing.line() == "probing this machine: 7 s so far"
    assert tokens.line() == "held-out loss: 1,234 tokens"


def test_counts_are_no_bytes() -> None:
    clock = Clock()
    task = Task("repeating steps", 40, "steps", clock)
    clock.now += 4
    task.advance(10)
    assert task.line() == "repeating steps: 10 of 40 steps, 12 s left"


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
@pytest.mark.parametrize("title", ["fetching blocks", "x" * 100, "a\x1b[31m\nb"])
def test_the_bar_fits_its_line(width: int, title: str) -> None:
    task = fetching(Clock())
    task.title = title
    text = task.bar(width)
    assert cell_len(text.plain) <= width
    assert text.plain.isprintable()


def test_the_bar_shows_the_share() -> None:
    plain = fetching(Clock()).bar(120).plain
    assert re.search(r"fetching blocks ━{10}─{30}  120 MiB of 480 MiB  8.3 MiB/s  43 s left", plain)


def test_only_what_takes_long_is_shown_the_latest_first() -> None:
    clock = Clock()
    tasks = Tasks(clock)
    outer = tasks.begin("outer", None, "bytes")
    assert tasks.shown() is None
    clock.now += 2
    inner = tasks.begin("inner", None, "bytes")
    assert tasks.shown() is outer
    clock.now += 2
    assert tasks.shown() is inner
    tasks.end(inner)
    tasks.end(outer)
    assert tasks.shown() is None


def test_a_line_every_few_seconds() -> None:
    clock = Clock()
    tasks = Tasks(clock)
    lines = TaskLines(tasks, 5.0, clock)
    task = tasks.begin("loading", None, "bytes")
    said = []
    for _ in range(30):
        said.append(lines.due() is not None)
        clock.now += 0.5
    assert [at / 2 for at, line in enumerate(said) if line] == [2.0, 7.0, 12.0]
    tasks.end(task)
    assert lines.due() is None


def test_the_journal_says_when_a_long_task_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    journal = Journal()
    journal.tasks = Tasks(clock)
    with journal.task("quick"):
        clock.now += 1
    with journal.task("slow"):
        clock.now += 65
    with suppress(ValueError), journal.task("failing"):
        clock.now += 65
        raise ValueError
    assert [line[9:] for line in journal.recent()] == ["slow: done in 1 min 05 s"]
    assert journal.tasks.shown() is None


def begun_long_ago(journal: Journal) -> None:
    clock = Clock()
    journal.tasks = Tasks(clock)
    task = journal.tasks.begin("fetching blocks", 100, "bytes")
    clock.now += 3
    task.advance(50)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    encoding = "utf-8"


def test_the_screen_shows_the_bar_under_the_view() -> None:
    journal, file = Journal(), Terminal()
    begun_long_ago(journal)
    console = Console(file=file, force_terminal=True, width=80, height=20, legacy_windows=False)
    with LiveView(lambda: "view", VIEW, journal, console=console, period_s=60):
        pass
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert re.search(r"view 80x18 *\r?\n +fetching blocks ━+╸?─+  50 B of 100 B", shown)


def test_lines_off_a_terminal() -> None:
    journal, file = Journal(), io.StringIO()
    begun_long_ago(journal)
    with LiveView(lambda: "view", VIEW, journal, console=Console(file=file), period_s=60):
        pass
    assert re.fullmatch(r"\d\d:\d\d:\d\d fetching blocks: 50 B of 100 B, 17 B/s, 3 s left\n", file.getvalue())


def test_commands_without_a_view_print_lines_too(tmp_path: Path) -> None:
    journal = Journal()
    journal.log("before")
    begun_long_ago(journal)
    with (tmp_path / "out").open("w") as file, plain_lines(journal, file, 0.1):
        journal.log("meanwhile")
        for _ in range(100):
            if "fetching" in (tmp_path / "out").read_text():
                break
            time.sleep(0.05)
    lines = [line[9:] for line in (tmp_path / "out").read_text().splitlines()]
    assert lines[:2] == ["before", "meanwhile"]
    assert lines[2].startswith("fetching blocks: 50 B of 100 B")
