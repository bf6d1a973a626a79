"""Several tokens in one round trip: what `generate()` is offered to verify, on a model whose middle is at the hub.

The loop is transformers' own assisted generation (its prompt lookup, or a small draft model): a request carries the
last token and some guessed ones, the logits tell which guesses are right, and the caches are cropped behind them. What
is added here is how many tokens to guess each time (`edge/draft_policy.py`).
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    _prepare_attention_mask,
    _prepare_position_ids,
)

from blocks.source import open_model
from blocks.surgery import CutModel, build_whole, load
from edge.draft_lookup import Chance, Lookup, Odds
from edge.draft_policy import MOST, Policy
from messaging.errors import InputError

#: Latest tokens that were generated, in all texts, to guess from.
_REMEMBERED = 2048
#: Chance that a draft model's token is right, before any is known.
_MODEL_BEFORE = 0.6
#: The share of a newer time in the mean time of a guess.
_NEWER = 0.25


class Drafting:
    """What a connected model has learned of guessing, in all its generations. `link_s`: see Policy."""

    def __init__(self, link_s: Callable[[], float | None] = lambda: None) -> None:
        self.policy = Policy(link_s)
        self.odds = Odds()
        self.model_chance = Chance(_MODEL_BEFORE)
        #: seconds that the draft model takes for a token
        self.model_token_s = 0.0
        #: what was generated lately; it stays on the edge, but what is guessed from it is sent like other guesses
        self.remembered: deque[int] = deque(maxlen=_REMEMBERED)
        #: tokens that were guessed and sent, and how many of them were right
        self.drafted = 0
        self.accepted = 0

    def install(self, model: PreTrainedModel) -> None:
        """Let `generate(prompt_lookup_num_tokens=...)` and `generate(assistant_model=...)` draft by this.

        transformers asks the model for what it calls a candidate generator; other ways of drafting, and draft models
        with another tokenizer, stay as transformers has them.
        """
        whole = weakref.ref(model)

        def candidate_generator(**given: Any) -> CandidateGenerator:
            asking = whole()
            assert asking is not None
            generator = self._generator(given, _vocabulary(asking))
            return generator or type(asking)._get_candidate_generator(asking, **given)

        model._get_candidate_generator = candidate_generator

    def _generator(self, given: dict[str, Any], vocabulary: int) -> CandidateGenerator | None:
        config, draft = given["generation_config"], given.get("assistant_model")
        if config.assistant_early_exit is not None or config.assistant_ensemble_weight is not None:
            return None
        if config.prompt_lookup_num_tokens is not None:
            return LookupDrafts(self, given["input_ids"], config)
        own_kind = type(draft).__name__.startswith(("Gemma4Assistant", "Gemma4UnifiedAssistant"))
        tokenizers = given.get("target_tokenizer"), given.get("assistant_tokenizer")
        if draft is None or own_kind or config.speculation_type == "dflash" or tokenizers[0] is not tokenizers[1]:
            return None
        return ModelDrafts(self, given, vocabulary)


class _Clock:
    """Times one generation's requests and tells the policy of them."""

    def __init__(self, drafting: Drafting) -> None:
        self._drafting = drafting
        self._is_first = True
        self._sent = 0
        self._width = 0
        self._guess_s = 0.0
        self._started = 0.0

    def start(self, length: int, guessed: int, guess_s: float = 0.0) -> None:
        """A request with `guessed` tokens goes out, on a text of `length`; guessing took `guess_s`."""
        self._sent, self._width, self._guess_s = guessed, length + guessed, guess_s
        self._started = time.perf_counter()

    def stop(self, right: int) -> None:
        """It is back, and what comes after it is chosen."""
        seconds = time.perf_counter() - self._started
        drafting, sent = self._drafting, self._sent
        drafting.drafted += sent
        drafting.accepted += min(right, sent)
        if self._is_first:
            drafting.policy.note_prompt(self._width, seconds)
        else:
            drafting.policy.note(sent, right, seconds, self._guess_s)
        self._is_first = False


class LookupDrafts(CandidateGenerator):
    """Prompt lookup, also in what was generated lately; `prompt_lookup_num_tokens` is the most that is guessed."""

    def __init__(self, drafting: Drafting, input_ids: torch.Tensor, config: Any) -> None:
        self._drafting = drafting
        self._clock = _Clock(drafting)
        self._most = min(config.prompt_lookup_num_tokens, MOST)
        self._max_length = config.max_length
        ends = config._eos_token_tensor
        self._ends = set() if ends is None else set(ends.tolist())
        self._lookup = Lookup(drafting.odds, drafting.remembered)
        self._lookup.read(input_ids[0].tolist())
        self._known = input_ids.shape[1]

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """input_ids [1, length] -> [1, length + guessed]."""
        length = input_ids.shape[1]
        room, agreed = self._max_length - length - 1, self._lookup.agreed
        chances = self._drafting.odds.along(agreed, max(min(self._most, room), 0)) if agreed else []
        guess = self._until_end(self._lookup.guess(self._drafting.policy.size(chances)))
        self._clock.start(length, len(guess))
        if guess:
            input_ids = torch.cat([input_ids, input_ids.new_tensor([guess])], dim=1)
        return input_ids, None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """The text is input_ids [1, length] now, of which the last num_matches + 1 are new."""
        self._clock.stop(int(num_matches))
        new = input_ids[0, self._known :].tolist()
        self._known += len(new)
        self._lookup.add(new)
        self._drafting.remembered.extend(new)

    def _until_end(self, guess: list[int]) -> list[int]:
        """Nothing comes after a token that ends the text."""
        for at, token in enumerate(guess):
            if token in self._ends:
                return guess[: at + 1]
        return guess


