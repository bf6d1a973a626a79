"""What `hub invite`, `edges`, `revoke`, `status` and `export` do.

Each works on the state folder, whether a hub runs on it or not, and returns JSON-ready data; the `show_`
function beside it prints that data for people.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hub.store.access import TOKEN_TTL_S
from hub.store.state import HubState
from messaging.errors import InputError
from messaging.joining import JoinString

Data = dict[str, Any]

#: A running hub writes its status each second; after this long without, it hangs or is stopped.
_SILENT_S = 5.0


def invite(folder: Path, uses: int = 1, ttl_s: float = TOKEN_TTL_S) -> Data:
    """A join string for so many new edges within so many seconds. InputError if no hub ever ran here."""
    with HubState.open(folder, exclusive=False) as state:
        address = state.address()
        if address is None:
            raise InputError(f"no hub has run on {folder} yet: start one with `hub serve --state {folder}` first")
        token = state.access.invite(uses, ttl_s)
        return {
            "join": JoinString(address, token).encode(),
            "uses": uses,
            "expires_at": time.time() + ttl_s,
            "running": state.running(),
        }


def show_invite(data: Data, console: Console) -> None:
    """The join string on a line of its own, to be copied whole, and what it is good for."""
    console.print(data["join"], soft_wrap=True, markup=False, highlight=False)
    console.print(f"good for {_many(data['uses'], 'edge')} until {_clock_time(data['expires_at'])}; keep it secret")
    if not data["running"]:
        console.print("the hub is stopped: it must run at the same address when they join")


def edges(folder: Path) -> Data:
    """Everybody who was ever enrolled."""
    with HubState.open(folder, exclusive=False) as state:
        return {"edges": [asdict(edge) for edge in state.access.edges()]}


def show_edges(data: Data, console: Console) -> None:
    """A table of the allow-list."""
    if not data["edges"]:
        console.print("no edge is enrolled; `hub invite` makes a join string for one")
        return
    table = Table("name", "key", "enrolled", "last seen", "state", box=None)
    for edge in data["edges"]:
        state = f"revoked {_clock_time(edge['revoked_at'])}" if edge["revoked_at"] else "may connect"
        times = (_clock_time(edge["enrolled_at"]), _clock_time(edge["last_seen"]))
        table.add_row(escape(edge["name"]), escape(edge["key"][:8]), *times, state)
    console.print(table)


def revoke(folder: Path, name: str) -> Data:
    """Shut an edge out for ever. A running hub notices within a second. InputError for a name that is none."""
    with HubState.open(folder, exclusive=False) as state:
        return asdict(state.access.revoke(name))


def show_revoke(data: Data, console: Console) -> None:
    """One line."""
    console.print(f"{escape(data['name'])} is revoked: its key cannot connect or join again", highlight=False)


def status(folder: Path) -> Data:
    """What the hub says of itself (`live`, as it wrote it last), what is stored, and whether it runs."""
    with HubState.open(folder, exclusive=False) as state:
        running, live = state.running(), state.read_status()
        age = time.time() - live["written_at"] if live and "written_at" in live else None
        full = {
            "running": running,
            "silent_s": age if running and age is not None and age > _SILENT_S else None,
            "live": live,
            "stored": _stored(state),
        }
        finite: Data = _finite(full)
        return finite


def show_status(data: Data, console: Console) -> None:
    """What runs, what is stored, and the rest of what the hub says, line by line."""
    stored = data["stored"]
    console.print(_headline(data), highlight=False)
    if stored["model"]:
        console.print(f"model       {escape(stored['model']['name'])}", highlight=False)
    console.print(f"edges       {stored['edges']} enrolled, {stored['revoked']} revoked", highlight=False)
    if point := stored["checkpoint"]:
        when = _clock_time(point["written_at"])
        console.print(f"checkpoint  step {point['hub_step']}, round {point['round']}, written {when}", highlight=False)
    if adapter := stored["adapter"]:
        when = _clock_time(adapter["published_at"])
        console.print(f"adapter     version {adapter['version']}, published {when}", highlight=False)
    for key, value in (data["live"] or {}).items():
        if key not in ("written_at", "process"):
            console.print(f"{key:<11} {_plain_text(value)}", markup=False, highlight=False)


def export(folder: Path, out: Path) -> Data:
    """Write the last published adapter as a PEFT folder. InputError where there is none."""
    # torch and peft take seconds to import, and the other commands do without.
    from hub.store.export import export_peft

    with HubState.open(folder, exclusive=False) as state:
        adapter, model = state.adapters.latest(), state.model()
        if adapter is None or model is None:
            raise InputError(f"{folder} holds no published adapter yet: the first round is not over")
        export_peft(adapter.tensors(), adapter.recipe, model.name, out, model.fan_in_fan_out)
        return {"out": str(out), "version": adapter.version, "round": adapter.round, "base_model": model.name}


def show_export(data: Data, console: Console) -> None:
    """One line."""
    text = f"adapter version {data['version']} of round {data['round']} is in {data['out']}, a PEFT folder"
    console.print(f"{text} for {data['base_model']}", markup=False, highlight=False, soft_wrap=True)


def _stored(state: HubState) -> Data:
    model, recipe, known = state.model(), state.recipe(), state.access.edges()
    point, adapter = state.checkpoints.latest(), state.adapters.latest()
    revoked = sum(edge.revoked_at is not None for edge in known)
    return {
        "epoch": state.epoch(),
        "model": asdict(model) if model else None,
        "recipe": asdict(recipe) if recipe else None,
        "edges": len(known) - revoked,
        "revoked": revoked,
        "checkpoint": {**point.note, "written_at": point.written_at} if point else None,
        "adapter": {
            "version": adapter.version,
            "round": adapter.round,
            "published_at": adapter.published_at,
            "sha256": adapter.sha256,
        }
        if adapter
        else None,
    }


def _headline(data: Data) -> str:
    live = data["live"]
    if data["silent_s"] is not None:
        return f"running (process {live['process']}), but silent for {data['silent_s']:.0f} s: it hangs or is stopped"
    if data["running"]:
        return f"running (process {live['process']})" if live else "running"
    return f"stopped; last heard of {_clock_time(live['written_at'])}" if live else "stopped"


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain_text(value: Any) -> str:
    """A value of the live status on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_plain_text(item) for item in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _clock_time(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "never"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
