"""Records become examples: windows, masked prompts, chat turns, and the held-out part."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from edge.data import DataError, Example, encode, load_data, load_examples

REAL_TOKENIZER = Path(__file__).resolve().parents[2] / "../shared/data/llama-stories260K-hf"

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: As Qwen3: only the last turn shows a thought; as DeepSeek-R1: the generation prompt opens one.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}[thought]{% endif %}{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>[thinking{% endif %}"
)
REWRITING = "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"


def byte_tokenizer(chat_template: str | None = None, adds: str = "<s> $A") -> PreTrainedTokenizerFast:
    """One token per byte, "ab" and " c" merged, <s> and <e> as bos and eos; `adds`: what is put around a text $A."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<s>", "<e>", *alphabet, "ab", "Ġc"])}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("Ġ", "c")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("<e>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<e>", model_max_length=16)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def jsonl(tmp_path: Path):
    def write(*records: dict, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def texts(tokenizer, example: Example) -> tuple[str, str]:
    """All of the example, and its targets."""
    ids = example.input_ids.tolist()
    targets = [label for label in example.labels.tolist() if label != -100]
    assert all(label in (-100, token) for label, token in zip(example.labels.tolist(), ids, strict=True))
    return tokenizer.decode(ids), tokenizer.decode(targets)


def test_long_text_is_cut_into_windows_and_a_single_token_at_the_end_left_out(jsonl):
    tokenizer = byte_tokenizer()
    path = jsonl({"text": "0123456789xy"}, {"text": "z"}, {"text": ""}, {"text": "01234567"})
    examples = load_examples([path], tokenizer, seq=4)
    assert [texts(tokenizer, e)[0] for e in examples] == ["<s>012", "3456", "789x", "<s>z", "<s>012", "3456"]
    assert [e.targets for e in examples] == [3, 3, 3, 1, 3, 3]
    assert examples[0].input_ids.dtype == np.int32


def test_prompt_is_masked_and_completion_ends_with_one_eos(jsonl):
    tokenizer = byte_tokenizer()
    path = jsonl(
        {"prompt": "xy", "completion": " cd"},
        {"prompt": "xy", "completion": "d<e>"},
        {"prompt": "x<e>", "completion": ""},
        {"prompt": "", "completion": "q"},
    )
    examples = load_examples([path], tokenizer, seq=16)
    assert [texts(tokenizer, e) for e in examples] == [
        ("<s>xy cd<e>", " cd<e>"),
        ("<s>xyd<e>", "d<e>"),
        ("<s>x<e><e>", "<e>"),
        ("<s>q<e>", "q<e>"),
    ]


def test_token_across_prompt_and_completion_keeps_the_prompt_as_generation_sees_it(jsonl):
    tokenizer = byte_tokenizer(adds="$A")
    (example,) = load_examples([jsonl({"prompt": "a", "completion": "b"})], tokenizer, seq=16)
    assert example.input_ids.tolist() == tokenizer.convert_tokens_to_ids(["a", "b", "<e>"])
    assert example.labels.tolist() == [-100, *example.input_ids.tolist()[1:]]


def test_completion_is_cut_off_but_a_prompt_without_room_is_an_error(jsonl):
    tokenizer = byte_tokenizer()
    (example,) = load_examples([jsonl({"prompt": "12", "completion": "3456"})], tokenizer, seq=4)
    assert texts(tokenizer, example) == ("<s>123", "3")
    path = jsonl({"prompt": "1", "completion": "2"}, {"prompt": "123", "completion": "4"})
    with pytest.raises(DataError, match=r"data\.jsonl:2: the prompt has 4 tokens .* --seq 4; raise --seq"):
        load_examples([path], tokenizer, seq=4)


def test_eos_that_the_tokenizer_adds_ends_texts_but_never_a_prompt(jsonl):
    tokenizer = byte_tokenizer(adds="<s> $A <e>")
    examples = load_examples([jsonl({"text": "xy"}, {"prompt": "x", "completion": "y"})], tokenizer, seq=16)
    assert [texts(tokenizer, e) for e in examples] == [("<s>xy<e>", "<s>xy<e>"), ("<s>xy<e>", "y<e>")]


def conversation(*turns: str) -> dict:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]}


def test_only_assistant_turns_are_targets(jsonl):
    tokenizer = byte_tokenizer(CHATML)
    (example,) = load_examples([jsonl(conversation("hi", "yo", "so", "no", "left out"))], tokenizer, seq=200)
    assert texts(tokenizer, example) == (
        "<|user|>hi<e>\n<|assistant|>yo<e>\n<|user|>so<e>\n<|assistant|>no<e>\n",
        "yo<e>\nno<e>\n",
    )


