"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real images and annotations, named by the environment variable FPN_DET_TEST_DATA."""
    folder = os.environ.get("FPN_DET_TEST_DATA")
    if not folder:
        pytest.skip("FPN_DET_TEST_DATA is not set: it names the folder of real data for tests")
    return Path(folder)
