"""Drafting over an engine in this process: the same tokens in fewer requests, and no text shown to the hub twice."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers as T
from transformers import LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor

import messaging.messages as m
from blocks.layout import Layout
from blocks.partition import Partition
from blocks.remote import remote_of
from blocks.surgery import CutModel
from edge.client import HubClient
from edge.draft import Drafting, LookupDrafts, ModelDrafts, model_arguments
from edge.draft_policy import MOST, Policy
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from hub.engine import Engine
from hub.jobs import InferItem, Place
from messaging.errors import LinkLost
from tests.support.models import CONFIGS, VOCAB, make_edge, make_engine, middle_of, whole_model

CUT = Partition(1, 1)
REPEATING = torch.tensor([[5, 6, 7, 8, 9] * 4])
GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
OTHER = torch.tensor([[9, 4, 30, 31, 5, 9, 4, 30]])
VARIED = {**GREEDY, "repetition_penalty": 1.1}
SIZES = (0, 1, 3, 7, MOST)


@cache
def whole(name: str, seed: int = 0) -> PreTrainedModel:
    return whole_model(CONFIGS[name](), seed)


def drafting_edge(name: str) -> tuple[CutModel, Drafting]:
    edge = make_edge(whole(name), CUT, make_engine(whole(name)))
    drafting = Drafting()
    drafting.install(edge.model)
    return edge, drafting


@pytest.fixture
def any_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may be decided, by chance; nothing at first, so that a draft model has to catch up."""
    rng = random.Random(5)
    sizes = itertools.chain((0, 0), iter(lambda: rng.choice(SIZES), None))
    monkeypatch.setattr(Policy, "size", lambda self, chances, *_: min(len(chances), next(sizes)))


# -- greedy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_greedy_tokens_are_the_same_whatever_is_guessed(name: str, any_sizes: None) -> None:
    edge, drafting = drafting_edge(name)
    wanted = whole(name).generate(REPEATING, **GREEDY)
    tokens = edge.model.generate(REPEATING, prompt_lookup_num_tokens=MOST, **GREEDY)
    assert torch.equal(tokens, wanted)
    assert len(middle_of(edge).layouts) == 40 - drafting.accepted < 40
    # A second text, which may be guessed from the first, and does not repeat itself: guesses are wrong.
    wanted = whole(name).generate(OTHER, **VARIED)
    assert torch.equal(edge.model.generate(OTHER, prompt_lookup_num_tokens=MOST, **VARIED), wanted)
    assert drafting.accepted < drafting.drafted


def test_as_decided_from_times_the_tokens_are_the_same() -> None:
    edge, drafting = drafting_edge("llama")
    tokens = edge.model.generate(REPEATING, prompt_lookup_num_tokens=MOST, **GREEDY)
    assert torch.equal(tokens, whole("llama").generate(REPEATING, **GREEDY))
    assert drafting.policy.times.plain is not None


def test_what_was_generated_before_is_guessed_from(any_sizes: None) -> None:
    edge, drafting = drafting_edge("llama")
    prompt = torch.tensor([[50, 3, 77, 12]])
    for _ in range(2):
        before = drafting.accepted
        edge.model.generate(prompt, prompt_lookup_num_tokens=MOST, **GREEDY)
        accepted = drafting.accepted - before
    fresh, alone = drafting_edge("llama")
    fresh.model.generate(prompt, prompt_lookup_num_tokens=MOST, **GREEDY)
    assert accepted > alone.accepted
    assert list(drafting.remembered)[:40] == list(drafting.remembered)[40:]


def test_the_end_of_a_text_may_be_guessed(any_sizes: None) -> None:
    """It is found right, and nothing is generated behind it."""
    edge, _ = drafting_edge("llama")
    given = {"max_new_tokens": 40, "do_sample": False}
    plain = whole("llama").generate(REPEATING, eos_token_id=None, **given)
    end = int(plain[0, 40])
    wanted = whole("llama").generate(REPEATING, eos_token_id=end, **given)
    for _ in range(3):
        tokens = edge.model.generate(REPEATING, eos_token_id=end, prompt_lookup_num_tokens=MOST, **given)
        assert torch.equal(tokens, wanted)


def test_nothing_is_guessed_behind_the_end_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "size", lambda self, chances: len(chances))
    ids = torch.tensor([[5, 6, 9, 7, 8, 5, 6]])
    config = SimpleNamespace(prompt_lookup_num_tokens=4, max_length=100, _eos_token_tensor=torch.tensor([9]))
    candidates, _ = LookupDrafts(Drafting(), ids, config).get_candidates(ids)
    assert candidates.tolist() == [[5, 6, 9, 7, 8, 5, 6, 9]]
    config._eos_token_tensor = None
    candidates, _ = LookupDrafts(Drafting(), ids, config).get_candidates(ids)
    assert candidates.tolist() == [[5, 6, 9, 7, 8, 5, 6, 9, 7, 8, 5]]


