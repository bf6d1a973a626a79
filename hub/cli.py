"""The `hub` command."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hub.pages import ask_for_huge_pages
from messaging.commands import INTERRUPTED, exit_codes, quiet_libraries, terminable
from messaging.errors import InputError

app = typer.Typer(
    help="Host the middle blocks of a language model for edges that keep their text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StateOption = Annotated[Path, typer.Option("--state", help="Folder of keys, checkpoints and adapters.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_STATE = Path("fedsea-hub")


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hugging Face id of a causal language model (default: pocket model).")
    ] = None,
    listen: Annotated[
        str, typer.Option(help="tcp://HOST:PORT; takes PORT, PORT+1 and PORT+2, or three free ports for PORT 0.")
    ] = "tcp://127.0.0.1:7750",
    advertise: Annotated[str | None, typer.Option(help="Host name or address that edges dial.")] = None,
    state: StateOption = DEFAULT_STATE,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, ...; cuda:0,cuda:1 spreads the layers over both.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; edges and wire follow.")] = "auto",
    cohort: Annotated[int, typer.Option(min=1, help="Edges that must be here before training starts.")] = 1,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds to train; 0: no end.")] = 0,
    round_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per round.")] = 20,
    lr: Annotated[float, typer.Option(help="Learning rate of the LoRA adapters.")] = 1e-3,
    lora_rank: Annotated[int, typer.Option(min=1)] = 8,
    lora_alpha: Annotated[float, typer.Option()] = 16.0,
    target_modules: Annotated[
        str, typer.Option(help="Comma-separated module names (default: all linears of attention and MLP).")
    ] = "",
    grace: Annotated[
        float, typer.Option(help="Seconds after which a silent edge no longer holds up the cohort; inf: never.")
    ] = 60.0,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds between checkpoints: what a hub that is killed has to do again.")
    ] = 10.0,
    quorum: Annotated[
        int | None, typer.Option(min=1, help="Edges that are enough for a joined step after --deadline (default: all).")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="With --quorum: seconds that a joined step waits for the others.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Train in less memory: run each layer once more in the backward.")
    ] = False,
    join_file: Annotated[Path | None, typer.Option(help="Write the join string there once edges are accepted.")] = None,
    headless: Annotated[bool, typer.Option("--headless", help="Plain log lines instead of the live view.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the initial adapter.")] = 0,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Train so many replicas of B side by side, as Ray processes.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="HOST:PORT of a Ray cluster for the replicas (default: this machine alone).")
    ] = None,
) -> None:
    """Serve Blocks B: train with the edges that join, then serve generation."""
    with exit_codes(), terminable():
        if not lr > 0 or not grace > 0 or not lora_alpha > 0:
            raise InputError("--lr, --lora-alpha and --grace must be above 0")
        if ray is not None and replicas is None:
            raise InputError("--ray says where replicas run: give --replicas too")
        _check_quorum(quorum, deadline, cohort)
        ask_for_huge_pages()
        from hub.serve import Options
        from hub.serve import serve as run

        stopped = run(
            Options(
                model=model,
                listen=listen,
                advertise=advertise,
                state=state,
                device=device,
                dtype=dtype,
                cohort=cohort,
                rounds=rounds,
                round_steps=round_steps,
                lr=lr,
                lora_rank=lora_rank,
                lora_alpha=lora_alpha,
                target_modules=tuple(name.strip() for name in target_modules.split(",") if name.strip()),
                grace_s=grace,
                checkpoint_s=checkpoint_every,
                quorum=quorum,
                deadline_s=deadline,
                recompute=recompute,
                join_file=join_file,
                headless=headless,
                seed=seed,
                replicas=replicas,
                ray=ray,
            )
        )
    sys.exit(INTERRUPTED if stopped == "SIGINT" else 0)


def _check_quorum(quorum: int | None, deadline: float | None, cohort: int) -> None:
    if (quorum is None) != (deadline is None):
        raise InputError("--quorum and --deadline belong together: give both, or neither to wait for every edge")
    if deadline is not None and not 0 < deadline < math.inf:
        raise InputError(f"--deadline {deadline:g}: give the seconds that a joined step waits for edges, above 0")
    if quorum is not None and quorum > cohort:
        raise InputError(f"--quorum {quorum} is more than the --cohort of {cohort}: give at most that")


@app.command()
def invite(
    uses: Annotated[int, typer.Option("--uses", min=1, help="Edges that it lets in.")] = 1,
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is good: seconds, or as 10m, 2h, 1d.")] = "10m",
    name: Annotated[
        str | None, typer.Option("--name", help="Let one edge in, under this name, whatever it calls itself.")
    ] = None,
    state: StateOption = DEFAULT_STATE,
    json_: JsonOption = False,
) -> None:
    """Make a join string for another edge."""
    from hub import admin

    _run(lambda: admin.invite(state, uses, admin.seconds(ttl), name), admin.show_invite, json_)


@app.command()
def edges(state: StateOption = DEFAULT_STATE, json_: JsonOption = False) -> None:
    """List everybody who was ever enrolled, and the invitations that are open."""
    from hub import admin

    _run(lambda: admin.edges(state), admin.show_edges, json_)


@app.command()
def revoke(name: str, state: StateOption = DEFAULT_STATE, json_: JsonOption = False) -> None:
    """Shut an edge out for ever."""
    from hub import admin

    _run(lambda: admin.revoke(state, name), admin.show_revoke, json_)


@app.command("rotate-key")
def rotate_key(state: StateOption = DEFAULT_STATE, json_: JsonOption = False) -> None:
    """Give the hub a new key at its next start; edges that connect before that learn it by themselves."""
    from hub import admin

    _run(lambda: admin.rotate_key(state), admin.show_rotate_key, json_)


@app.command()
def audit(
    last: Annotated[int, typer.Option("--last", min=1, help="Lines to show.")] = 50,
    state: StateOption = DEFAULT_STATE,
    json_: JsonOption = False,
) -> None:
    """Show who was let in, who was not and why."""
    from hub import admin

    _run(lambda: admin.audit(state, last), admin.show_audit, json_)


@app.command()
def status(state: StateOption = DEFAULT_STATE, json_: JsonOption = False) -> None:
    """Show what the hub does, running or stopped."""
    from hub import admin

    _run(lambda: admin.status(state), admin.show_status, json_)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    state: StateOption = DEFAULT_STATE,
    json_: JsonOption = False,
) -> None:
    """Write the last published adapter as a PEFT folder."""
    from hub import admin

    _run(lambda: admin.export(state, out), admin.show_export, json_)


def _run(act: Callable[[], Any], show: Callable[[Any, Console], None], as_json: bool) -> None:
    with exit_codes():
        data = act()
        if as_json:
            print(json.dumps(data))
        else:
            show(data, Console())


def main() -> None:
    """Entry point of the `hub` command."""
    quiet_libraries()
    app()
