"""The pocket model: what lies in hub/pocket, and the grammar whose text it was trained on."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.pocket.text import GENRES, PRIVATE_WORDS, SITES, chats, private_notes, public_notes
from tools.pocket.train import (
    HELD_OUT_SEED,
    SEED,
    STEP_NOTES,
    STEPS,
    framed,
    held_out_loss,
    make_model,
    packed,
    windows,
)

FOLDER = Path(__file__).parent.parent / "hub" / "pocket"
PUBLIC_LOSS = 0.9  # measured: 0.85
FIRST_NOTE = """Inventory, Harbour Foods, attic.
15 x warm lamp
5 x sharp scarf
8 x torn bond
Nothing else was found in the attic."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def greedy(model, tokenizer, tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=150, do_sample=False)[0, tokens.shape[1] :]


def test_the_folder_holds_everything_in_at_most_eight_megabytes() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert sum(files.values()) <= 8_000_000


def test_the_model_is_a_llama_of_one_to_four_million_parameters(model, tokenizer) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512


def test_held_out_public_text_is_learned_and_private_text_leaves_room(model, tokenizer) -> None:
    public = held_out_loss(model, tokenizer, list(public_notes(HELD_OUT_SEED, 60)))
    assert public < PUBLIC_LOSS
    for site in SITES:
        private = held_out_loss(model, tokenizer, list(private_notes(site, HELD_OUT_SEED, 20)))
        assert private > public + 1.0, site


def test_the_far_positions_are_trained_too(model, tokenizer) -> None:
    tokens = windows(framed(tokenizer, list(public_notes(HELD_OUT_SEED, 40))), 512).tokens
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, 256:-1]
    assert torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 257:].flatten()) < PUBLIC_LOSS


def test_a_greedy_note_is_a_note_that_ends(model, tokenizer) -> None:
    prompt = "Discharge note. Patient: Mrs. Palmer, 47 years old.\n"
    output = greedy(model, tokenizer, tokenizer(prompt, return_tensors="pt")["input_ids"])
    text = tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1] == tokenizer.eos_token_id
    assert 100 < len(text) < 600
    assert text.count(".") >= 3


def test_a_chat_request_gets_a_note_about_the_person_asked_for(model, tokenizer) -> None:
    chat = [{"role": "user", "content": "Write a discharge note for Mr. Brandt."}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = greedy(model, tokenizer, tokens)
    assert output[-1] == tokenizer.eos_token_id
    assert "Mr. Brandt" in tokenizer.decode(output)


@pytest.mark.parametrize(
    "text", ["", "Dear Mr. Keller,\n", "  two  spaces\tand a tab", "Grüße, 你好, 🙂 \x00", "1,234.50"]
)
def test_the_tokenizer_gives_back_every_text(tokenizer, text) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_chat_template_ends_an_answer_and_opens_the_next(tokenizer) -> None:
    chat = [{"role": "user", "content": "Hello "}, {"role": "assistant", "content": "Dear"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|begin|><|user|>Hello<|assistant|>Dear<|end|>"
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|begin|><|user|>Hello<|assistant|>"


def test_a_seed_always_gives_the_same_notes() -> None:
    assert list(public_notes(7, 20)) == list(public_notes(7, 50))[:20]
    assert list(public_notes(7, 20)) != list(public_notes(8, 20))
    for site in SITES:
        assert list(private_notes(site, 7, 20)) == list(private_notes(site, 7, 50))[:20]
        assert list(private_notes(site, 7, 20)) != list(private_notes(site, 8, 20))
    assert next(public_notes(7, 1)) == FIRST_NOTE


def test_notes_are_many_and_short() -> None:
    for notes in (list(public_notes(3, 2000)), *(list(private_notes(site, 3, 2000)) for site in SITES)):
        assert len(set(notes)) == 2000
        assert all(50 < len(note) < 800 for note in notes)
        assert not any("{" in note or "  " in note or note != note.strip() for note in notes)


def test_training_saw_no_held_out_note_and_no_private_word() -> None:
    trained = list(public_notes(SEED, STEPS * STEP_NOTES))
    assert not set(public_notes(HELD_OUT_SEED, 300)) & set(trained)
    words = "|".join(re.escape(word) for words in PRIVATE_WORDS.values() for word in words)
    assert not re.search(rf"\b({words})\b", "\n".join(trained), re.IGNORECASE)


def test_every_genre_can_be_asked_for_in_a_chat() -> None:
    requests = " ".join(chat[-2]["content"] for chat in chats(3, 200))
    assert all(genre in requests for genre in GENRES)


def test_private_words_stand_in_every_private_note() -> None:
    for site, words in PRIVATE_WORDS.items():
        for note in private_notes(site, 3, 500):
            assert any(word in note for word in words)


def test_the_sites_share_no_private_words() -> None:
    clinic, lawfirm = ("\n".join(private_notes(site, 3, 500)) for site in ("clinic", "lawfirm"))
    assert not [word for word in PRIVATE_WORDS["clinic"] if word in lawfirm]
    assert not [word for word in PRIVATE_WORDS["lawfirm"] if word in clinic]


def test_packed_notes_do_not_see_each_other(tokenizer) -> None:
    first, other, second = framed(tokenizer, ["Dear Mr. Fox,", "Dear Mrs. Ox,", "Yours sincerely"])
    torch.manual_seed(0)
    model = make_model(tokenizer).eval()
    ours = slice(len(first), len(first) + len(second))
    with torch.no_grad():
        batches = [packed([note[: len(first)], second], 64, tokenizer.pad_token_id) for note in (first, other)]
        logits = [
            model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits[0] for batch in batches
        ]
    assert not torch.equal(batches[0].tokens, batches[1].tokens)
    assert torch.equal(logits[0][ours], logits[1][ours])
    assert not torch.equal(logits[0][: ours.start], logits[1][: ours.start])


def test_padding_has_no_label_and_a_full_row_opens_the_next() -> None:
    batch = packed([[1, 2, 3], [4, 5], [6, 7, 8, 9]], 5, pad=0)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.labels.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, -100]]