# -- the hook --------------------------------------------------------------------------------------------


def test_prompt_lookup_num_tokens_is_the_most_that_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "size", lambda self, chances: len(chances))
    edge, _ = drafting_edge("llama")
    edge.model.generate(REPEATING, prompt_lookup_num_tokens=4, **GREEDY)
    widths = [layout.width for layout in middle_of(edge).layouts[1:]]
    assert max(widths) == 5


def test_other_ways_of_generating_stay_transformers_own() -> None:
    edge, drafting = drafting_edge("llama")
    rows = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    for more in ({}, {"num_beams": 2}):
        given = {**GREEDY, "max_new_tokens": 8, **more}
        assert torch.equal(edge.model.generate(rows, **given), whole("llama").generate(rows, **given))
    assert drafting.policy.times.plain is None
    config = SimpleNamespace(
        assistant_early_exit=2, assistant_ensemble_weight=None, prompt_lookup_num_tokens=None, speculation_type=None
    )
    assert drafting._generator({"generation_config": config, "assistant_model": None}, VOCAB) is None
    config.assistant_early_exit = None
    given = {"generation_config": config, "assistant_model": whole("llama")}
    tokenizers = {"target_tokenizer": object(), "assistant_tokenizer": object()}
    assert drafting._generator({**given, **tokenizers}, VOCAB) is None


def test_the_hook_is_one_that_transformers_knows() -> None:
    assert callable(T.GenerationMixin._get_candidate_generator)
    assert issubclass(LookupDrafts, T.generation.CandidateGenerator)
    assert issubclass(ModelDrafts, T.generation.AssistedCandidateGenerator)


# -- a draft model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_model_changes_no_token(seed: int, any_sizes: None) -> None:
    edge, drafting = drafting_edge("llama")
    given = {**GREEDY, "assistant_model": whole("llama", seed)}
    tokens = edge.model.generate(REPEATING, **given)
    assert torch.equal(tokens, whole("llama").generate(REPEATING, **GREEDY))
    # The model itself guesses right; another one hardly ever.
    assert drafting.drafted > 0
    assert (drafting.accepted == drafting.drafted) == (seed == 0)
    assert drafting.model_token_s > 0


@pytest.mark.parametrize("vocabulary", [VOCAB - 30, VOCAB + 30])
def test_a_draft_model_may_have_scores_for_more_or_fewer_tokens(vocabulary: int, any_sizes: None) -> None:
    config = CONFIGS["llama"]()
    config.vocab_size = vocabulary
    draft = whole_model(config, 1)
    edge, drafting = drafting_edge("llama")
    arguments = model_arguments(draft, edge.model, cast(Any, object()))
    assert arguments["tokenizer"] is arguments["assistant_tokenizer"]
    tokens = edge.model.generate(REPEATING, **GREEDY, **arguments)
    assert torch.equal(tokens, whole("llama").generate(REPEATING, **GREEDY))
    assert drafting.drafted > 0
    sampled = {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0, "eos_token_id": None}
    assert edge.model.generate(REPEATING, **sampled, **arguments).shape == (1, REPEATING.shape[1] + 20)


# -- sampling --------------------------------------------------------------------------------------------

ALLOWED, DRAWN, SAMPLES = (5, 6), 3, 200


def small(seed: int) -> PreTrainedModel:
    config = T.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=12,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return whole_model(config, seed)


