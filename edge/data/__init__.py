"""From the user's files to training batches.

Reading order: `records` (files to records), `chat` and `encode` (records to token examples), `load` (many
files, held-out part), `packing` and `batches` (examples to padded or packed tensors in a reproducible order).
"""

from edge.data.batches import Batch, BatchSource, eval_batches
from edge.data.encode import Example
from edge.data.errors import DataError
from edge.data.load import load_data, load_examples
from edge.data.packing import PACKS_EXACTLY

__all__ = [
    "PACKS_EXACTLY",
    "Batch",
    "BatchSource",
    "DataError",
    "Example",
    "eval_batches",
    "load_data",
    "load_examples",
]
