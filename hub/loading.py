"""Bring a model into the engine, and say how far it is."""

from __future__ import annotations

import re

from blocks.source import ModelFiles
from blocks.surgery import LayerNames
from blocks.weights import Watched
from hub.engine import Engine, EngineSettings
from messaging.console import Journal


def load_engine(files: ModelFiles, layers: LayerNames, settings: EngineSettings, journal: Journal) -> Engine:
    """The engine with its layers filled from the model's files."""
    middle = re.compile(rf"(^|\.){re.escape(layers.attribute)}\.[1-9]\d*\.")
    sizes = [files.source.info(name).nbytes for name in files.source.names() if middle.search(name)]
    with journal.task("loading the model", sum(sizes)) as task:
        return Engine(files.config, Watched(files.source, task.advance), settings)
