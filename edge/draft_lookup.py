"""Guesses of the next tokens from the text so far: what followed when its last tokens stood there before.

Prompt lookup, as transformers has it, and beside it how often such a guess was right lately, by how many tokens
agreed. That is learned from every token that comes, whether its guess was sent or not. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Agreement over more tokens than so many counts as this many.
LONGEST = 8
#: Earlier places that are compared, the latest first.
_PLACES = 32
#: Chances that a guess is right after 0, 1, 2, ... agreeing tokens, before any is known; they count as so many guesses.
_BEFORE = (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
_BEFORE_COUNTS = 4.0
#: The mean of chances is over about so many guesses.
_MEMORY = 64.0
#: Stands after the earlier text; no token.
_END = -1


@dataclass
class Chance:
    """How often something was right, lately: a running mean that begins at an assumption."""

    value: float
    count: float = _BEFORE_COUNTS

    def note(self, right: bool) -> None:
        """One more."""
        self.count = min(self.count + 1.0, _MEMORY)
        self.value += (float(right) - self.value) / self.count


class Odds:
    """The chance that a guess is right, by the number of tokens that agreed before it."""

    def __init__(self) -> None:
        self._by_agreement = [Chance(value) for value in _BEFORE]

    def __getitem__(self, agreed: int) -> float:
        return self._by_agreement[min(agreed, LONGEST)].value

    def note(self, agreed: int, right: bool) -> None:
        """A guess after `agreed` tokens has turned out so."""
        self._by_agreement[min(agreed, LONGEST)].note(right)

    def along(self, agreed: int, length: int) -> list[float]:
        """For each token of a guess of `length`: its chance if those before it are right."""
        return [self[agreed + ahead] for ahead in range(length)]


class Lookup:
    """One text that grows, its earlier places by their last two tokens, and the guess at its end.

    `earlier`: another text to guess from, which the text does not go on from.
    """

    def __init__(self, odds: Odds, earlier: Iterable[int] = ()) -> None:
        self._odds = odds
        self._tokens: list[int] = []
        #: the latest place that followed a token, or a pair of tokens
        self._after_one: dict[int, int] = {}
        self._after_two: dict[tuple[int, int], int] = {}
        #: for each place, the one before it that followed the same pair
        self._earlier: list[int | None] = []
        self._place: int | None = None
        #: how many tokens before the guess agree; 0: there is no guess
        self.agreed = 0
        self.read([*earlier, _END])

    def read(self, tokens: Iterable[int]) -> None:
        """The prompt: nothing is learned from it, because nobody guessed at it."""
        for token in tokens:
            self._append(token)
        self._find()

    def add(self, tokens: Iterable[int]) -> None:
        """The text goes on with these; whether the guesses at them would have been right is noted."""
        for token in tokens:
            if self._place is not None:
                self._odds.note(self.agreed, self._tokens[self._place] == token)
            self._append(token)
            self._find()

    def guess(self, length: int) -> list[int]:
        """The next `length` tokens as they followed before; none if there is nothing to go by.

        A guess that reaches the end of the text goes on with itself, as what repeats itself does. One that reaches
        the end of the earlier text ends there.
        """
        if self._place is None:
            return []
        begin, period = self._place, len(self._tokens) - self._place
        tokens = [self._tokens[begin + ahead % period] for ahead in range(length)]
        return tokens[: tokens.index(_END)] if _END in tokens else tokens

    def _append(self, token: int) -> None:
        place = len(self._tokens)
        self._earlier.append(None)
        if place >= 1 and token != _END:
            self._after_one[self._tokens[-1]] = place
        if place >= 2 and token != _END:
            pair = (self._tokens[-2], self._tokens[-1])
            self._earlier[place] = self._after_two.get(pair)
            self._after_two[pair] = place
        self._tokens.append(token)

    def _find(self) -> None:
        """The place with the longest agreement, of equal ones the latest."""
        self.agreed, self._place = 0, None
        if len(self._tokens) >= 2:
            place = self._after_two.get((self._tokens[-2], self._tokens[-1]))
            for _ in range(_PLACES):
                if place is None or self.agreed == LONGEST:
                    break
                agreed = _agreement(self._tokens, place)
                if agreed > self.agreed:
                    self.agreed, self._place = agreed, place
                place = self._earlier[place]
        if self._place is None and self._tokens and (place := self._after_one.get(self._tokens[-1])) is not None:
            self.agreed, self._place = 1, place


def _agreement(tokens: Sequence[int], place: int) -> int:
    """How many tokens before `place` equal those before the end, LONGEST at most."""
    agreed = 0
    while agreed < min(place, LONGEST) and tokens[place - 1 - agreed] == tokens[-1 - agreed]:
        agreed += 1
    return agreed
