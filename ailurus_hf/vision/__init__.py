"""Token reduction in transformers' vision models."""

from ..versions import check_versions

check_versions("torch", "transformers", "accelerate")
