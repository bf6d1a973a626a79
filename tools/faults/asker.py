"""An edge that only asks: a process with the product's own client, which notes when it asked and was answered."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tools.imported"])


@dataclass(frozen=True)
class Plan:
    """What an asker does: every `every_s` seconds a tensor of so many bytes; 0 bytes: it only stays connected.

    `count` 0: without end. `fits` False: the tensor is none that the hub would compute with, so that only the link
    is measured.
    """

    name: str
    every_s: float = 0.0
    nbytes: int = 0
    count: int = 0
    fits: bool = True


@dataclass(frozen=True)
class Answer:
    """When something was asked and answered, by the machine's monotonic clock."""

    asked: float
    answered: float

    @property
    def took_s(self) -> float:
        """Seconds between."""
        return self.answered - self.asked


class Asker:
    """One such process. `join` as for `edge join`; `prepare` runs in it first, under the environment `env`."""

    def __init__(self, folder: Path, join: str, plan: Plan, env: dict[str, str], prepare: Callable[[], None]) -> None:
        self._log = folder / f"{plan.name}.jsonl"
        arguments = (str(folder / plan.name), join, plan, str(self._log), env, prepare)
        self._process = _forks.Process(target=_ask, args=arguments)
        self._process.start()

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()

    @property
    def said(self) -> list[tuple[float, str]]:
        """What its log says, with the time of each line."""
        return [(entry["at"], entry["line"]) for entry in self._entries() if "line" in entry]

    @property
    def answers(self) -> list[Answer]:
        """All answers so far."""
        return [Answer(entry["asked"], entry["at"]) for entry in self._entries() if "asked" in entry]

    def when(self, text: str, after: float = 0.0, timeout_s: float = 60.0) -> float:
        """Wait until its log says something; the time at which it did."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for at, line in self.said:
                if at > after and text in line:
                    return at
            self._must_run()
            time.sleep(0.05)
        raise TimeoutError(f"the asker did not say {text!r}: {self.said[-5:]}")

    def answer_after(self, moment: float, timeout_s: float = 60.0) -> Answer:
        """Wait for the first answer that came after a moment."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for answer in self.answers:
                if answer.answered > moment:
                    return answer
            self._must_run()
            time.sleep(0.05)
        raise TimeoutError(f"no answer: {self.said[-5:]}")

    def _must_run(self) -> None:
        if not self._process.is_alive():
            raise RuntimeError(f"the asker ended: {self.said[-5:]}")

    def _entries(self) -> list[dict[str, Any]]:
        if not self._log.exists():
            return []
        whole = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]


def _ask(state: str, join: str, plan: Plan, log: str, env: dict[str, str], prepare: Callable[[], None]) -> None:
    import os

    os.environ.update(env)
    prepare()
    import messaging.messages as m
    from blocks.partition import Partition
    from edge.connection import Connection
    from edge.state import EdgeState
    from messaging.console import Journal
    from messaging.errors import HubError

    with Path(log).open("w", buffering=1) as file:

        def note(**entry: object) -> None:
            file.write(json.dumps({"at": time.monotonic(), **entry}) + "\n")

        journal = Journal()
        journal.echo_to(lambda line: note(line=line))
        connection = Connection(EdgeState(Path(state)), journal, join, plan.name)
        asked = m.Describe(m.PROTOCOL_VERSION, m.PROTOCOL_VERSION, "asker")
        description = connection.client.ask(asked, m.Description)
        welcome = connection.hello(Partition(1, 1), False, description)
        connection.client.be_patient(float("inf"))
        note(line="connected")
        tensor = _tensor(plan)
        done = 0
        while tensor is None or not plan.count or done < plan.count:
            time.sleep(plan.every_s if tensor is not None else 1.0)
            if tensor is None:
                continue
            begun, done = time.monotonic(), done + 1
            try:
                connection.client.ask(m.Infer(0, 0, welcome.adapter_version, (), (), tensor), m.InferHidden)
            except HubError:
                if plan.fits:
                    raise
            note(asked=begun)
        time.sleep(3600)


def _tensor(plan: Plan) -> Any:
    """States of the pocket model's width; those that do not fit are of another."""
    if not plan.nbytes:
        return None
    import torch

    from blocks.codec import to_wire
    from hub.serve import POCKET

    hidden = int(json.loads((POCKET / "config.json").read_text())["hidden_size"])
    width = hidden if plan.fits else 2 * hidden
    return to_wire(torch.randn(1, plan.nbytes // (4 * width), width))