class ModelDrafts(AssistedCandidateGenerator):
    """A draft model on the edge, as transformers runs it; it stops by itself where it is not sure.

    vocabulary: how many tokens the verifying model has scores for. Models of one family pad theirs differently; where
    they differ, a sampled guess is right if the verifying model draws the same, without a look at the draft's scores.
    """

    assistant_kwargs: dict[str, Any]

    def __init__(self, drafting: Drafting, given: dict[str, Any], vocabulary: int) -> None:
        super().__init__(
            input_ids=given["input_ids"],
            assistant_model=given["assistant_model"],
            generation_config=given["generation_config"],
            model_kwargs=given["model_kwargs"],
            inputs_tensor=given["inputs_tensor"],
            logits_processor=given["logits_processor"],
        )
        self._drafting = drafting
        self._clock = _Clock(drafting)
        self.num_assistant_tokens = self._most = min(int(self.assistant_generation_config.num_assistant_tokens), MOST)
        self._vocabulary = vocabulary
        self._guessed = 0

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """input_ids [1, length] -> [1, length + guessed], and the draft model's scores [1, guessed, vocabulary]."""
        drafting, length = self._drafting, input_ids.shape[1]
        room = max(min(self._most, self.main_model_max_length - length - 1), 0)
        chances = [drafting.model_chance.value] * room
        self.num_assistant_tokens = drafting.policy.size(chances, lambda size: size * drafting.model_token_s)
        began = time.perf_counter()
        candidates, scores = input_ids, None
        if self.num_assistant_tokens and self._knows(input_ids):
            candidates, scores = super().get_candidates(input_ids, **kwargs)
            if scores is not None and scores.shape[-1] != self._vocabulary:
                unknown = (candidates[0, length:] >= self._vocabulary).nonzero()
                candidates, scores = candidates[:, : length + int(unknown[0]) if len(unknown) else None], None
        self._guessed = candidates.shape[1] - length
        guess_s = time.perf_counter() - began
        if self._guessed:
            each = guess_s / self._guessed
            before = drafting.model_token_s or each
            drafting.model_token_s = before + _NEWER * (each - before)
        self._clock.start(length, self._guessed, guess_s)
        return candidates, scores

    def _knows(self, input_ids: torch.Tensor) -> bool:
        known = _vocabulary(self.assistant_model)
        return known >= self._vocabulary or int(input_ids.max()) < known

    def _update_past_and_masks(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        """As in transformers; there the first draft is at the prompt, here it may come later."""
        has_past = super()._update_past_and_masks(input_ids, *args, **kwargs)
        if not has_past:
            extended = _prepare_attention_mask(self.assistant_kwargs, input_ids.shape[1], False)
            self.assistant_kwargs = _prepare_position_ids(extended, input_ids.shape[1], False)
        return bool(has_past)

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """The text is input_ids [1, length] now, of which the last num_matches + 1 are new."""
        right = min(int(num_matches), self._guessed)
        self._clock.stop(right)
        for _ in range(right):
            self._drafting.model_chance.note(True)
        if right < self._guessed:
            self._drafting.model_chance.note(False)


def load_draft_model(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The causal language model `name` (a folder, or on the Hugging Face hub), in `model`'s dtype and on its device.

    Raises InputError where it cannot be had, has another tokenizer than `model`, or cannot take tokens back.
    """
    files = open_model(name)
    if files.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{name} has another tokenizer than the model at the hub, so it cannot guess its tokens: "
            "give a smaller model of the same family, or --draft auto"
        )
    whole, names = build_whole(files.config, model.dtype)
    if whole._is_stateful:
        raise InputError(f"{name} cannot take tokens back (a {type(whole).__name__}): give another, or --draft auto")
    draft = load(CutModel(whole, names, list(range(names.count))), files.source, model.dtype, model.device).model
    draft.generation_config = files.generation_config()
    return draft


def lookup_arguments() -> dict[str, Any]:
    """What `generate()` needs to guess from the text."""
    return {"prompt_lookup_num_tokens": MOST}


def model_arguments(
    draft: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What `generate()` of `model` needs to guess with a model that `load_draft_model` gave."""
    if _vocabulary(draft) == _vocabulary(model):
        return {"assistant_model": draft}
    return {"assistant_model": draft, "tokenizer": tokenizer, "assistant_tokenizer": tokenizer}


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)
