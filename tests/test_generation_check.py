"""A pretrained model through the real commands and sockets writes what the unsplit one writes, to the letter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.programs import Hub, Programs

MODEL = Path(__file__).parents[2] / "shared" / "data" / "llama-stories260K-hf"
HIDDEN_BYTES = 64 * 4

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason="the pretrained stories260K model is not beside this checkout (../shared/data)"
)


def recorded() -> dict[str, str]:
    """GENERATION_CHECK.txt: prompt -> the whole text, made by transformers' own LlamaForCausalLM."""
    if not MODEL.is_dir():
        return {}
    sections = re.split(r"^### prompt: (.*)\n", (MODEL / "GENERATION_CHECK.txt").read_text(), flags=re.MULTILINE)
    pairs = zip(sections[1::2], sections[2::2], strict=True)
    return {"" if prompt.startswith("<empty") else prompt: text.rstrip("\n") for prompt, text in pairs}


@pytest.fixture(scope="module")
def hub(module_programs: Programs) -> Hub:
    return module_programs.serve("--model", MODEL, installed=True)


@pytest.mark.parametrize("prompt", recorded())
def test_text_is_that_of_the_unsplit_model(hub: Hub, module_programs: Programs, prompt: str) -> None:
    new = 120 if prompt else 200
    done = module_programs.run(
        "edge", "generate", hub.join, "--state", module_programs.folder / "edge", "--noise", 0, "--prompt", prompt,
        "--max-new-tokens", new, "--json", installed=not prompt,
    )  # fmt: skip
    answer = done.json
    counts = {"bytes_sent", "bytes_received", "round_trips", "drafted", "accepted"}
    assert set(answer) == {"text", "tokens", "tokens_per_s", *counts}
    assert prompt + answer["text"] == recorded()[prompt]
    assert len(answer["tokens"]) == new
    assert answer["round_trips"] == new - answer["accepted"]
    assert answer["drafted"] >= answer["accepted"]
    assert answer["tokens_per_s"] > 0
    # The prompt crosses once, and then one position a round trip and one for each guess.
    positions = answer["round_trips"] + answer["drafted"]
    for count in (answer["bytes_sent"], answer["bytes_received"]):
        assert positions * HIDDEN_BYTES < count < (positions + 32) * (HIDDEN_BYTES + 192)


def test_without_drafting_each_token_is_a_round_trip(hub: Hub, module_programs: Programs) -> None:
    prompt = "One day, a boy found a"
    state = module_programs.folder / "edge"
    arguments = ("generate", hub.join, "--state", state, "--noise", 0, "--prompt", prompt, "--max-new-tokens", 60)
    answer = module_programs.run("edge", *arguments, "--draft", "off", "--json").json
    assert recorded()[prompt].startswith(prompt + answer["text"])
    assert (answer["round_trips"], answer["drafted"], answer["accepted"]) == (60, 0, 0)


def test_a_draft_model_writes_the_same_in_fewer_round_trips(hub: Hub, module_programs: Programs) -> None:
    """The best draft model there is: the model itself."""
    prompt = "One day, a boy found a"
    state = module_programs.folder / "edge"
    arguments = ("generate", hub.join, "--state", state, "--noise", 0, "--prompt", prompt, "--max-new-tokens", 60)
    answer = module_programs.run("edge", *arguments, "--draft", MODEL, "--json").json
    assert recorded()[prompt].startswith(prompt + answer["text"])
    assert answer["round_trips"] == 60 - answer["accepted"]


def test_a_draft_model_with_another_tokenizer_is_refused(hub: Hub, module_programs: Programs) -> None:
    pocket = Path(__file__).parents[1] / "hub" / "pocket"
    state = module_programs.folder / "edge"
    done = module_programs.run("edge", "generate", hub.join, "--state", state, "--draft", pocket, code=2)
    assert "another tokenizer" in done.err


def test_without_json_the_whole_text_is_printed(hub: Hub, module_programs: Programs) -> None:
    prompt = "Tom and Anna went to the"
    done = module_programs.run(
        "edge", "generate", "--state", module_programs.folder / "edge", "--noise", 0, "--prompt", prompt,
        "--max-new-tokens", 20,
    )  # fmt: skip
    assert recorded()[prompt].startswith(done.out.strip())
    assert len(done.out) > len(prompt) + 20


@pytest.mark.parametrize("partition", ["1:0", "2:1", "1:3"])
def test_other_partitions_write_the_same(hub: Hub, module_programs: Programs, partition: str) -> None:
    prompt = "One day, a boy found a"
    done = module_programs.run(
        "edge", "generate", hub.join, "--state", module_programs.folder / "other", "--noise", 0, "--prompt", prompt,
        "--max-new-tokens", 40, "--partition", partition, "--json",
    )  # fmt: skip
    assert recorded()[prompt].startswith(prompt + done.json["text"])


def test_own_copy_of_the_model_will_do(hub: Hub, module_programs: Programs) -> None:
    prompt = "One day, a boy found a"
    state = module_programs.folder / "own"
    done = module_programs.run(
        "edge", "generate", hub.join, "--state", state, "--model", MODEL, "--noise", 0, "--prompt", prompt,
        "--max-new-tokens", 20, "--json",
    )  # fmt: skip
    assert recorded()[prompt].startswith(prompt + done.json["text"])
    assert not list((state / "cache").glob("**/*.safetensors"))