def exact(model: PreTrainedModel, prompt: torch.Tensor, temperature: float) -> dict[tuple[int, ...], float]:
    """The probability of every text of DRAWN allowed tokens, from the unsplit model's logits."""
    texts = list(itertools.product(ALLOWED, repeat=DRAWN))
    rows = torch.cat([prompt.expand(len(texts), -1), torch.tensor(texts)], dim=1)
    with torch.no_grad():
        logits = model(rows).logits[:, -DRAWN - 1 : -1, list(ALLOWED)] / temperature
    chosen = torch.tensor([[ALLOWED.index(token) for token in text] for text in texts])
    chances = logits.softmax(-1).gather(2, chosen[..., None]).prod(1)[:, 0]
    return dict(zip(texts, chances.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_sampling_keeps_the_models_distribution(kind: str, any_sizes: None) -> None:
    """Pearson's chi-squared over all texts of three tokens; guesses are right about every other time."""
    model, temperature, prompt = small(0), 0.3, torch.tensor([[5, 6, 5, 6, 6, 5]])
    edge = make_edge(model, CUT, make_engine(model))
    drafting = Drafting()
    drafting.install(edge.model)
    guess = {"prompt_lookup_num_tokens": MOST} if kind == "lookup" else {"assistant_model": small(1)}
    forbid = LogitsProcessorList([SuppressTokensLogitsProcessor([t for t in range(12) if t not in ALLOWED])])
    torch.manual_seed(1)
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(SAMPLES):
        drafting.remembered.clear()
        tokens = edge.model.generate(
            prompt, max_new_tokens=DRAWN, do_sample=True, temperature=temperature, top_k=0, logits_processor=forbid,
            **guess,
        )  # fmt: skip
        seen[tuple(tokens[0, -DRAWN:].tolist())] += 1
    assert 0.2 < drafting.accepted / drafting.drafted < 0.9
    expected = {text: chance * SAMPLES for text, chance in exact(model, prompt, temperature).items()}
    squares = sum((seen[text] - wanted) ** 2 / wanted for text, wanted in expected.items())
    # 7 degrees of freedom: 99.9% of all samples lie below 24.3.
    assert squares < 24.3


# -- what the hub sees, and what it may lose -------------------------------------------------------------


class EngineClient:
    """The hub's client over an engine in this process, which loses things as told."""

    def __init__(self, engine: Engine, loses: float = 0.0) -> None:
        self.engine, self._loses = engine, loses
        self._rng = random.Random(2)
        self.requests = self.lost = 0
        self.look: Callable[[m.Infer], None] = lambda message: None

    def ask(self, message: m.Infer, answer: type[m.InferHidden]) -> m.InferHidden:
        self.requests += 1
        self.look(message)
        rows, width, _ = message.smashed.shape
        layout = Layout.from_ints(message.layout, rows, message.past, width, 256)
        place = Place(CUT.p, CUT.leave(self.engine.num_layers))
        if self._rng.random() < self._loses:
            self.lost += 1
            self.engine.close_stream(1, message.stream)
            if self._rng.random() < 0.3:
                raise LinkLost("the session with the hub ended before the answer came")
        item = InferItem(1, self.requests, message.stream, place, 0, layout, message.order, message.smashed)
        (outcome,) = self.engine.infer([item])
        if isinstance(outcome, Exception):
            raise outcome
        return answer(outcome)

    def tell(self, message: m.AnyMessage) -> None:
        assert isinstance(message, m.CloseStream)
        self.engine.close_stream(1, message.stream)

    def wait_for_session(self, timeout_s: float) -> None:
        """It is there again."""


def connected(name: str, loses: float, scale: float = 0.0) -> tuple[CutModel, EngineClient, Drafting]:
    edge, drafting = drafting_edge(name)
    client = EngineClient(make_engine(whole(name)), loses)
    remote = remote_of(edge)
    remote.attach(HubMiddle(cast(HubClient, client), 0))
    remote.noise = GaussianNoise(scale, b"key")
    return edge, client, drafting


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_hub_that_loses_streams_changes_no_token(name: str, any_sizes: None) -> None:
    edge, client, drafting = connected(name, loses=0.3)
    tokens = edge.model.generate(OTHER, prompt_lookup_num_tokens=MOST, **VARIED)
    assert torch.equal(tokens, whole(name).generate(OTHER, **VARIED))
    assert client.lost > 1
    assert drafting.accepted < drafting.drafted


@pytest.mark.parametrize("loses", [0.0, 0.3])
def test_the_hub_sees_each_text_under_one_noise(loses: float, any_sizes: None) -> None:
    """A position of the same text is sent again only with the same bytes, wrong guesses or not."""
    edge, client, drafting = connected("llama", loses, scale=0.02)
    text: list[int] = []
    shown: dict[tuple[int, ...], bytes] = {}
    again = 0

    def read(module: Any, args: Any, given: dict[str, Any]) -> None:
        past = given["past_key_values"].get_seq_length()
        text[past:] = given["input_ids"][0].tolist()

    def look(message: m.Infer) -> None:
        nonlocal again
        _, width, hidden = message.smashed.shape
        data = b"".join(bytes(part) for part in message.smashed.chunks)
        for column in range(width):
            position = data[column * hidden * 4 : (column + 1) * hidden * 4]
            prefix = tuple(text[: message.past + column + 1])
            again += prefix in shown
            assert shown.setdefault(prefix, position) == position

    edge.model.register_forward_pre_hook(read, with_kwargs=True)
    client.look = look
    edge.model.generate(OTHER, prompt_lookup_num_tokens=MOST, **VARIED)
    assert drafting.drafted > drafting.accepted
    assert (again > 0) == (loses > 0)