def test_template_that_rewrites_finished_turns_gives_an_example_for_each(jsonl):
    tokenizer = byte_tokenizer(THINKING)
    examples = load_examples([jsonl(conversation("hi", "yo", "so", "no"))], tokenizer, seq=200)
    assert [texts(tokenizer, e) for e in examples] == [
        ("<|user|>hi<e><|assistant|>[thought]yo<e>", "ought]yo<e>"),
        ("<|user|>hi<e><|assistant|>yo<e><|user|>so<e><|assistant|>[thought]no<e>", "ought]no<e>"),
    ]


def test_long_conversation_keeps_the_turns_that_fit(jsonl):
    tokenizer = byte_tokenizer(THINKING)
    assert len(load_examples([jsonl(conversation("hi", "yo", "so", "no"))], tokenizer, seq=40)) == 1
    with pytest.raises(DataError, match=r"data\.jsonl:1: the prompt has \d+ tokens"):
        load_examples([jsonl(conversation("hi", "yo", "so", "no"))], tokenizer, seq=20)


@pytest.mark.parametrize(
    ("template", "says"),
    [(None, "no chat template"), (REFUSING, "roles must alternate"), (REWRITING, "rewrites earlier messages")],
)
def test_chat_template_errors_name_file_and_line(jsonl, template, says):
    with pytest.raises(DataError, match=rf"data\.jsonl:1: .*{says}"):
        load_examples([jsonl(conversation("hi", "yo"))], byte_tokenizer(template), seq=99)


def test_big_text_in_pieces_gives_the_tokens_of_the_whole(tmp_path: Path, monkeypatch):
    text = "ab c ab\n\n\nab c\n" * 20 + "ab c" * 30 + "ab" * 60
    path = tmp_path / "a.txt"
    path.write_text(text)
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(encode, "PIECE_CHARS", 20)
    examples = load_examples([path], tokenizer, seq=8)
    whole = tokenizer(text, verbose=False)["input_ids"]
    assert np.concatenate([e.input_ids for e in examples]).tolist() == whole[: len(whole) - (len(whole) % 8 == 1)]


def test_last_part_of_the_records_is_held_out(jsonl, tmp_path: Path):
    tokenizer = byte_tokenizer()
    path = jsonl(*({"text": f"{n:02} and a second window"} for n in range(40)))
    train, held = load_data([path], None, tokenizer, seq=16)
    assert [texts(tokenizer, e)[0][:5] for e in held[::2]] == ["<s>38", "<s>39"]
    assert len(train) == 76
    stream = tmp_path / "stream.txt"
    stream.write_text("0123456789" * 10)
    train, held = load_data([stream], None, tokenizer, seq=4)
    assert (len(train), len(held)) == (24, 1)
    train, held = load_data([path, stream], None, tokenizer, seq=16)
    assert (len(train), len(held)) == (80 + 7 - 2, 2)


def test_only_record_is_split_by_its_windows_and_too_little_data_says_what_to_do(jsonl):
    tokenizer = byte_tokenizer()
    path = jsonl({"text": "0123456"})
    train, held = load_data([path], None, tokenizer, seq=4)
    assert (len(train), len(held)) == (1, 1)
    with pytest.raises(DataError, match=r"one example .* give more data, a smaller --seq, or .* --eval"):
        load_data([path], None, tokenizer, seq=8)
    with pytest.raises(DataError, match="no record is long enough"):
        load_data([jsonl({"text": ""})], None, tokenizer, seq=8)
    with pytest.raises(DataError, match="--seq 1"):
        load_data([path], None, tokenizer, seq=1)


def test_held_out_file_is_used_whole_and_may_not_be_a_training_file(jsonl):
    tokenizer = byte_tokenizer()
    data, held_out = jsonl({"text": "one"}, name="a.jsonl"), jsonl({"text": "two"}, {"text": "six"}, name="b.jsonl")
    train, held = load_data([data], [held_out], tokenizer, seq=8)
    assert [texts(tokenizer, e)[0] for e in train + held] == ["<s>one", "<s>two", "<s>six"]
    with pytest.raises(DataError, match=r"a\.jsonl: is given twice"):
        load_data([data], [held_out, data.parent / "." / "a.jsonl"], tokenizer, seq=8)
    with pytest.raises(DataError, match="is given twice"):
        load_data([data, data], None, tokenizer, seq=8)


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason="needs llama-stories260K-hf in shared/data beside the repo")
def test_real_tokenizer_that_puts_a_space_before_every_text(tmp_path: Path, jsonl, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(REAL_TOKENIZER)
    (example,) = load_examples([jsonl({"prompt": "Once upon", "completion": "a time"})], tokenizer, seq=64)
    joined = tokenizer("Once upona time")["input_ids"] + [tokenizer.eos_token_id]
    assert example.input_ids.tolist() == joined
    text = "Once upon a time.\nThere was a cat.\n\n" * 40
    path = tmp_path / "a.txt"
    path.write_text(text)
    monkeypatch.setattr(encode, "PIECE_CHARS", 100)
    ids = np.concatenate([e.input_ids for e in load_examples([path], tokenizer, seq=512)])
    assert ids.tolist() == tokenizer(text, verbose=False)["input_ids"]
