"""Two edges with private text fine-tune the pocket model through a hub, and then use it: commands and library."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer, pipeline

import edge
from blocks import decoding
from messaging.joining import JoinString, read_join
from messaging.transport import Channel
from tests.support.relay import Relay
from tests.support.sites import POCKET, greedy, mean_loss, tokenizer, whole_model, write_notes
from tools.programs import Hub, Programs

PROMPT = "Patient:"
NAMES = ("clinic", "lawfirm")
ROUNDS, ROUND_STEPS = 2, 5
HIDDEN = 192

# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@dataclass(frozen=True)
class Trained:
    """A hub whose two rounds are over and which serves generation; what its edges reported; the exported adapter."""

    hub: Hub
    reports: dict[str, Any]
    held_out: dict[str, Path]
    adapter: Path
    folder: Path

    @contextmanager
    def model(self, name: str = "clinic", **options: Any) -> Iterator[Any]:
        """A model of an edge that is enrolled, noise 0, as the library gives it."""
        model = edge.connect(state=self.folder / name, **{"noise": 0.0, **options})
        with model.hub:
            yield model


@pytest.fixture(scope="module")
def trained(module_programs: Programs) -> Trained:
    programs = module_programs
    hub = programs.serve("--cohort", 2, "--rounds", ROUNDS, "--round-steps", ROUND_STEPS, "--lr", 5e-3)
    held_out = {name: write_notes(programs.folder, name, 500, 4) for name in NAMES}
    edges = [
        programs.edge(
            hub, name, write_notes(programs.folder, name, 1, 30), "--eval", held_out[name], "--partition", partition
        )
        for name, partition in zip(NAMES, ("1:1", "2:1"), strict=True)
    ]
    for process in edges:
        done = process.wait(120)
        assert done.code == 0, str(process)
        assert "Traceback" not in done.err + done.out, str(process)
    reports = {name: json.loads((programs.folder / name / "report.json").read_text()) for name in NAMES}
    adapter = programs.folder / "adapter"
    programs.run("hub", "export", "--state", hub.state, "--out", adapter)
    return Trained(hub, reports, held_out, adapter, programs.folder)


@pytest.fixture(scope="module")
def unsplit(trained: Trained) -> Any:
    """The unsplit model with the exported adapter, by plain transformers and peft."""
    return PeftModel.from_pretrained(whole_model(), trained.adapter).eval()


# -- training ------------------------------------------------------------------------------------


def test_both_held_out_losses_fall(trained: Trained) -> None:
    for name in NAMES:
        first, *_, last = trained.reports[name]["held_out"]
        assert last < 0.95 * first, name


def test_hub_publishes_a_version_a_round(trained: Trained) -> None:
    status = trained.hub.status()
    assert status["stored"]["adapter"]["version"] == ROUNDS
    trained.hub.until(
        lambda live: live["hub_step"] == ROUNDS * ROUND_STEPS and live["phase"] == "serving generation",
        "a status with all steps taken",
    )
    assert all(report["steps"] == ROUNDS * ROUND_STEPS for report in trained.reports.values())


def test_one_step_of_the_hub_joins_both_edges(trained: Trained) -> None:
    assert trained.hub.status()["live"]["edges_per_step"] == 2


def test_exported_adapter_has_the_loss_that_the_edges_printed(trained: Trained, unsplit: Any) -> None:
    base = whole_model()
    for name in NAMES:
        first, *_, last = trained.reports[name]["held_out"]
        assert mean_loss(base, trained.held_out[name]) == pytest.approx(first, abs=1e-3)
        assert mean_loss(unsplit, trained.held_out[name]) == pytest.approx(last, abs=1e-3)


def test_generate_uses_the_published_adapter(trained: Trained, module_programs: Programs, unsplit: Any) -> None:
    done = module_programs.run(
        "edge", "generate", "--state", trained.folder / "lawfirm", "--prompt", "Dear", "--max-new-tokens", 40,
        "--noise", 0, "--json",
    )  # fmt: skip
    assert done.json["tokens"] == greedy(unsplit, "Dear", 40)
    assert done.json["tokens"] != greedy(whole_model(), "Dear", 40)


# -- the library -----------------------------------------------------------------------------------


def test_forward_has_the_unsplit_loss(trained: Trained, unsplit: Any) -> None:
    with trained.model() as model:
        assert mean_loss(model, trained.held_out["clinic"]) == pytest.approx(
            mean_loss(unsplit, trained.held_out["clinic"]), rel=1e-5
        )


def test_streamer_and_logits_processor_work(trained: Trained, unsplit: Any) -> None:
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, first] = -torch.inf
            return scores

    first = greedy(unsplit, PROMPT, 1)[0]
    with trained.model() as model:
        streamer = TextIteratorStreamer(model.hub.tokenizer, skip_prompt=True, timeout=30)
        tokens = greedy(model, PROMPT, 12, streamer=streamer, logits_processor=LogitsProcessorList([Forbid()]))
        assert "".join(streamer) == model.hub.tokenizer.decode(tokens)
    assert tokens == greedy(unsplit, PROMPT, 12, logits_processor=LogitsProcessorList([Forbid()]))
    assert first not in tokens


def test_text_generation_pipeline_works(trained: Trained, unsplit: Any) -> None:
    def text(model: Any) -> str:
        writer = pipeline("text-generation", model=model, tokenizer=tokenizer())
        return writer(PROMPT, max_new_tokens=12, do_sample=False)[0]["generated_text"]

    with trained.model() as model:
        assert text(model) == text(unsplit)


def test_beam_search_writes_the_unsplit_text(trained: Trained, unsplit: Any) -> None:
    with trained.model() as model:
        assert greedy(model, PROMPT, 12, num_beams=3) == greedy(unsplit, PROMPT, 12, num_beams=3)


def test_two_models_at_once(trained: Trained, unsplit: Any) -> None:
    with trained.model("clinic") as one, trained.model("lawfirm", partition="1:3") as other:
        assert greedy(one, PROMPT, 8) == greedy(other, PROMPT, 8) == greedy(unsplit, PROMPT, 8)
        assert one.hub.adapter_version == other.hub.adapter_version == ROUNDS


def test_concurrent_sessions_decode_what_each_decodes_alone(trained: Trained, unsplit: Any) -> None:
    prompts = ["Patient:", "Dear", "BELLMOOR HOUSE, Lantern ward,", "The"]
    tokens: dict[str, list[int]] = {}

    def decode(prompt: str, model: Any) -> None:
        tokens[prompt] = greedy(model, prompt, 24)

    with ExitStack() as open_models:
        models = [open_models.enter_context(trained.model(NAMES[i % 2])) for i in range(len(prompts))]
        threads = [threading.Thread(target=decode, args=pair) for pair in zip(prompts, models, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert tokens == {prompt: greedy(unsplit, prompt, 24) for prompt in prompts}


def test_generation_is_the_same_for_a_join_string_and_a_new_state(trained: Trained, unsplit: Any) -> None:
    model = edge.connect(trained.hub.join, state=trained.folder / "fresh", name="fresh", noise=0.0, partition="3:0")
    with model.hub:
        assert greedy(model, PROMPT, 8) == greedy(unsplit, PROMPT, 8)


def test_an_edges_layers_multiply_as_is_fastest(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_SMALL_BYTES", 0)
    with trained.model() as model:
        head = model.get_output_embeddings()
        assert head.weight.stride() == (1, head.out_features)
        for module in (head, model.model.layers[0].mlp.up_proj.base_layer):
            assert isinstance(module, decoding.DecodingLinear)
            assert module.ways


def test_noise_changes_what_leaves_and_its_size_is_told(trained: Trained) -> None:
    held_out = trained.held_out["clinic"]
    with trained.model() as clear, trained.model(noise=20.0) as noisy:
        # More noise than state: the model has to suffer from it.
        assert mean_loss(noisy, held_out) > mean_loss(clear, held_out) + 1e-2
        assert noisy.hub.noise.r > 1
        assert noisy.hub.noise.sigma == pytest.approx(20.0 * (torch.pi / 2) ** 0.5)


# -- memory and bytes ------------------------------------------------------------------------------


def test_dropped_caches_and_closed_models_free_the_hubs_memory(trained: Trained) -> None:
    hub = trained.hub
    ids = tokenizer()(PROMPT, return_tensors="pt").input_ids
    with trained.model() as model:
        with torch.no_grad():
            out = model(ids, use_cache=True)
        hub.until(lambda live: live["streams"] == 1 and live["kv_bytes"] > 0, "one stream with memory")
        del out
        gc.collect()
        hub.until(lambda live: live["streams"] == 0 and live["kv_bytes"] == 0, "no stream, no memory")
        with torch.no_grad():
            held = model(ids, use_cache=True)
        hub.until(lambda live: live["streams"] == 1, "one stream")
    hub.until(lambda live: live["streams"] == 0 and live["kv_bytes"] == 0, "no stream after the model was closed")
    assert held.past_key_values is not None


def test_one_token_costs_its_hidden_state_and_little_more(trained: Trained) -> None:
    """Counted on the TCP connections, between a short and a long generation."""
    join = read_join(trained.hub.join)
    with ExitStack() as stack:
        ports = [urlport(join.hub.endpoint(channel)) for channel in (Channel.CTL, Channel.BULK, Channel.ENROL)]
        relays = [stack.enter_context(Relay(port)) for port in ports]
        address = replace(join.hub, ctl=relays[0].port, bulk=relays[1].port, enrol=relays[2].port)
        model = edge.connect(JoinString(address, join.token).encode(), state=trained.folder / "counted", noise=0.02)
        with model.hub:

            def cost(new: int) -> tuple[int, int]:
                before = sum(relay.to_hub for relay in relays), sum(relay.to_edge for relay in relays)
                assert len(greedy(model, PROMPT, new, min_new_tokens=new)) == new
                after = sum(relay.to_hub for relay in relays), sum(relay.to_edge for relay in relays)
                return after[0] - before[0], after[1] - before[1]

            short, long = cost(10), cost(110)
            told = model.hub.traffic
        relayed = sum(relay.to_hub for relay in relays), sum(relay.to_edge for relay in relays)
    for less, more in zip(short, long, strict=True):
        assert HIDDEN * 4 < (more - less) / 100 <= HIDDEN * 4 + 192
    # What the edge shows of its traffic is what crossed, but for the handshakes.
    for shown, crossed in zip(told, relayed, strict=True):
        assert shown == pytest.approx(crossed, rel=0.02)


def urlport(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def test_pocket_is_what_the_hub_serves(trained: Trained) -> None:
    assert Path(trained.hub.status()["live"]["model"]).resolve() == POCKET.resolve()
