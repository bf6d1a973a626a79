"""The fault bench: what breaks on purpose, and what FedSEA makes of it. See `python -m tools.faults --help`."""
