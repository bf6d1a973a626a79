"""`make demo`: the whole product in a minute or two, as real processes on this machine.

A hub serves the pocket model; two edges with different private texts and different partitions fine-tune it
together; then the result is measured, shown, exported, and checked against plain peft on the unsplit model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from messaging.commands import quiet_libraries
from tools.pocket.text import private_notes

OUT = Path("demo-out")
BIN = Path(sys.executable).parent
ROUNDS, ROUND_STEPS, COHORT = 3, 20, 2
BATCH, SEQ, LR = 4, 128, 3e-3
NOTES, HELD_OUT = 320, 24
READY_S, TRAIN_S = 60.0, 240.0
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Site:
    """An institution of the demo: the name of its private text, its partition, and how a text of its begins."""

    name: str
    partition: str
    prompt: str

    @property
    def state(self) -> Path:
        """The folder of its edge."""
        return OUT / self.name

    @property
    def train(self) -> Path:
        """Its private text."""
        return OUT / f"{self.name}.jsonl"

    @property
    def held_out(self) -> Path:
        """More of it, never trained on."""
        return OUT / f"{self.name}-held-out.jsonl"


SITES = (Site("clinic", "1:1", "Patient:"), Site("lawfirm", "2:1", "Dear"))


def main() -> int:
    """Run the demo; 0 only if both held-out losses fell and plain peft agrees."""
    started, console = time.monotonic(), Console()
    quiet_libraries()
    make_texts()
    hub = start_hub()
    try:
        wait_for(OUT / "join.txt", hub)
        before = {site.name: sample(site, join=True) for site in SITES}
        train(hub)
        after = {site.name: sample(site, join=False) for site in SITES}
        split = {site.name: split_loss(site) for site in SITES}
    finally:
        stop(hub)
    folder = OUT / "adapter"
    run("hub", "export", "--state", str(OUT / "hub"), "--out", str(folder))
    plain = {site.name: peft_loss(site, folder) for site in SITES}
    reports = {site.name: json.loads((site.state / "report.json").read_text()) for site in SITES}
    return show(console, reports, before, after, split, plain, time.monotonic() - started)


def make_texts() -> None:
    """Write each site's private text and its held-out part."""
    OUT.mkdir(exist_ok=True)
    for path in OUT.rglob("*"):
        if path.is_file():
            path.unlink()
    for site in SITES:
        notes = [json.dumps({"text": text}) for text in private_notes(site.name, 1, NOTES + HELD_OUT)]
        site.train.write_text("\n".join(notes[:NOTES]) + "\n")
        site.held_out.write_text("\n".join(notes[NOTES:]) + "\n")


def start_hub() -> subprocess.Popen[bytes]:
    """The hub, on the terminal that the demo runs in: its live view is what one sees."""
    return subprocess.Popen(
        [
            str(BIN / "hub"), "serve", "--listen", "tcp://127.0.0.1:0", "--state", str(OUT / "hub"),
            "--cohort", str(COHORT), "--rounds", str(ROUNDS), "--round-steps", str(ROUND_STEPS), "--lr", str(LR),
            "--join-file", str(OUT / "join.txt"),
        ],
        env=environment(),
    )  # fmt: skip


def train(hub: subprocess.Popen[bytes]) -> None:
    """Both edges at once, until the hub closes its last round."""
    edges = [start_edge(site) for site in SITES]
    deadline = time.monotonic() + TRAIN_S
    try:
        while any(edge.poll() is None for edge in edges) and time.monotonic() < deadline:
            if hub.poll() is not None:
                raise SystemExit("the hub ended early; see above")
            time.sleep(0.2)
    finally:
        for edge in edges:
            stop(edge)
    for site, edge in zip(SITES, edges, strict=True):
        if edge.returncode != 0:
            raise SystemExit(f"the edge {site.name} ended with {edge.returncode}: see {OUT / site.name}.log")


