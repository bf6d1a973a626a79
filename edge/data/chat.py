"""Conversations: which part of a rendered chat template is the assistant's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from edge.data.errors import Origin
from edge.data.records import ChatRecord

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether its tokens are targets."""

    text: str
    is_target: bool


@dataclass(frozen=True)
class _Turn:
    """The conversation up to the end of one assistant message, which begins at character `start`."""

    text: str
    start: int


def chat_segments(record: ChatRecord, tokenizer: PreTrainedTokenizerBase) -> list[list[Segment]]:
    """The conversation as one list of segments, or as one list for each assistant turn.

    It is several lists where the template writes a turn differently once another follows (Qwen3 drops the
    reasoning of earlier turns): then only a text that ends with a turn shows that turn as generation will.

    Raises DataError if the tokenizer has no chat template or the template refuses the conversation.
    """
    render = _renderer(tokenizer, record.origin)
    messages = record.messages
    turns = [
        _turn(messages[: end + 1], render, record.origin)
        for end, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if all(after.text.startswith(turn.text) and after.start >= len(turn.text) for turn, after in pairwise(turns)):
        return [_segments(turns)]
    return [_segments([turn]) for turn in turns]


def _renderer(tokenizer: PreTrainedTokenizerBase, origin: Origin) -> Render:
    """A function of (messages, whether to add the generation prompt) that returns the template's text."""
    if not tokenizer.chat_template:
        raise origin.error(
            "has `messages`, but this model's tokenizer has no chat template; "
            "write `prompt` and `completion`, or use a model that was made for chat"
        )

    def render(messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise origin.error(f"the chat template refuses `messages` ({error}); change the roles or order") from error
        return text

    return render


def _turn(messages: list[Message], render: Render, origin: Origin) -> _Turn:
    """The turn that ends `messages`. It begins where the generation prompt ends, as in generation."""
    text = render(messages, False)
    before = messages[:-1]
    if not before:
        return _Turn(text, 0)
    prompt = render(before, True)
    start = _common_prefix(text, prompt)
    # A generation prompt may go on with what a finished turn lacks ("<think>"), but never may a text from
    # before the turn become a target.
    if start < len(prompt) and start < len(render(before, False)):
        raise origin.error(
            "this model's chat template rewrites earlier messages, so the assistant's part cannot be told apart; "
            "write `prompt` and `completion`"
        )
    return _Turn(text, start)


def _segments(turns: list[_Turn]) -> list[Segment]:
    """Segments of the last turn's text, of which every other turn's text is a prefix."""
    whole = turns[-1].text
    segments = []
    end = 0
    for turn in turns:
        segments.append(Segment(whole[end : turn.start], is_target=False))
        end = len(turn.text)
        segments.append(Segment(whole[turn.start : end], is_target=True))
    return segments


def _common_prefix(one: str, other: str) -> int:
    """How many characters both begin with."""
    differing = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
