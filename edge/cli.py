"""The `edge` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from messaging.commands import exit_codes, quiet_libraries
from messaging.errors import InputError

app = typer.Typer(
    help="Fine-tune and use a large model with a hub, without showing it your text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JoinArgument = Annotated[
    str | None, typer.Argument(help="Join string that the hub printed, or @FILE; leave out once enrolled.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or Hugging Face id; default: fetch the blocks from the hub.")
]
NoiseOption = Annotated[
    float, typer.Option("--noise", min=0.0, help="Mean absolute noise on what leaves (the paper's scale).")
]
LastNoiseOption = Annotated[
    float | None,
    typer.Option("--noise", min=0.0, help="As of `edge join` (default: what this state trains with, else 0.02)."),
]
StateOption = Annotated[Path, typer.Option("--state", help="Folder of this edge's key, cache and training.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0)]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")]
WireOption = Annotated[
    str | None,
    typer.Option(
        "--wire", help="States and gradients on the network: fp32, bf16, fp16, int8 (default: the model's dtype)."
    ),
]
LoadInOption = Annotated[
    str | None,
    typer.Option(
        "--load-in", metavar="8bit|4bit", help="Hold the weights here in fewer bits (default: as the hub serves them)."
    ),
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name to enrol under, shown at the hub (default: this machine's).")
]
DEFAULT_STATE = Path("fedsea-edge")


@app.command("join")
def join_(
    join: JoinArgument = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help=".jsonl, .txt or .csv to train on; repeatable.")
    ] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option("--eval", help="Held-out data (default: the last 5% of --data).")
    ] = None,
    model: ModelOption = None,
    partition: Annotated[str, typer.Option(help="auto, or p:q: the first p and last q layers stay here.")] = "auto",
    profile: Annotated[
        str | None, typer.Option(help="Plan for this machine instead of the one probed: a name or a YAML file.")
    ] = None,
    noise: NoiseOption = 0.02,
    batch: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 4,
    micro_batches: Annotated[
        str, typer.Option(help="Parts that a batch goes through in, at the edge and the hub at the same time.")
    ] = "auto",
    seq: Annotated[int, typer.Option(min=2, help="Tokens per row, at most.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Learning rate of this edge's blocks (default: the hub's).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps in all (default: until the hub is done).")] = None,
    state: StateOption = DEFAULT_STATE,
    name: NameOption = None,
    device: DeviceOption = "auto",
    load_in: LoadInOption = None,
    share_loss: Annotated[bool, typer.Option("--share-loss", help="Let the hub's screen show the loss.")] = False,
    headless: Annotated[bool, typer.Option("--headless", help="Plain log lines instead of the live view.")] = False,
    seed: SeedOption = 0,
    wire: WireOption = None,
    give_up: Annotated[
        float | None,
        typer.Option(
            "--give-up",
            min=1.0,
            metavar="SECONDS",
            help="How long the hub may be silent (default: 30 for the first contact, then without end).",
        ),
    ] = None,
) -> None:
    """Fine-tune with a hub: your text, labels and logits stay here."""
    with exit_codes():
        if not data:
            raise InputError("give the text to train on: --data FILE (.jsonl, .txt or .csv)")
        if lr is not None and not lr > 0:
            raise InputError("--lr must be above 0")
        from edge.join import JoinOptions
        from edge.join import join as run

        run(
            JoinOptions(
                join=join,
                data=data,
                held_out=held_out or [],
                model=model,
                partition=partition,
                profile=profile,
                noise=noise,
                batch=batch,
                micro_batches=micro_batches,
                seq=seq,
                lr=lr,
                steps=steps,
                state=state,
                name=name,
                device=device,
                load_in=load_in,
                share_loss=share_loss,
                headless=headless,
                seed=seed,
                give_up=give_up,
                wire=wire,
            )
        )


MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1)]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: greedy.")]
DraftOption = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="auto|off|MODEL",
        help="Guess tokens and verify several in one round trip: auto guesses from the text, where that is faster; "
        "or a small model with the same tokenizer, as --model takes it; off: one token a round trip.",
    ),
]
PartitionOption = Annotated[
    str | None, typer.Option("--partition", help="p:q (default: what this state trains with, else 1:1).")
]


@app.command()
def generate(
    join: JoinArgument = None,
    prompt: Annotated[str, typer.Option(help="Text to continue; may be empty.")] = "",
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    draft: DraftOption = "auto",
    noise: LastNoiseOption = None,
    partition: PartitionOption = None,
    model: ModelOption = None,
    state: StateOption = DEFAULT_STATE,
    name: NameOption = None,
    device: DeviceOption = "cpu",
    load_in: LoadInOption = None,
    seed: SeedOption = 0,
    wire: WireOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON line with text, ids and figures.")] = False,
) -> None:
    """Continue a prompt with the split model and the last published adapter."""
    with exit_codes():
        from edge.generate import GenerateOptions
        from edge.generate import generate as run

        run(
            GenerateOptions(
                join=join,
                model=model,
                partition=partition,
                noise=noise,
                state=state,
                name=name,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                device=device,
                draft=draft,
                wire=wire,
                load_in=load_in,
            ),
            prompt,
            json_,
        )


@app.command()
def chat(
    join: JoinArgument = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    draft: DraftOption = "auto",
    noise: LastNoiseOption = None,
    partition: PartitionOption = None,
    model: ModelOption = None,
    state: StateOption = DEFAULT_STATE,
    name: NameOption = None,
    device: DeviceOption = "cpu",
    load_in: LoadInOption = None,
    seed: SeedOption = 0,
    wire: WireOption = None,
) -> None:
    """Talk to the split model, with its chat template."""
    with exit_codes():
        from edge.generate import GenerateOptions
        from edge.generate import chat as run

        run(
            GenerateOptions(
                join=join,
                model=model,
                partition=partition,
                noise=noise,
                state=state,
                name=name,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                device=device,
                draft=draft,
                wire=wire,
                load_in=load_in,
            )
        )


@app.command("rotate-key")
def rotate_key(state: StateOption = DEFAULT_STATE) -> None:
    """Replace this edge's key by a new one, under the same name; the old one is good no more."""
    with exit_codes():
        from edge.rotation import rotate_key as run
        from edge.state import EdgeState
        from messaging.console import Journal

        print(run(EdgeState(state), Journal()))


@app.command()
def profile(
    model: ModelOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show this machine as the planner sees it, and the partitions of a model that fit."""
    with exit_codes():
        from edge.planning import show_profile

        show_profile(model, json_)


def main() -> None:
    """Entry point of the `edge` command."""
    quiet_libraries()
    app()
