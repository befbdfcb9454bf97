"""The report of what is wrong: grouped, counted, printable whatever the file holds."""

from __future__ import annotations

import json

from fpn_det.data.problems import Defect, Problem, as_record, format_problems, problem, shown


def test_the_report_groups_counts_and_shows_the_first() -> None:
    """What was left out first, then the frequent before the rare."""
    problems = [
        problem(Defect.BOX_PARTLY_OUTSIDE, 0, {"id": "left\nside"}, [-9, 3, 20, 10]),
        problem(Defect.IMAGE_MALFORMED, 1, "text", "text"),
        *(problem(Defect.BOX_EMPTY, i, {"id": 100 + i}, [5, 5, 0, 3]) for i in range(8)),
        *(problem(Defect.CATEGORY_EMPTY, None, {"id": i}, name) for i, name in ((3, "dog"), (4, "cat"))),
    ]
    assert format_problems(problems, limit=2).split("\n") == [
        "  8 annotations left out: bbox without area (width or height 0)",
        "      id 100: [5, 5, 0, 3]; id 101: [5, 5, 0, 3]; ...",
        "      Correct the bbox, which is [x, y, width, height] in pixels, or delete the annotation.",
        "  1 image left out: not a JSON object with an integer `id` of 64 bits",
        "      entry 1: 'text'",
        "      Correct the entry, or delete it and its annotations.",
        "  1 annotation clipped: bbox partly outside its image",
        r"      id 'left\nside': [-9, 3, 20, 10]",
        "      Correct the bbox, which is [x, y, width, height] in pixels, or delete the annotation.",
        "  2 categories kept: no box to learn from",
        "      id 3: 'dog'; id 4: 'cat'",
        "      Remove the category if it is not meant to occur.",
    ]


def test_values_are_one_printable_line_of_bounded_length() -> None:
    nested: list[object] = []
    for _ in range(900):
        nested = [nested]
    wide: list[object] = ["y" * 99] * 9
    for _ in range(6):
        wide = [wide] * 9
    values = [
        wide,
        "a\0b",
        "\ud800",
        "\x1b[31m",
        "\u202e",
        "x" * 10**6,
        [["y" * 999] * 99] * 99,
        {"k": {"\n": 1}},
        nested,
    ]
    for value in [*values, 10**4000, float("nan")]:
        text = shown(value)
        assert text.isprintable()
        assert len(text) <= 200
    assert shown("höhe 数") == "'höhe 数'"


def test_ids_are_plain_data() -> None:
    ids = [5, -(2**63), 2**63 - 1, None, 2**63, True, 1.5, float("nan"), "x", [1]]
    expected = [5, -(2**63), 2**63 - 1, None, "9223372036854775808", "True", "1.5", "nan", "'x'", "[1]"]
    found = [problem(Defect.BOX_EMPTY, 0, {"id": i}, None).id for i in ids]
    assert [(i, type(i)) for i in found] == [(i, type(i)) for i in expected]
    assert problem(Defect.IMAGE_MALFORMED, 0, [1], None).id is None


def test_a_record_says_all() -> None:
    record = as_record(Problem(Defect.BOX_THIN, 3, 7, "[1, 2, 1e-20, 3]"), "train.json")
    assert json.loads(json.dumps(record)) == {
        "file": "train.json",
        "what": "annotation",
        "id": 7,
        "position": 3,
        "value": "[1, 2, 1e-20, 3]",
        "defect": "BOX_THIN",
        "reason": "bbox too thin to have an area in float32",
        "outcome": "left out",
        "remedy": Defect.BOX_THIN.remedy,
    }


def test_every_defect_has_words_of_its_own() -> None:
    """Members of equal values would be one member."""
    assert len({(d.what, d.reason) for d in Defect}) == len(Defect.__members__)
    assert not any(d.remedy.endswith(".") for d in Defect)
