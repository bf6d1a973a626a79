"""Coverage-guided fuzzing of what comes off the wire or from other people: `python -m tools.fuzz --help`."""
