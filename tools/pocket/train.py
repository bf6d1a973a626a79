"""Make the pocket model: text from the grammar, a tokenizer, a small Llama, and the folder that the hub serves.

python -m tools.pocket.train --out hub/pocket
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

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
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

STEPS = 3600
STEP_TOKENS = 1024
SHORT, LONG = 256, POSITIONS
LONG_SHARE = 0.15  # of the steps, the last ones: they teach the far positions, at about the same cost a token
CHAT_SHARE = 0.05  # of the notes
WARM_UP = 100
PEAK_RATE, LAST_RATE = 3e-3, 1e-4

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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


def stream(tokenizer: PreTrainedTokenizerFast, notes: list[str]) -> Tensor:
    """All notes in one row of tokens, each between `bos` and `eos`."""
    rows = tokenizer(notes, add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return torch.tensor([token for row in rows for token in (bos, *row, eos)])


def training_stream(tokenizer: PreTrainedTokenizerFast, tokens: int) -> Tensor:
    """At least `tokens` tokens of public notes, with the chats spread among them."""
    chat_every = round(1 / CHAT_SHARE)
    count = tokens // 70
    notes = list(public_notes(SEED, count))
    for place, chat in zip(range(0, count, chat_every), chats(SEED, count), strict=False):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        notes[place] = text.removeprefix(BOS).removesuffix(EOS)
    row = stream(tokenizer, notes)
    if len(row) < tokens:
        raise ValueError(f"{count} notes gave {len(row)} tokens, {tokens} are needed")
    return row


def batches(row: Tensor, steps: int) -> Iterator[Tensor]:
    """One pass over the row: short windows first, then long ones; [windows, length], no token used twice."""
    long_from = round(steps * (1 - LONG_SHARE))
    for step in range(steps):
        length = SHORT if step < long_from else LONG
        yield row[step * STEP_TOKENS : (step + 1) * STEP_TOKENS].view(-1, length)


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to the last rate."""
    warm_up = min(WARM_UP, steps // 4)
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: LlamaForCausalLM, row: Tensor, steps: int) -> None:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    start = time.monotonic()
    for step, batch in enumerate(batches(row, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - start:6.0f} s", flush=True)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, notes: list[str]) -> float:
    """Mean loss a token over the notes, in windows of the training length."""
    row = stream(tokenizer, notes)
    windows = row[: len(row) // SHORT * SHORT].view(-1, SHORT)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(16)]
    return sum(losses) / len(windows)


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


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    """Write everything beside the folder first, then move file by file: a reader never sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        model.save_pretrained(folder)
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
    train(model.train(), training_stream(tokenizer, arguments.steps * STEP_TOKENS), arguments.steps)
    model.to(torch.float16)
    stored = model.eval().float()  # judged with the weights as stored, computed in float32
    losses = held_out_losses(stored, tokenizer)
    print(losses)
    texts = samples(stored, tokenizer, ("Clinic note", "Dear Mr. Keller,", "The patient came in with a dry cough"))
    card = model_card(model.num_parameters(), len(tokenizer), arguments.steps * STEP_TOKENS, losses, texts)
    save(model.to(torch.float16), tokenizer, card, arguments.out)


if __name__ == "__main__":
    main()
