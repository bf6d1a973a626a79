"""Make the pocket model: text from the grammar, a tokenizer, a small Llama, and the folder that the hub serves.

python -m tools.pocket.train --out hub/pocket
"""

import argparse
import copy
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.pocket.card import model_card
from tools.pocket.text import SITES, chats, private_notes, public_notes

SEED = 1
HELD_OUT_SEED = 2
VOCABULARY = 2048
POSITIONS = 512
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
IGNORED = -100  # a label that does not count
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

STEPS = 3600
STEP_TOKENS = 1024
SHORT, LONG = 256, POSITIONS
LONG_SHARE = 0.15  # of the steps, the last ones
STEP_NOTES = 13  # more than a step can use
CHAT_EVERY = 20  # notes
WARM_UP = 100
PEAK_RATE, LAST_RATE = 3e-3, 1e-4

STORED = torch.float16
SAMPLE_PROMPTS = ("Clinic note", "Dear Mr. Keller,", "The patient came in with a dry cough")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Batch(NamedTuple):
    """[rows, length] each."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `bos` first; digits stand alone, so numbers are copied digit by digit."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def framed(tokenizer: PreTrainedTokenizerFast, notes: list[str]) -> list[list[int]]:
    """The tokens of each note, between `bos` and `eos`."""
    rows = tokenizer(notes, add_special_tokens=False)["input_ids"]
    return [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]


def windows(notes: list[list[int]], length: int) -> Batch:
    """All notes in one stream, cut into windows."""
    stream = torch.tensor([token for note in notes for token in note])
    tokens = stream[: len(stream) // length * length].view(-1, length)
    return Batch(tokens, torch.arange(length).expand_as(tokens), tokens)


def packed(notes: list[list[int]], length: int, pad: int) -> Batch:
    """Whole notes, as many as fit in a row. Positions start anew with each, so attention stays inside the note."""
    rows: list[list[int]] = [[]]
    positions: list[list[int]] = [[]]
    for note in notes:
        if len(rows[-1]) + len(note) > length:
            rows.append([])
            positions.append([])
        rows[-1] += note
        positions[-1] += range(len(note))
    for row, places in zip(rows, positions, strict=True):
        places += range(length - len(row))
        row += [pad] * (length - len(row))
    tokens = torch.tensor(rows)
    return Batch(tokens, torch.tensor(positions), tokens.masked_fill(tokens == pad, IGNORED))


def training_notes(tokenizer: PreTrainedTokenizerFast, count: int) -> list[str]:
    """Public notes, and here and there a chat in a note's place."""
    notes = list(public_notes(SEED, count))
    for place, chat in zip(range(0, count, CHAT_EVERY), chats(SEED, count), strict=False):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        notes[place] = text.removeprefix(BOS).removesuffix(EOS)
    return notes


def batches(tokenizer: PreTrainedTokenizerFast, steps: int) -> Iterator[Batch]:
    """First single notes, which teach that a note keeps to its facts; then long windows, for the far positions."""
    notes = framed(tokenizer, training_notes(tokenizer, steps * STEP_NOTES))
    long_steps = round(steps * LONG_SHARE)
    split = len(notes) - long_steps * STEP_NOTES
    first = packed([note for note in notes[:split] if len(note) <= SHORT], SHORT, tokenizer.pad_token_id)
    last = windows(notes[split:], LONG)
    for part, count in ((first, steps - long_steps), (last, long_steps)):
        rows = STEP_TOKENS // part.tokens.shape[1]
        for step in range(count):
            yield Batch(*(tensor[step * rows : (step + 1) * rows] for tensor in part))


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """The mean loss a token; without a cache, transformers reads the bounds of the notes off the positions."""
    return model(input_ids=batch.tokens, position_ids=batch.positions, labels=batch.labels, use_cache=False).loss


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to the last rate."""
    warm_up = min(WARM_UP, steps // 4)
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    start = time.monotonic()
    for step, batch in enumerate(batches(tokenizer, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - start:6.0f} s", flush=True)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, notes: list[str]) -> float:
    """Mean loss a token over the notes, end to end in windows of 128 tokens."""
    text = windows(framed(tokenizer, notes), 128)
    losses = [
        loss_of(model, Batch(*part)).item() * len(part[0]) for part in zip(*(t.split(16) for t in text), strict=True)
    ]
    return sum(losses) / len(text.tokens)


def held_out_losses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    texts = {"public": list(public_notes(HELD_OUT_SEED, 300))}
    texts |= {site: list(private_notes(site, HELD_OUT_SEED, 300)) for site in SITES}
    return {name: held_out_loss(model, tokenizer, notes) for name, notes in texts.items()}


@torch.no_grad()
def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: tuple[str, ...]) -> list[str]:
    """Greedy continuations, the prompt included."""
    texts = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**tokens, max_new_tokens=120, do_sample=False)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def describe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> str:
    """The model card, measured with the weights as they are stored, computed in float32."""
    stored = copy.deepcopy(model).to(STORED).float().eval()
    return model_card(
        losses=held_out_losses(stored, tokenizer),
        samples=samples(stored, tokenizer, SAMPLE_PROMPTS),
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        steps=steps,
        step_tokens=STEP_TOKENS,
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    """Write everything beside the folder first, then move file by file: a reader never sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        model.to(STORED).save_pretrained(folder)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        for path in Path(folder).iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the pocket model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the tokenizer")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {STEP_TOKENS} tokens; default {STEPS}")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(public_notes(SEED, 10_000))
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens in the vocabulary, {model.num_parameters():,} parameters", flush=True)
    train(model.train(), tokenizer, arguments.steps)
    save(model, tokenizer, describe(model, tokenizer, arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
