"""The benchmark of the memory prediction: its models, and one row of its table."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from tools import bench_memory
from tools.bench_memory import CALIBRATION, HELD_OUT


def test_no_model_of_the_table_took_part_in_the_fit() -> None:
    assert len(HELD_OUT) == 3
    assert all(len(set(model.partitions)) == 3 for model in HELD_OUT)
    fitted = {model.config["model_type"] for model in CALIBRATION}
    assert not fitted & {model.config["model_type"] for model in HELD_OUT}


def test_the_benchmark_predicts_what_it_measures() -> None:
    # a model of six hosted layers and one on the hub, whatever the partition
    parts = bench_memory.predict(HELD_OUT[0], 2, 4)
    assert parts.weights > bench_memory.predict(HELD_OUT[0], 1, 1).weights
    assert parts.logits == 4 * 4 * 4 * 160 * 24000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
def test_a_measured_row_is_within_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    # the measuring process has the whole list, so the row must be one of its first model
    monkeypatch.setattr(bench_memory, "MODELS", {"held-out": [replace(HELD_OUT[0], partitions=((1, 1),))]})
    (row,) = bench_memory.bench("held-out", runs=1)
    assert set(row) == {"row", "figure", "target", "met"}
    assert row["met"], row
