"""The group `context`: decoding with keys and values kept at the hub, against splitting a model naively.

Naively, both sides compute the whole context for each token, because nobody keeps keys and values. Such a split would
also send a mask with as many entries as the square of the context. That is left out here, in its favour.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tools.bench.processes import running_hub, running_workers
from tools.table import Row, at_least

TIMES = {
    length: f"KV and mask: tokens/s at {length:,} tokens of context, split / naive splitting" for length in (1000, 4000)
}
_LEAST = {1000: 8, 4000: 30}


def context(bench: object) -> Sequence[Row]:
    """A real hub and a real edge, each on its core; the naive turns go through the same two processes."""
    from tools.bench.groups import Bench, connect

    assert isinstance(bench, Bench)
    folder, model = bench.folder / "context", bench.models.standard
    rows = []
    with running_hub(folder, model) as hub, running_workers(folder) as (worker,):
        connect(worker, hub, folder / "edge", model)
        for length, row in TIMES.items():
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(1 if bench.quick else 3):
                for naive, tokens in ((False, 16), (True, 1 if bench.quick else 2)):
                    seconds[naive].append(worker.ask("at_context", length=length, tokens=tokens, naive=naive))
            split, naively = statistics.median(seconds[False]), statistics.median(seconds[True])
            bench.say(f"a token at {length} of context: split {split:.3f} s, naive {naively:.3f} s")
            rows.append(at_least(row, naively / split, _LEAST[length]))
    return rows
