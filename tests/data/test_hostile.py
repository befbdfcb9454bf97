"""Malformed files end in one clear message or in data that keep their promises; never in anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile import RESULTS, VALID, evaluate, evaluations, files, image_folder, read_annotations
from hypothesis import HealthCheck, given, settings

often = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("hostile"))


def test_the_files_that_are_changed_are_valid(folder: Path) -> None:
    """Else nothing below would say anything."""
    truth, results = json.dumps(VALID).encode(), json.dumps(RESULTS).encode()
    assert read_annotations(truth, folder) == "read"
    assert evaluate(truth, results, folder.parent) == "scored"


@often
@given(files(VALID))
def test_malformed_annotations(folder: Path, content: bytes) -> None:
    read_annotations(content, folder)


@often
@given(evaluations())
def test_malformed_ground_truth_and_results(folder: Path, pair: tuple[bytes, bytes]) -> None:
    evaluate(*pair, folder.parent)


def test_names_that_are_no_unicode_are_scored(folder: Path) -> None:
    """hotcoco would not take the name."""
    truth = VALID | {"categories": [{"id": 1, "name": "\ud800"}, {"id": 2, "name": "dog"}]}
    assert evaluate(json.dumps(truth).encode(), json.dumps(RESULTS).encode(), folder.parent) == "scored"
