"""The soak: many edges train and generate while processes are killed and stopped and connections cut, at random.

What was trained has to be bit-equal to a run that nobody disturbed, every generation has to give the tokens of its
adapter version, the hub's memory has to stay flat, and nothing may be left behind. Every choice is seeded; when it
takes effect is not, which is the point.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hub import admin
from tools.faults.fault import Fault, Setting
from tools.faults.trial import Plan, Trial, differences, undisturbed
from tools.programs import Process
from tools.table import Row, Skipped, at_least, at_most, reported

_TEMPORARY = re.compile(r"\..*\.tmp$|\.tmp[0-9A-Za-z]{6}$")
_PROMPTS = ("Patient:", "The client", "Dear")
_SEED = 20
#: Seconds of a hub's life until its memory is looked at: caches and pools fill first.
_WARM_S = 120.0
#: The hub itself is left alive in the last part, so that its memory can be watched.
_HUB_DIES = 0.6
ROWS = (
    "soak: adapters, optimizers and step counts that differ from the undisturbed run",
    "soak: generations that differ from others of the same adapter version",
    "soak: growth of the hub's memory (MB a minute, 2 standard errors below)",
    "soak: temporary files left",
    "soak: sockets and threads of the hub more than its edges need",
)


# -- a process that generates ------------------------------------------------------------------------------


def generate_on_and_on() -> None:
    """In a forked process, in the place of `edge generate`: one generation after the other, each noted in a file."""
    import edge
    import edge.generate

    def generate(options: object, prompt: str, as_json: bool) -> None:
        model = edge.connect(getattr(options, "join"), state=getattr(options, "state"), noise=0.0)  # noqa: B009
        notes, stop = Path(os.environ["NOTES"]), Path(os.environ["STOP"])
        with model.hub as hub:
            number = 0
            while not stop.exists():
                text = _PROMPTS[number % len(_PROMPTS)]
                ids = hub.tokenizer(text, return_tensors="pt").input_ids
                out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
                with notes.open("a") as file:
                    file.write(json.dumps([hub.adapter_version, text, out[0].tolist()]) + "\n")
                number += 1

    edge.generate.generate = generate


# -- chaos -------------------------------------------------------------------------------------------------


@dataclass
class Chaos:
    """Everything that happens to a trial; `happened` counts it."""

    trial: Trial
    rng: random.Random
    edges: dict[str, Process]
    generators: list[Process]
    start_generator: Callable[[int], Process]
    hub_every_s: float
    pause: float
    happened: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[int, float, float]] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        """Disturb for so long."""
        begin = time.monotonic()
        end, hub_until, next_hub = begin + seconds, begin + seconds * _HUB_DIES, begin + self.hub_every_s
        while time.monotonic() < end:
            self._watch(self.rng.uniform(0.5, 3.0) * self.pause)
            if next_hub <= time.monotonic() < hub_until:
                self._once(self.rng.choice((self._kill_hub, self._stop_hub)))
                next_hub = time.monotonic() + self.hub_every_s * self.rng.uniform(0.7, 1.3)
            else:
                self._once(
                    self.rng.choice((self._kill_edge, self._freeze_edge, self._freeze_hub, self._cut, self._cut))
                )
            self._raise_the_dead()

    def _once(self, what: Callable[[], None]) -> None:
        what()
        name = what.__name__.strip("_").replace("_", " ")
        self.happened[name] = self.happened.get(name, 0) + 1

    def _kill_hub(self) -> None:
        assert self.trial.hub is not None
        self.trial.hub.process.kill()
        self.trial.start_hub()

    def _stop_hub(self) -> None:
        assert self.trial.hub is not None
        done = self.trial.hub.process.end(signal.SIGTERM)
        if done.code != 0:
            raise RuntimeError(f"{self.trial.hub.process} ended with {done.code}")
        self.trial.start_hub()

    def _kill_edge(self) -> None:
        self.rng.choice([*self.edges.values(), *self.generators]).kill()

    def _freeze_edge(self) -> None:
        self._freeze(self.rng.choice([*self.edges.values(), *self.generators]))

    def _freeze_hub(self) -> None:
        assert self.trial.hub is not None
        self._freeze(self.trial.hub.process)

    def _freeze(self, process: Process) -> None:
        process.signal(signal.SIGSTOP)
        self._watch(self.rng.uniform(0.2, 3.0) * self.pause)
        process.signal(signal.SIGCONT)

    def _cut(self) -> None:
        """Reset one connection to the hub, or all of one of its ports."""
        port = int(self.trial.ports[1].rpartition(":")[2]) + self.rng.randrange(2)
        found = subprocess.run(
            ["ss", "-Htn", "state", "established", "src", f"127.0.0.1:{port}"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.split()  # fmt: skip
        peers = [word for word in found if word.startswith("127.0.0.1:") and not word.endswith(f":{port}")]
        chosen = peers if self.rng.random() < 0.2 else peers[: self.rng.randrange(2)]
        for peer in chosen:
            subprocess.run(["ss", "-K", "src", f"127.0.0.1:{port}", "dst", peer], capture_output=True, timeout=10)

    def _raise_the_dead(self) -> None:
        """What a supervisor does."""
        for name, process in self.edges.items():
            if not process.running and process.wait().code != 0:
                self.edges[name] = self.trial.start_edge(name)
        for number, process in enumerate(self.generators):
            if not process.running:
                self.generators[number] = self.start_generator(number)

    def _watch(self, seconds: float) -> None:
        """Let time pass, looking at the hub's memory meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.25)
            hub = self.trial.hub
            if hub is not None and hub.process.running:
                self.memory.append((hub.process.pid, time.monotonic(), _resident_mb(hub.process.pid)))


# -- the experiment ----------------------------------------------------------------------------------------


