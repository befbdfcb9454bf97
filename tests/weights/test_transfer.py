"""Rows by class names, layers by shapes, and a table that says so."""

import torch
from torch import Tensor

from fpn_det.structures import Categories
from fpn_det.weights.transfer import Transfer, same_classes, transfer


def classes(*names: str) -> Categories:
    return Categories(tuple(range(1, len(names) + 1)), names)


def head(rows: int, box_rows: int, features: int = 3, prefix: str = "roi_head.") -> dict[str, Tensor]:
    return {
        f"{prefix}class_logits.weight": torch.randn(rows, features),
        f"{prefix}class_logits.bias": torch.randn(rows),
        f"{prefix}box_deltas.weight": torch.randn(box_rows, features),
        f"{prefix}box_deltas.bias": torch.randn(box_rows),
    }


def notes(result: Transfer) -> dict[str, tuple[int, str]]:
    return {row.part: (row.num_taken, row.note) for row in result.rows}


def assert_rows(result: Transfer, layer: str, values: Tensor, places: dict[int, int], own: Tensor) -> None:
    """Row i is row j of `values` for each i: j, and as in `own` elsewhere, to the bit."""
    got = result.state_dict[layer]
    assert got.shape == own.shape
    for i in range(len(own)):
        assert torch.equal(got[i], values[places[i]] if i in places else own[i]), (layer, i)


def test_rows_follow_the_names_of_classes():
    cats, ours = classes("cat", "dog", "cow"), classes("dog", "yak", "cat", "Cow")
    for prefix in ("roi_head.", "roi_head.stages.1."):
        source, own = head(4, 12, prefix=prefix), head(5, 16, prefix=prefix)
        before = {name: value.clone() for name, value in own.items()}
        result = transfer(source, own, source_categories=cats, categories=ours)
        for kind in ("weight", "bias"):
            name = f"{prefix}class_logits.{kind}"
            assert_rows(result, name, source[name], {0: 1, 2: 0, 4: 3}, own[name])
            name = f"{prefix}box_deltas.{kind}"
            places = {4 * i + k: 4 * j + k for i, j in ((0, 1), (2, 0)) for k in range(4)}
            assert_rows(result, name, source[name], places, own[name])
        assert all(torch.equal(own[name], value) for name, value in before.items())
        assert (result.kept, result.new, result.near) == (("dog", "cat"), ("yak", "Cow"), (("Cow", "cow"),))
        assert notes(result)[f"{prefix}class_logits"] == (2, "rows of 2 classes and background")
        assert "'Cow' is a new class, though 'cow' is known" in result.table()


def test_the_background_is_the_first_of_several_rows():
    cats, ours = classes("cat", "dog"), classes("dog")
    source, own = head(2 + 11, 8), head(1 + 1, 4)
    result = transfer(source, own, source_categories=cats, categories=ours)
    name = "roi_head.class_logits.weight"
    assert_rows(result, name, source[name], {0: 1, 1: 2}, own[name])
    assert notes(result)["roi_head.class_logits"][1].endswith("background (1 of 11 rows there, 1 here)")
    again = transfer(own, source, source_categories=ours, categories=cats)
    assert_rows(again, name, own[name], {1: 0, 2: 1}, source[name])


def test_boxes_of_all_classes_together_have_no_rows_of_classes():
    cats, ours = classes("cat", "dog"), classes("dog", "yak", "cat")
    source, own = head(3, 4), head(4, 4)
    result = transfer(source, own, source_categories=cats, categories=ours)
    assert torch.equal(result.state_dict["roi_head.box_deltas.weight"], source["roi_head.box_deltas.weight"])
    specific = head(4, 12)
    result = transfer(source, specific, source_categories=cats, categories=ours)
    assert torch.equal(result.state_dict["roi_head.box_deltas.weight"], specific["roi_head.box_deltas.weight"])
    assert notes(result)["roi_head.box_deltas"] == (0, "initialised ((4, 3) there, (12, 3) here)")


def test_a_layer_is_taken_whole_or_not_at_all():
    """A bias that fits is of no use without its weight; counts of batches may lack."""
    source = {
        "neck.lateral.0.weight": torch.randn(4, 8, 1, 1),
        "neck.lateral.0.bias": torch.randn(4),
        "neck.output.0.weight": torch.randn(4),
        "mask_head.conv.weight": torch.randn(1),
        **head(3, 8, features=7),
    }
    own = {
        "neck.lateral.0.weight": torch.randn(4, 6, 1, 1),
        "neck.lateral.0.bias": torch.randn(4),
        "neck.output.0.weight": torch.randn(4),
        "neck.output.0.num_batches_tracked": torch.tensor(0),
        "neck.fresh.bias": torch.randn(2),
        **head(3, 8, features=3),
    }
    cats = classes("cat", "dog")
    result = transfer(source, own, source_categories=cats, categories=cats)
    for name in ("neck.lateral.0.weight", "neck.lateral.0.bias", "neck.fresh.bias", "roi_head.class_logits.bias"):
        assert torch.equal(result.state_dict[name], own[name]), name
    assert torch.equal(result.state_dict["neck.output.0.weight"], source["neck.output.0.weight"])
    layers = ("neck.lateral.0", "neck.fresh", "roi_head.class_logits", "roi_head.box_deltas")
    assert result.initialised == layers
    lines = result.table().splitlines()
    assert lines[1].split(maxsplit=4)[:4] == ["neck", "2", "of", "5"]
    assert "initialised: neck.lateral.0: (4, 8, 1, 1) there, (4, 6, 1, 1) here; neck.fresh: not there" in lines[1]
    assert any(line.split() == ["mask_head", "not", "used:", "1", "tensors", "there"] for line in lines)


def test_names_that_several_classes_share_tell_nothing():
    twice = classes("cat", "dog", "cat")
    assert same_classes(twice, twice) == [0, 1, 2]
    assert same_classes(twice, classes("cat", "dog")) == [None, 1]
    assert same_classes(classes("cat", "dog"), twice) == [None, 1, None]
