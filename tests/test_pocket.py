"""The pocket model: what lies in hub/pocket, and the grammar whose text it was trained on."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.pocket.text import GENRES, PRIVATE_WORDS, SITES, chats, private_notes, public_notes
from tools.pocket.train import HELD_OUT_SEED, SEED, held_out_loss

FOLDER = Path(__file__).parent.parent / "hub" / "pocket"
PUBLIC_LOSS = 0.70  # THRESHOLD
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
    text = tokenizer.eos_token.join(tokenizer.bos_token + note for note in public_notes(HELD_OUT_SEED, 40))
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = tokens[: len(tokens) // 512 * 512].view(-1, 512)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, 256:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 257:].flatten())
    assert loss < PUBLIC_LOSS


def test_greedy_text_is_a_note_that_ends(model, tokenizer) -> None:
    prompt = "Clinic note. Patient: Clara Novak, age 47, teacher.\n"
    output = greedy(model, tokenizer, tokenizer(prompt, return_tensors="pt")["input_ids"])
    text = tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1] == tokenizer.eos_token_id
    assert 100 < len(text) < 600
    assert " she " in text.lower()
    assert " he " not in text.lower()


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


def test_held_out_notes_are_not_among_those_trained_on() -> None:
    assert not set(public_notes(HELD_OUT_SEED, 300)) & set(public_notes(SEED, 40_000))


def test_every_genre_can_be_asked_for_in_a_chat() -> None:
    requests = " ".join(chat[-2]["content"] for chat in chats(3, 200))
    assert all(genre in requests for genre in GENRES)


def test_private_words_stand_in_every_private_note_and_in_no_public_one() -> None:
    public = "\n".join(public_notes(SEED, 5000)).lower()
    for site, words in PRIVATE_WORDS.items():
        assert not [word for word in words if re.search(rf"\b{word.lower()}\b", public)]
        for note in private_notes(site, 3, 500):
            assert any(word in note for word in words)


def test_the_sites_share_no_private_words() -> None:
    clinic, lawfirm = ("\n".join(private_notes(site, 3, 500)) for site in ("clinic", "lawfirm"))
    assert not [word for word in PRIVATE_WORDS["clinic"] if word in lawfirm]
    assert not [word for word in PRIVATE_WORDS["lawfirm"] if word in clinic]
