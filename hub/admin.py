"""What `hub invite`, `edges`, `revoke`, `rotate-key`, `audit`, `status` and `export` do.

Each works on the state folder, whether a hub runs on it or not, and returns JSON-ready data; the `show_`
function beside it prints that data for people.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hub.monitor.snapshot import HubSnapshot, from_fields
from hub.monitor.view import render
from hub.store.access import TOKEN_TTL_S
from hub.store.state import HubState
from messaging.console import Journal, plain_lines
from messaging.console.figures import printable
from messaging.errors import InputError
from messaging.joining import JoinString

Data = dict[str, Any]

#: A running hub writes its status each second; after this long without, it hangs or is stopped.
_SILENT_S = 5.0

#: More than any hub's screen: a printed status need not fit the terminal's height.
_SCREEN_LINES = 10_000

#: A file or a pipe has no width: enough for every column, sigma and r of the noise among them.
_PIPE_COLUMNS = 120


def seconds(text: str) -> float:
    """A time as people write it: seconds, or a number with s, m, h or d behind it. InputError for anything else."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", text.strip())
    if match is None:
        raise InputError(f"{text!r} is no length of time: give seconds, or a number with m, h or d, as 10m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def invite(folder: Path, uses: int = 1, ttl_s: float = TOKEN_TTL_S, name: str | None = None) -> Data:
    """A join string for so many new edges within so many seconds; with `name`, for one edge of that name.

    InputError if no hub ever ran here.
    """
    with _beside(folder) as state:
        address = state.address()
        if address is None:
            raise InputError(f"no hub has run on {folder} yet: start one with `hub serve --state {folder}` first")
        running = state.running()
        if not running:
            # They will come after its next start.
            address = replace(address, key=state.next_key() or address.key)
        token = state.access.invite(uses, ttl_s, name)
        return {
            "join": JoinString(address, token).encode(),
            "uses": uses,
            "name": name,
            "expires_at": time.time() + ttl_s,
            "running": running,
        }


def show_invite(data: Data, console: Console) -> None:
    """The join string on a line of its own, to be copied whole, and what it is good for."""
    console.print(data["join"], soft_wrap=True, markup=False, highlight=False)
    whom = _many(data["uses"], "edge") + (f", which gets the name {data['name']}," if data["name"] else "")
    console.print(
        f"good for {whom} until {_clock_time(data['expires_at'])}; keep it secret", markup=False, soft_wrap=True
    )
    if not data["running"]:
        console.print("the hub is stopped: it must run at the same address when they join")


def edges(folder: Path) -> Data:
    """Everybody who was ever enrolled, with their open sessions if a hub runs, and the open invitations."""
    with _beside(folder) as state:
        live = (state.read_status() or {}) if state.running() else {}
        here = {row["name"]: row for row in live.get("edges", ())}
        known = [
            {**asdict(edge), "sessions": here.get(edge.name, {}).get("sessions", 0)} for edge in state.access.edges()
        ]
        return {"edges": known, "invitations": [asdict(open_) for open_ in state.access.invitations()]}


def show_edges(data: Data, console: Console) -> None:
    """A table of the allow-list, and a line for each invitation that is open."""
    if not data["edges"]:
        console.print("no edge is enrolled; `hub invite` makes a join string for one")
    else:
        table = Table("name", "key", "enrolled", "last seen", "state", box=None)
        for edge in data["edges"]:
            times = (_clock_time(edge["enrolled_at"]), _clock_time(edge["last_seen"]))
            table.add_row(escape(edge["name"]), escape(edge["key"][:8]), *times, _edge_state(edge))
        console.print(table)
    for open_ in data["invitations"]:
        whom = f"the name {open_['name']}" if open_["name"] else _many(open_["uses_left"], "edge")
        line = f"an invitation for {whom} is open until {_clock_time(open_['expires_at'])}"
        console.print(f"{line} (token {open_['token_sha256']})", markup=False, highlight=False, soft_wrap=True)


def _edge_state(edge: Data) -> str:
    if edge["revoked_at"]:
        return f"revoked {_clock_time(edge['revoked_at'])}"
    return f"here, {_many(edge['sessions'], 'session')}" if edge["sessions"] else "may connect"


def revoke(folder: Path, name: str) -> Data:
    """Shut an edge out for ever. A running hub notices within a second. InputError for a name that is none."""
    with _beside(folder) as state:
        return asdict(state.access.revoke(name))


def show_revoke(data: Data, console: Console) -> None:
    """One line."""
    console.print(f"{escape(data['name'])} is revoked: its key cannot connect or join again", highlight=False)


def rotate_key(folder: Path) -> Data:
    """Announce a new key of the hub; `untold` are the edges that were not here since it was first announced."""
    with _beside(folder) as state:
        key, since = state.rotate_keys()
        untold = [
            edge.name for edge in state.access.edges() if edge.revoked_at is None and (edge.last_seen or 0.0) <= since
        ]
        return {"key": key, "since": since, "running": state.running(), "untold": untold}


def show_rotate_key(data: Data, console: Console) -> None:
    """What is to be done, and whom it would lock out."""
    lines = [f"the hub has the key {data['key']} from its next start on"]
    if not data["running"]:
        lines.append("it is stopped, so it can tell nobody: edges will need a new join string (`hub invite`)")
    elif data["untold"]:
        lines.append(f"not here since {_clock_time(data['since'])}: {', '.join(data['untold'])}")
        lines.append("an edge that has not been here before the restart needs a new join string (`hub invite`)")
        lines.append("see again who is missing: hub rotate-key (it makes no other key until the hub is restarted)")
    else:
        lines.append("every edge has been here since: restart the hub when it suits you")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def audit(folder: Path, last: int) -> Data:
    """The last lines of the audit log, oldest first."""
    with _beside(folder) as state:
        return {"events": state.audit.last(last)}


def show_audit(data: Data, console: Console) -> None:
    """A line for each event."""
    for event in data["events"]:
        texts = [str(event.pop(fact, "")) for fact in ("time", "event", "name", "reason")]
        rest = [f"{fact} {value}" for fact, value in event.items()]
        line = printable("  ".join(text for text in (*texts, *rest) if text))
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not data["events"]:
        console.print("nothing has happened yet")


def status(folder: Path) -> Data:
    """Whether a hub runs, what it said of itself last (`live`: a `HubSnapshot`), and what is stored."""
    with HubState.open(folder, exclusive=False) as state:
        running, live = state.running(), state.read_status() or {}
        written_at, process = live.pop("written_at", None), live.pop("process", None)
        age = time.time() - written_at if running and written_at is not None else 0.0
        full = {
            "running": running,
            "silent_s": age if age > _SILENT_S else None,
            "process": process,
            "written_at": written_at,
            "live": live or None,
            "stored": _stored(state),
        }
        finite: Data = _finite(full)
        return finite


def show_status(data: Data, console: Console) -> None:
    """What is stored, and below it the screen of the hub if one runs."""
    stored = data["stored"]
    lines = [_headline(data)]
    if stored["model"]:
        lines.append(f"model       {stored['model']['name']}")
    lines.append(f"edges       {stored['edges']} enrolled, {stored['revoked']} revoked")
    if point := stored["checkpoint"]:
        when = _clock_time(point["written_at"])
        lines.append(f"checkpoint  step {point['hub_step']}, {_many(point['round'], 'round')} done, written {when}")
    if adapter := stored["adapter"]:
        lines.append(f"adapter     version {adapter['version']}, published {_clock_time(adapter['published_at'])}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if data["running"] and data["live"] and (snapshot := _snapshot(data["live"])):
        width = console.width if console.is_terminal else max(console.width, _PIPE_COLUMNS)
        console.print(render(snapshot, width, _SCREEN_LINES), soft_wrap=True)


def export(folder: Path, out: Path) -> Data:
    """Write the last published adapter as a PEFT folder. InputError where there is none."""
    # torch and peft take seconds to import, and the other commands do without.
    from hub.store.export import export_peft

    journal = Journal()
    with HubState.open(folder, exclusive=False) as state, plain_lines(journal, sys.stderr):
        adapter, model = state.adapters.latest(), state.model()
        if adapter is None or model is None:
            raise InputError(f"{folder} holds no published adapter yet: the first round is not over")
        with journal.task(f"exporting adapter version {adapter.version}", 2 * adapter.bytes) as task:
            tensors = adapter.tensors()
            task.advance(adapter.bytes)
            export_peft(tensors, adapter.recipe, model.name, out, model.fan_in_fan_out)
            task.advance(adapter.bytes)
        return {"out": str(out), "version": adapter.version, "round": adapter.round, "base_model": model.name}


def show_export(data: Data, console: Console) -> None:
    """One line."""
    text = f"adapter version {data['version']} of round {data['round']} is in {data['out']}, a PEFT folder"
    console.print(f"{text} for {data['base_model']}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _beside(folder: Path) -> Iterator[HubState]:
    """The state, beside a hub that may be running on it; a log that cannot be written is told on stderr."""
    with HubState.open(folder, exclusive=False) as state:
        state.audit.tell = lambda text: print(text, file=sys.stderr)
        yield state


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
    who = "" if data["process"] is None else f" (process {data['process']})"
    if data["silent_s"] is not None:
        return f"running{who}, but silent for {data['silent_s']:.0f} s: it hangs or is suspended"
    if data["running"]:
        return f"running{who}"
    return "stopped" if data["written_at"] is None else f"stopped; last heard of {_clock_time(data['written_at'])}"


def _snapshot(live: Data) -> HubSnapshot | None:
    """What the hub wrote; None when that hub is of another version and says other things."""
    try:
        return from_fields(live)
    except (TypeError, KeyError):
        return None


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _clock_time(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "never"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
