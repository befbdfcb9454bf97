import pytest
import torch

from fpn_det.structures import InputError
from fpn_det.weights.rename import Row, Rule, format_rows, rename

TENSORS = {"a.0.weight": torch.arange(3.0), "a.1.weight": torch.ones(2), "fc.weight": torch.zeros(1)}
RULES = [
    Rule(r"a\.0\.weight", "first.weight", "reversed", lambda x: x.flip(0)),
    Rule(r"a\.([1-9])\.(weight|bias)", r"rest.\1.\2"),
    Rule(r"fc\..+", None, "the classifier"),
]


def test_each_tensor_is_taken_transformed_or_left_out() -> None:
    state_dict, rows = rename(TENSORS, RULES, source="x.pth")
    assert list(state_dict) == ["first.weight", "rest.1.weight"]
    assert state_dict["first.weight"].tolist() == [2, 1, 0]
    assert state_dict["rest.1.weight"] is TENSORS["a.1.weight"]
    assert rows == [
        Row("a.0.weight", "first.weight", "permuted", "reversed"),
        Row("a.1.weight", "rest.1.weight", "taken"),
        Row("fc.weight", "-", "left out", "the classifier"),
    ]


def test_the_action_of_a_transform_that_computes() -> None:
    rules = [Rule("v", "v", "1e-5 subtracted", lambda x: x - 1e-5, action="changed")]
    _, rows = rename({"v": torch.ones(1)}, rules, source="x.pth")
    assert rows == [Row("v", "v", "changed", "1e-5 subtracted")]


def test_all_unknown_tensors_are_named() -> None:
    unknown = {"mask.weight": torch.zeros(2, 3), "a.1.weights": torch.zeros(4)}
    with pytest.raises(InputError, match=r"^x\.pth: 2 of 5 .*mask\.weight \(2, 3\), a\.1\.weights \(4,\)"):
        rename(TENSORS | unknown, RULES, source="x.pth")


def test_a_pattern_matches_the_whole_name() -> None:
    with pytest.raises(InputError, match=r"backbone\.a\.1\.weight"):
        rename({"backbone.a.1.weight": torch.zeros(1)}, RULES, source="x.pth")


def test_two_tensors_for_one_place() -> None:
    rules = [Rule(r"(old|new)\.weight", "conv.weight")]
    with pytest.raises(InputError, match=r"x\.pth: old\.weight and new\.weight are both the model's conv\.weight"):
        rename({"old.weight": torch.zeros(1), "new.weight": torch.zeros(1)}, rules, source="x.pth")


def test_two_rules_for_one_tensor_are_a_defect_of_the_rules() -> None:
    with pytest.raises(AssertionError, match=r"a\.1\.weight"):
        rename(TENSORS, [*RULES, Rule(r"a\.1\..*", "x")], source="x.pth")


def test_table_has_aligned_columns_and_a_line_per_tensor() -> None:
    rows = [Row("a", "longer.name", "taken"), Row("fc.weight", "-", "left out", "the classifier")]
    assert format_rows(rows).splitlines() == [
        "tensor of the file  tensor here  action",
        "a                   longer.name  taken",
        "fc.weight           -            left out (the classifier)",
    ]


def test_names_cannot_break_the_table() -> None:
    rows = [Row("a\nb\x1b[2J", "c\u202e", "changed", "d\r"), Row("e", "-", "left out")]
    assert format_rows(rows).split("\n")[1:] == [
        r"a\nb\x1b[2J         c\u202e      changed (d\r)",
        r"e                   -            left out",
    ]
