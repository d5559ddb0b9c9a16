from pathlib import Path

import pytest
import small

from qwen2.pipeline.corpus import Layout


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    small.write_sources(folder)
    return folder


@pytest.fixture(scope="session")
def layout(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A run that is whole; nobody changes it."""
    return small.run(sources, tmp_path_factory.mktemp("run") / "out")
