"""What several tests of the command line run on: tiny models on disk, and processes that share the work."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_models import save_models
from ranks import Ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as found:
        yield found
