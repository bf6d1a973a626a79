"""Records become examples: token ids, and a label for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from edge.data.chat import Segment, chat_segments
from edge.data.errors import DataError, Origin
from edge.data.records import ChatRecord, PairRecord, Record, TextRecord

#: The label of a position that is no target; torch's cross entropy leaves it out.
NOT_A_TARGET = -100

#: The fewest tokens of an example: one to predict, and one to predict it from.
MIN_TOKENS = 2

#: Characters that are tokenized at once: long enough to be fast, short enough to keep the tokenizer's memory small.
PIECE_CHARS = 1 << 16

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Example:
    """What one forward sees: `input_ids` [S] and `labels` [S], int32; a label is the id itself or -100.

    The labels are not shifted: position s is predicted from the positions before it, so the first label never counts.
    """

    input_ids: Ids
    labels: Ids

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        """Positions that count in the loss."""
        return int((self.labels[1:] != NOT_A_TARGET).sum())


class Encoder:
    """Turns records into examples of at most `seq` tokens; `seq` below 2 raises DataError."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq: int) -> None:
        if seq < MIN_TOKENS:
            raise DataError(f"--seq {seq} leaves nothing to predict; use at least {MIN_TOKENS}")
        self._tokenizer = tokenizer
        self._seq = seq
        self._prefix, self._suffix = self._added_by_tokenizer()

    def examples(self, record: Record) -> list[Example]:
        """The record's examples, in order; none for a text too short to predict anything.

        Raises DataError for a prompt that leaves no room for its completion, and as `chat_segments` does.
        """
        match record:
            case TextRecord():
                return self._windows(record.text)
            case PairRecord():
                return self._fitted([self._encode_pair(record)], record.origin)
            case ChatRecord():
                # The template writes the special tokens itself.
                turns = chat_segments(record, self._tokenizer)
                return self._fitted([self._encode_segments(segments) for segments in turns], record.origin)

    def _windows(self, text: str) -> list[Example]:
        """Disjoint windows of the whole text; a last one of a single token, which predicts nothing, is left out."""
        if not text:
            return []
        ids = np.fromiter(chain(self._prefix, self._stream_ids(text), self._suffix), dtype=np.int32)
        windows = [ids[start : start + self._seq] for start in range(0, len(ids), self._seq)]
        return [Example(window, window) for window in windows if len(window) >= MIN_TOKENS]

    def _encode_pair(self, record: PairRecord) -> Example:
        """Prefix, prompt, completion, eos. The suffix is left out: it would end the text after the prompt."""
        coded = self._encode_segments(
            [Segment(record.prompt, is_target=False), Segment(record.completion, is_target=True)]
        )
        eos = self._tokenizer.eos_token_id
        end = [] if eos is None or coded.labels[-1:].tolist() == [eos] else [eos]
        before = [NOT_A_TARGET] * len(self._prefix)
        return Example(
            np.array([*self._prefix, *coded.input_ids, *end], dtype=np.int32),
            np.array([*before, *coded.labels, *end], dtype=np.int32),
        )

    def _encode_segments(self, segments: list[Segment]) -> Example:
        """The segments' tokens, each cut off at the segment's end so that no token is half target, half not."""
        ids: list[int] = []
        labels: list[int] = []
        text = ""
        head: list[int] = []  # the tokens of `text`
        for segment in segments:
            text += segment.text
            joined = self._ids(text)
            new = self._new_ids(head, joined, segment.text)
            ids += new
            labels += new if segment.is_target else [NOT_A_TARGET] * len(new)
            head = joined
        return Example(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))

    def _fitted(self, examples: list[Example], origin: Origin) -> list[Example]:
        """The examples cut off at `seq` tokens, without those that have no target."""
        learnable = [example for example in examples if example.targets]
        cut = [Example(example.input_ids[: self._seq], example.labels[: self._seq]) for example in learnable]
        fitted = [example for example in cut if example.targets]
        if learnable and not fitted:
            first = learnable[0]
            prompt = int(np.argmax(first.labels[1:] != NOT_A_TARGET)) + 1
            raise origin.error(
                f"the prompt has {prompt} tokens and leaves no room for its completion in --seq {self._seq}; "
                "raise --seq or shorten the prompt"
            )
        return fitted

    def _stream_ids(self, text: str) -> Iterator[int]:
        """The text's tokens, tokenized piece by piece."""
        pieces = _pieces(text)
        yield from self._ids(pieces[0])
        for last, piece in pairwise(pieces):
            border = last[-1]
            yield from self._new_ids(self._ids(border), self._ids(border + piece), piece)

    def _new_ids(self, head: list[int], joined: list[int], text: str) -> list[int]:
        """The tokens of `text` within `joined`, the tokens of a text that ends with it and begins with `head`.

        Tokenizing `text` alone would, with many tokenizers, put a space before it. But where a token of the
        joined text lies across the border, there is no exact answer, and `text` alone it is.
        """
        return joined[len(head) :] if joined[: len(head)] == head else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        # verbose=False: the tokenizer would warn that a stream is longer than the model's context.
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _added_by_tokenizer(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text by itself."""
        bare = self._ids("a")
        full = list(self._tokenizer("a")["input_ids"])
        start = next(at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]


def _pieces(text: str) -> list[str]:
    """`text` in pieces of about PIECE_CHARS, which joined give the text again.

    A piece ends after a run of line ends, because tokenizers split there anyway; else before a space; else anywhere.
    """
    pieces = []
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = _cut(text, start, start + PIECE_CHARS)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _cut(text: str, start: int, most: int) -> int:
    """Where to end the piece that begins at `start` and should not go beyond `most`."""
    newline = text.rfind("\n", start, most)
    if newline > start:
        end = newline + 1
        while end < len(text) and text[end] == "\n":
            end += 1
        return end
    space = text.rfind(" ", start + 1, most)
    return space if space > start else most
