"""From a list of files to the training part and the held-out part."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from edge.data.encode import Encoder, Example
from edge.data.errors import DataError, Origin
from edge.data.records import TextRecord, read_records

#: Held out without `--eval`: the last of so many equal parts of the records.
HELD_OUT_PART = 20


def load_examples(paths: list[Path], tokenizer: PreTrainedTokenizerBase, seq: int) -> list[Example]:
    """The examples of all files, in order, each of 2 to `seq` tokens.

    Raises DataError for bad input, for a file that is given twice, and if nothing is left to learn from.
    """
    return [example for unit in _load_units(paths, tokenizer, seq) for example in unit]


def load_data(
    data: list[Path], held_out: list[Path] | None, tokenizer: PreTrainedTokenizerBase, seq: int
) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and the held-out ones; no record gives examples to both.

    Without `held_out` files, the last 5% of the records of all `data` are held out, at least one. The
    windows of a `.txt` file count as records, and so do those of the only record there is.

    Raises DataError as `load_examples` does, for a file in both lists, and for too little data to hold a part out.
    """
    if held_out:
        _refuse_repeated(data + held_out)
        return load_examples(data, tokenizer, seq), load_examples(held_out, tokenizer, seq)
    units = _load_units(data, tokenizer, seq)
    if len(units) == 1:
        units = [[example] for example in units[0]]
    if len(units) < 2:
        raise DataError(
            f"{_names(data)}: one example is too little to hold a part out; "
            "give more data, a smaller --seq, or a held-out file with --eval"
        )
    border = len(units) - max(1, len(units) // HELD_OUT_PART)
    train, held = units[:border], units[border:]
    return [example for unit in train for example in unit], [example for unit in held for example in unit]


def _load_units(paths: list[Path], tokenizer: PreTrainedTokenizerBase, seq: int) -> list[list[Example]]:
    """The examples of each record (of each window for a `.txt` file), without records that give none."""
    _refuse_repeated(paths)
    encoder = Encoder(tokenizer, seq)
    units: list[list[Example]] = []
    for path in paths:
        for record in read_records(path):
            examples = encoder.examples(record)
            if isinstance(record, TextRecord) and record.whole_file:
                units += [[example] for example in examples]
            elif examples:
                units.append(examples)
    if not units:
        raise DataError(f"{_names(paths)}: no record is long enough to learn from; give longer texts")
    return units


def _refuse_repeated(paths: list[Path]) -> None:
    """A file twice would put what is held out into the training part."""
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise Origin(path).error("is given twice; give every file once, either in --data or in --eval")
        seen.add(path.resolve())


def _names(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))
