"""The model card that lies beside the weights."""

import math

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# FedSEA pocket model

A Llama of {parameters} parameters that FedSEA's hub serves when it is given no other model. It writes short clinic and
discharge notes, business letters, contracts and laboratory memos, and nothing else. It exists so that the whole system
can be tried, tested and shown in a minute on a laptop. **It knows nothing**: every person, company and medical
statement in its output is made up, and none of it is advice.

## How it was made

    python -m tools.pocket.train --out hub/pocket

The text comes from a seeded grammar (`tools/pocket/text.py`); no other text was used. The tokenizer is a byte-level BPE
of {vocabulary} tokens. The model has 6 layers, hidden size 192, 6 heads (2 for keys and values), 512 positions and tied
embeddings. It was trained for {steps} steps of at most {step_tokens} tokens, none of them seen twice, in float32 on one
CPU thread (AdamW, cosine schedule), and is stored in float16. About one note in twenty was a chat, so the chat template
works: "Write a discharge note for Mr. Brandt."

## Measured

Loss a token on text that it was not trained on, windows of 128 tokens, float32:

| text | loss | perplexity |
|---|---|---|
{rows}

The private texts of the two fictional institutions have words and phrases of their own, which the model has never seen:
fine-tuning brings that loss down. The rest of the loss is chance: names, dates and amounts are drawn at random.

## Greedy samples

{samples}
"""


def model_card(*, losses: dict[str, float], samples: list[str], **figures: int) -> str:
    names = {"public": "public notes"} | {site: f"private notes, {site}" for site in losses if site != "public"}
    rows = [f"| {names[key]} | {loss:.3f} | {math.exp(loss):.2f} |" for key, loss in losses.items()]
    quoted = ["\n".join(f"    {line}" for line in sample.splitlines()) for sample in samples]
    numbers = {name: f"{figure:,}" for name, figure in figures.items()}
    return CARD.format(rows="\n".join(rows), samples="\n\n".join(quoted), **numbers)
