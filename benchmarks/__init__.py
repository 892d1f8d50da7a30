"""Measurements: how fast, how close to what the FLOPs allow, and at what quality (README.md has a map)."""
