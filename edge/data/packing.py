"""Several short examples in one row, for the models that keep them apart exactly."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from edge.data.encode import MIN_TOKENS, Example

#: The examples that share a row; without packing always one.
Row = tuple[Example, ...]

#: `config.model_type` of the models for which packed logits and loss equal those of each example alone, to
#: rounding; a test holds each. The others (alibi, recurrent layers, masks built without `position_ids`) would
#: let a segment see the ones before it.
PACKS_EXACTLY = frozenset(
    {
        "cohere",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)


def pack(examples: Sequence[Example], seq: int) -> list[Row]:
    """Rows of at most `seq` tokens: each example in turn goes where it leaves the least space, else opens a row."""
    rows: list[list[Example]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, number of the row) where another example may fit, sorted
    for example in examples:
        at = bisect_left(spaces, (len(example), 0))
        if at < len(spaces):
            free, number = spaces.pop(at)
        else:
            free, number = seq, len(rows)
            rows.append([])
        rows[number].append(example)
        if free - len(example) >= MIN_TOKENS:
            insort(spaces, (free - len(example), number))
    return [tuple(row) for row in rows]
