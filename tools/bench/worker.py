"""The measuring process: reads [task, arguments] lines from stdin, answers each with one line of JSON."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Serve tasks until stdin ends. Whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from tools.bench import tasks

    for line in sys.stdin:
        task, arguments = json.loads(line)
        result = tasks.TASKS[task](**arguments)
        answers.write(json.dumps(result) + "\n")
        answers.flush()
    tasks.close_all()


if __name__ == "__main__":
    main()
