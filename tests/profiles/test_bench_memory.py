"""The benchmark of the memory prediction: its models, and one row of its table."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from blocks.partition import Partition
from tools import bench_memory
from tools.bench_memory import CALIBRATION, HELD_OUT


def test_no_model_of_the_table_took_part_in_the_fit() -> None:
    assert len(HELD_OUT) == 3
    assert all(len(set(model.partitions)) == 3 for model in HELD_OUT)
    fitted = {model.config["model_type"] for model in CALIBRATION}
    assert not fitted & {model.config["model_type"] for model in HELD_OUT}


def test_the_benchmark_predicts_what_it_measures() -> None:
    model = HELD_OUT[0]
    whole, smallest = (bench_memory.predict(model, p, q) for p, q in ((2, 4), (1, 1)))
    cut = bench_memory.build_edge(
        bench_memory._transformers_config(model.config, layers=7), Partition(2, 4), torch.float32
    )
    assert whole.weights == 4 * sum(weight.numel() for weight in cut.model.parameters())
    assert whole.weights > smallest.weights


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
def test_a_measured_row_is_within_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    # the measuring process has the whole list, so the row must be one of its first model
    monkeypatch.setattr(bench_memory, "MODELS", {"held-out": [replace(HELD_OUT[0], partitions=((1, 1),))]})
    (row,) = bench_memory.bench("held-out", runs=3)
    assert set(row) == {"row", "figure", "target", "met"}
    assert row["met"], row