def soak(setting: Setting) -> Sequence[Row | Skipped]:
    """Half an hour with twenty edges; quickly: ten seconds with three."""
    if os.geteuid() != 0:
        return [Skipped(row, "cutting connections (ss -K) needs root") for row in ROWS]
    if shutil.which("ss") is None:
        return [Skipped(row, "cutting connections needs ss") for row in ROWS]
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    plan = Plan(edges=setting.count(20, 3), rounds=0, round_steps=setting.count(10, 5), checkpoint_s=2.0)
    disturbed, calm = setting.folder / "disturbed", setting.folder / "undisturbed"
    with Trial(plan, disturbed) as trial:
        chaos, rounds, left = _disturbed(trial, setting, 10.0 if setting.quick else 60.0 * minutes)
        actual = trial.outcome()
    setting.console.print(f"  {_told(chaos.happened)}; {actual['hub steps']} joined steps", highlight=False)
    expected = undisturbed(Plan(plan.edges, rounds, plan.round_steps), calm, keys=disturbed)
    wrong = differences(expected, actual)
    if wrong:
        setting.console.print(f"  differs: {', '.join(wrong)}", highlight=False)
    growth, error = _slope(chaos.memory)
    notes = [json.loads(line) for path in disturbed.glob("notes-*") for line in path.read_text().splitlines()]
    return (
        at_most(ROWS[0], len(wrong), 0),
        at_most(ROWS[1], _contradictions(notes), 0),
        Skipped(ROWS[2], "takes minutes") if setting.quick else at_most(ROWS[2], growth - 2 * error, 0.5),
        at_most(ROWS[3], len(_strays(disturbed)), 0),
        at_most(ROWS[4], left, 0),
        reported("soak: joined steps", float(actual["hub steps"])),
        reported("soak: disturbances", sum(chaos.happened.values())),
        at_least("soak: generations that ended", len(notes), 1),
        reported("soak: growth of the hub's memory (MB a minute)", growth),
    )


def _disturbed(trial: Trial, setting: Setting, seconds: float) -> tuple[Chaos, int, int]:
    """Train under attack, then to the end of a round: the chaos, the rounds in all, sockets and threads left over."""
    plan, stop = trial.plan, trial.folder / "stop"
    many = setting.count(4, 1)
    invitation = admin.invite(trial.start_hub().state, uses=many)["join"]

    def start_generator(number: int) -> Process:
        state = trial.folder / f"generator-{number}"
        env = {"NOTES": str(trial.folder / f"notes-{number}"), "STOP": str(stop)}
        join = [] if (state / "hub.json").exists() else [invitation]
        return trial.programs.start(
            "edge", "generate", *join, "--state", state, "--name", state.name, prepare=generate_on_and_on, env=env
        )

    edges = {name: trial.start_edge(name) for name in plan.names}
    generators = [start_generator(number) for number in range(many)]
    assert trial.hub is not None
    trial.hub.until(lambda live: live["hub_step"] >= 1, "the first step", 600.0)
    hub_every_s, pause = (4.0, 0.3) if setting.quick else (90.0, 1.0)
    chaos = Chaos(trial, random.Random(_SEED), edges, generators, start_generator, hub_every_s, pause)
    chaos.run(seconds)
    left = _left_over(trial, len(edges), generators, stop)
    trial.hub.process.kill()
    with_end = trial.rounds_so_far() + 1
    trial.plan = Plan(plan.edges, with_end, plan.round_steps, checkpoint_s=plan.checkpoint_s)
    trial.start_hub()
    trial.end(list(edges.values()))
    return chaos, with_end, left


def _left_over(trial: Trial, edges: int, generators: Sequence[Process], stop: Path) -> int:
    """Sockets and threads of the hub beyond what its edges need, once those that generate have gone."""
    stop.touch()
    for process in generators:
        process.wait(120.0)
    assert trial.hub is not None
    hub = trial.hub
    hub.until(lambda live: live["cohort_joined"] == edges, "all edges", 120.0)
    time.sleep(3.0)
    folder = Path(f"/proc/{hub.process.pid}")
    sockets = sum(os.readlink(link).startswith("socket:") for link in folder.glob("fd/*") if link.is_symlink())
    threads = len(list(folder.glob("task/*")))
    # Two connections an edge; the listeners, and what libzmq and Python have for themselves.
    return max(sockets - 2 * edges - 12, 0) + max(threads - 16, 0)


def _resident_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def _slope(memory: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """MB a minute and its standard error: one line for all lives of the hub, each with an offset of its own."""
    xs, ys = [], []
    for pid in {pid for pid, _, _ in memory}:
        life = [(at, size) for other, at, size in memory if other == pid and size]
        life = [(at, size) for at, size in life if at - life[0][0] >= _WARM_S]
        if len(life) >= 8:
            mean_at, mean_size = (sum(column) / len(life) for column in zip(*life, strict=True))
            xs += [(at - mean_at) / 60 for at, _ in life]
            ys += [size - mean_size for _, size in life]
    spread = sum(x * x for x in xs)
    if not spread:
        return 0.0, 0.0
    slope = sum(x * y for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, (rest / max(len(xs) - 2, 1) / spread) ** 0.5


def _contradictions(notes: Sequence[tuple[int, str, list[int]]]) -> int:
    """Generations whose tokens are not those of the first of their adapter version and prompt."""
    first: dict[tuple[int, str], list[int]] = {}
    return sum(first.setdefault((version, prompt), tokens) != tokens for version, prompt, tokens in notes)


def _strays(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if _TEMPORARY.search(path.name)]


def _told(happened: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}x" for name, count in sorted(happened.items()))


FAULTS = (Fault("soak", "half an hour of kills, stops and cuts", ROWS, soak),)
