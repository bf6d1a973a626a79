"""The benchmarks: `python -m tools.bench [--json FILE] [--rows GROUP,...] [--quick]`."""
