"""Measurements: how fast, how close to what the FLOPs allow, and at what quality. `python -m benchmarks.NAME --help`."""
