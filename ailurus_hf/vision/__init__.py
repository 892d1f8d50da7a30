"""Token reduction in transformers' vision models."""