def start_edge(site: Site) -> subprocess.Popen[bytes]:
    """One edge; its log goes to a file."""
    with (OUT / f"{site.name}.log").open("wb") as log:
        return subprocess.Popen(
            [
                str(BIN / "edge"), "join", "--state", str(site.state), "--data", str(site.train),
                "--eval", str(site.held_out), "--partition", site.partition, "--batch", str(BATCH),
                "--seq", str(SEQ), "--share-loss", "--headless",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
        )  # fmt: skip


def sample(site: Site, join: bool) -> str:
    """A greedy continuation of the site's prompt by the split model, with the demo's default noise."""
    where = [f"@{OUT / 'join.txt'}"] if join else []
    out = run(
        "edge", "generate", *where, "--state", str(site.state), "--name", site.name, "--partition", site.partition,
        "--prompt", site.prompt, "--max-new-tokens", "48", "--json",
    )  # fmt: skip
    return site.prompt + str(json.loads(out.splitlines()[-1])["text"])


def split_loss(site: Site) -> float:
    """Held-out loss of the split model through the hub, noise 0, with the published adapter."""
    import edge

    model = edge.connect(state=site.state, partition=site.partition, noise=0.0)
    with model.hub as link:
        return mean_loss(model, link.tokenizer, site)


def peft_loss(site: Site, adapter: Path) -> float:
    """The same of the unsplit model with the exported adapter, by plain transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from hub.serve import POCKET

    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(POCKET, dtype="float32")
    model = PeftModel.from_pretrained(base, adapter).eval()
    return mean_loss(model, AutoTokenizer.from_pretrained(POCKET), site)


def mean_loss(model: Any, tokenizer: Any, site: Site) -> float:
    """Mean loss per target token over the site's held-out text, as transformers computes it."""
    import torch

    from edge.data import eval_batches, load_examples

    examples = load_examples([site.held_out], tokenizer, SEQ)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in eval_batches(examples, BATCH, SEQ, False, tokenizer.pad_token_id or 0):
            loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            total, tokens = total + float(loss) * batch.tokens, tokens + batch.tokens
    return total / tokens


def show(
    console: Console,
    reports: dict[str, Any],
    before: dict[str, str],
    after: dict[str, str],
    split: dict[str, float],
    plain: dict[str, float],
    seconds: float,
) -> int:
    """Print what came out; the exit code."""
    table = Table(title="held-out loss per token")
    for column in ("edge", "before", "after", "after, noise 0, split", "after, noise 0, plain peft"):
        table.add_column(column, justify="left" if column == "edge" else "right")
    fell = agree = True
    for site in SITES:
        first, last = reports[site.name]["held_out"][0], reports[site.name]["held_out"][-1]
        fell = fell and last < first
        agree = agree and abs(split[site.name] - plain[site.name]) <= TOLERANCE * plain[site.name]
        figures = (first, last, split[site.name], plain[site.name])
        table.add_row(f"{site.name} {site.partition}", *(f"{figure:.4f}" for figure in figures))
    console.print(table)
    for site in SITES:
        console.print(f"\n[bold]{site.name}, before[/bold]\n{before[site.name]}", highlight=False)
        console.print(f"[bold]{site.name}, after[/bold]\n{after[site.name]}", highlight=False)
    console.print(
        "\nThe last two columns are the equality check: noise 0, on the demo's synthetic text. "
        f"{'They agree.' if agree else 'THEY DIFFER.'}\n"
        f"Both losses {'fell' if fell else 'DID NOT FALL'}. The adapter is in {OUT / 'adapter'}, a PEFT folder. "
        f"{seconds:.0f} s in all.",
        highlight=False,
    )
    return 0 if fell and agree else 1


def wait_for(path: Path, hub: subprocess.Popen[bytes]) -> None:
    """Until the hub accepts edges."""
    deadline = time.monotonic() + READY_S
    while not path.exists():
        if hub.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the hub did not start; see above")
        time.sleep(0.1)


def run(*command: str) -> str:
    """A command of the product, waited for; its stdout."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], env=environment(), capture_output=True, text=True, timeout=120
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{done.stderr}")
    return done.stdout


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that the demo started, in order if it lets us."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    """One thread per process: hub and edges share this machine's cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main())
