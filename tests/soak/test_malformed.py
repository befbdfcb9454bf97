"""Thousands of annotation files and images that nobody should trust: read, or refused by the one kind of error."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from tests.soak.conftest import ROOT, Show

sys.path.insert(0, str(ROOT / "tests/data"))  # as pytest does for the tests there

from hostile import soak
from hostile_images import hostile_image, throw

NUM_FILES = 10_000
NUM_IMAGES = 10_000


def test_ten_thousand_annotation_and_results_files(show: Show):
    outcomes = soak(NUM_FILES)
    assert sum(outcomes.values()) >= NUM_FILES
    show(f"annotation and results files: {', '.join(f'{count} {name}' for name, count in outcomes.items())}")


def test_ten_thousand_images(test_data: Path, show: Show):
    """In processes that may die: any signal, hang, other exception or burst of memory is a failure."""
    sources = [path.read_bytes() for path in sorted((test_data / "images").iterdir()) if path.suffix != ""]
    report = throw(partial(hostile_image, sources=sources), range(1_000_000, 1_000_000 + NUM_IMAGES))
    assert report.failures == []
    assert report.outcomes.total() == NUM_IMAGES
    show(f"images: {', '.join(f'{count} {name}' for name, count in report.outcomes.items())}")
