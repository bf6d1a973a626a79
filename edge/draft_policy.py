"""How many tokens to guess in the next request: what they may save, against what they cost. No torch.

All times are measured as they come: the round trip with the computing of both sides, and what more positions in one
request add to it. Guesses never change the tokens, only the number of requests, so this decides on time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: How many tokens a request may guess. Few sizes: each has times of its own, and a hub joins requests of equal width.
SIZES = (1, 3, 7, 15)
MOST = SIZES[-1]
#: The share of a newer time in the mean of times.
_NEWER = 0.25
#: The same where the newer one is shorter: what disturbs makes times longer.
_NEWER_SHORTER = 0.5
#: A time counts as so many times the expected one at most: one stall says little of the next request.
_STALL = 3.0
#: What guessing has to save of a plain request's time before it is worth it.
_WORTH = 0.05
#: A position that is right less often is not sent, even where it costs this edge nothing: others use the hub too, and
#: whatever is sent shows the hub a little more.
_LIKELY = 0.05
#: Requests without a guess until one is tried whatever the times say; doubled each time, up to the last.
_TRY_AFTER, _TRY_AFTER_MOST = 16, 256


class RequestTimes:
    """Seconds of a request by its width (new positions): a plain one's, and what each further width adds.

    Link and load change the former at any time, so every request tells of it; what a width adds changes less.
    """

    def __init__(self) -> None:
        #: seconds of a request of one position; None before the first
        self.plain: float | None = None
        self._added: dict[int, float] = {}
        #: seconds that a position adds where no width near it was measured; None before the first prompt
        self._slope: float | None = None

    def at_least(self, link_s: float) -> float | None:
        """What a plain request takes at least, over a link with this round trip; None before the first prompt."""
        return None if self._slope is None else link_s + self._slope

    def note_prompt(self, width: int, seconds: float) -> None:
        """A generation's first request; what it took beyond a plain one bounds what a position adds."""
        if width > 1:
            self._slope = max(seconds - (self.plain or 0.0), 0.0) / (width - 1)

    def note(self, width: int, seconds: float) -> None:
        """Any later request."""
        if self.plain is None:
            self.plain = max(seconds - self.added(width), 0.0)
            return
        expected = self.plain + self.added(width)
        seconds = min(seconds, _STALL * expected)
        if width in self._added:
            newer = _NEWER if seconds > expected else _NEWER_SHORTER
            self._added[width] = max(self._added[width] + newer * (seconds - expected), 0.0)
        elif width > 1:
            self._added[width] = max(seconds - self.plain, 0.0)
            return
        self.plain = max(self.plain + _NEWER * (seconds - expected), 0.0)

    def added(self, width: int) -> float:
        """What `width` positions take beyond one, as measured, or from the nearest narrower width on."""
        below = max((known for known in self._added if known <= width), default=1)
        return self._added.get(below, 0.0) + (self._slope or 0.0) * (width - below)


class Policy:
    """Decides for one connected model; learns from all its generations.

    link_s: the link's round trip in seconds as pings tell it, None if it is not known. It stands in until a plain
    request was timed.
    """

    def __init__(self, link_s: Callable[[], float | None] = lambda: None) -> None:
        self._link_s = link_s
        self.times = RequestTimes()
        #: seconds that a token takes lately, guessing included; None before the first request
        self._per_token: float | None = None
        self._plain_in_a_row = 0
        self._try_after = _TRY_AFTER

    def size(self, chances: Sequence[float], guess_s: Callable[[int], float] = lambda size: 0.0) -> int:
        """How many tokens to guess, of SIZES or all that there are; 0 for none.

        chances: for each guessed token, how likely it is right if those before it are. guess_s: seconds that guessing
        so many takes. A further right token saves what a token takes lately.
        """
        plain = self._plain()
        if plain is None:
            return 0
        value = min(plain, self._per_token or plain)
        best, most = 0, _WORTH * plain
        for size in (likely := _likely_sizes(chances)):
            saved = _expected(chances[:size]) * value - self.times.added(size + 1) - guess_s(size)
            if saved > most:
                best, most = size, saved
        return best or self._tried(likely)

    def _plain(self) -> float | None:
        """Seconds of a plain request, as far as known."""
        if self.times.plain is not None:
            return self.times.plain
        link_s = self._link_s()
        return None if link_s is None else self.times.at_least(link_s)

    def _tried(self, likely: Sequence[int]) -> int:
        """Where guessing does not pay by the times of long ago, look again now and then."""
        if self._plain_in_a_row < self._try_after or not likely:
            return 0
        self._try_after = min(2 * self._try_after, _TRY_AFTER_MOST)
        return likely[:2][-1]

    def note_prompt(self, width: int, seconds: float) -> None:
        """A generation's first request has come back."""
        self.times.note_prompt(width, seconds)

    def note(self, guessed: int, right: int, seconds: float, guess_s: float = 0.0) -> None:
        """A later request with `guessed` tokens, of which the first `right` were right, took so long."""
        self.times.note(guessed + 1, seconds)
        self._plain_in_a_row = 0 if guessed else self._plain_in_a_row + 1
        per_token = (seconds + guess_s) / (right + 1)
        last = self._per_token
        self._per_token = per_token if last is None else last + _NEWER * (min(per_token, _STALL * last) - last)


def _sizes(most: int) -> list[int]:
    """The sizes up to `most`, and `most` itself where it lies below the largest."""
    return sorted({*(size for size in SIZES if size < most), min(most, MOST)} - {0})


def _likely_sizes(chances: Sequence[float]) -> list[int]:
    """The sizes whose last positions, those that the size before lacks, are right often enough."""
    sizes, before = [], 0
    for size in _sizes(len(chances)):
        if _expected(chances[:size]) - _expected(chances[:before]) < _LIKELY * (size - before):
            break
        sizes.append(size)
        before = size
    return sizes


def _expected(chances: Sequence[float]) -> float:
    """How many guessed tokens will be right, up to the first wrong one."""
    total, all_right = 0.0, 1.0
    for chance in chances:
        all_right *= chance
        total += all_right
    return total
