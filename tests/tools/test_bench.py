"""The bookkeeping of the benchmarks: rows, what is missing, the JSON."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tools.bench import __main__ as command
from tools.bench import groups
from tools.bench.sessions import bound
from tools.table import Row, Skipped, Table, at_least, at_most, reported


def test_a_row_is_met_at_its_target() -> None:
    assert at_least("speed", 0.9, 0.9) == Row("speed", 0.9, ">= 0.9", True)
    assert at_least("speed", 0.8999, 0.9).met is False
    assert at_most("bytes", 16, 16) == Row("bytes", 16, "<= 16", True)
    assert at_most("bytes", 16.1, 16).met is False
    assert reported("memory", 12.3456) == Row("memory", 12.346, None, None)


def test_a_figure_is_judged_before_it_is_rounded() -> None:
    row = at_least("speed", 0.89999, 0.9)
    assert (row.figure, row.met) == (0.9, False)


def test_what_several_edges_can_decode_follows_from_their_core_and_the_hubs() -> None:
    hub_s = {1: 0.015, 2: 0.016, 4: 0.020, 8: 0.024}
    # Half of them in each batch: the hub is the narrow place.
    assert bound(4, 0.005, hub_s) == pytest.approx(2 / 0.016)
    # The edges' core is.
    assert bound(8, 0.010, hub_s) == pytest.approx(100)
    # A batch costs nearly the same however many are in it: all at once, and the hub waits for them.
    assert bound(4, 0.001, {2: 0.0200, 4: 0.0201}) == pytest.approx(4 / 0.0241)


def test_a_row_that_is_neither_measured_nor_skipped_is_missing() -> None:
    table = Table("t", ("one", "two", "three"))
    table.add(reported("one", 1.0), Skipped("two", "no data here"))
    assert table.missing() == ["three"]


def test_the_json_holds_rows_and_what_was_skipped(tmp_path: Path) -> None:
    table = Table("t", ("one", "two"))
    table.add(at_least("one", 2.0, 1.0), Skipped("two", "no data here"))
    table.write(tmp_path / "new" / "bench.json")
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written["rows"] == [{"row": "one", "figure": 2.0, "target": ">= 1", "met": True}]
    assert written["skipped"] == [{"row": "two", "reason": "no data here"}]
    assert written["missing"] == []


def test_the_table_shows_every_row() -> None:
    table = Table("t", ("one", "two", "three"))
    table.add(at_least("one", 2.0, 1.0), Skipped("two", "no data here"))
    text = io.StringIO()
    table.show(Console(file=text, width=120))
    assert "one" in text.getvalue()
    assert "two: no data here" in text.getvalue()
    assert "missing: three" in text.getvalue()


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups in the place of the real ones: one that measures, one that fails."""

    def measures(bench: groups.Bench) -> list[Row]:
        return [at_least("one", 0.5 if bench.quick else 1.5, 1.0)]

    def fails(bench: groups.Bench) -> list[Row]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(groups, "GROUPS", {"good": (measures, ("one",)), "bad": (fails, ("two",))})


@pytest.mark.usefixtures("small_groups")
def test_a_missed_target_is_no_failure_but_a_missing_row_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert command.main(["--rows", "good", "--quick", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["rows"][0]["met"] is False
    assert "good: 0 s" in capsys.readouterr().out
    assert command.main(["--json", str(file)]) == 1
    written = json.loads(file.read_text())
    assert (written["rows"][0]["met"], written["missing"]) == (True, ["two"])
    assert "no such thing" in capsys.readouterr().err


@pytest.mark.usefixtures("small_groups")
def test_unknown_rows_are_refused() -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--rows", "good,other"])
    assert ended.value.code == 2


def test_every_row_is_named_once() -> None:
    names = [row for _, rows in groups.GROUPS.values() for row in rows]
    assert len(names) == len(set(names))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_this_process_is_known() -> None:
    from tools.bench.processes import peak_bytes

    assert peak_bytes() > 10 * 2**20
