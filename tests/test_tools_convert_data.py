"""tools/convert_data.py: each command from the command line, what it prints, and what it refuses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from fpn_det.config import load_config
from fpn_det.data.coco import load_coco

COMMANDS = ("from-voc", "from-yolo", "from-csv", "from-labelme", "to-yolo", "split", "merge", "subset")


@pytest.fixture
def run(tool, tmp_path: Path, monkeypatch) -> Callable[..., str]:
    """Run the tool in `tmp_path`; what it printed. With `code=2`, its one line of error."""
    monkeypatch.chdir(tmp_path)

    def convert(*arguments: object, code: int = 0) -> str:
        outcome = tool("convert_data", *arguments)
        assert outcome.code == code, outcome
        if code == 0:
            assert outcome.err == ""
            return outcome.out
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        return outcome.err

    return convert


def read(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def config_of(out: str, folder: Path) -> Any:
    """The config that has the printed lines."""
    (folder / "mine.yaml").write_text(out[out.index("\ndata:") :])
    return load_config(folder / "mine.yaml", [])


def test_from_voc(run, test_data: Path, tmp_path: Path) -> None:
    bccd = test_data / "bccd"
    sets = [bccd / f"splits/{name}.txt" for name in ("train", "val", "test")]
    out = run(
        *("from-voc", bccd / "voc", "--images", bccd / "images", "--sets", *sets),
        *("--classes", "RBC", "WBC", "Platelets", "--output", "out"),
    )
    for name in ("train", "val", "test"):
        found, expected = read(f"out/{name}.json"), read(bccd / f"annotations/{name}.json")
        assert {**found, "info": 0} == {**expected, "info": 0}
    for line in ("images 205 87 72", "boxes 2,805 1,138 945", "Platelets 209 83 69"):
        assert line in [" ".join(row.split()) for row in out.splitlines()]
    assert "2 annotations kept: a box without area" in out
    assert "BloodImage_00343.xml, object 4" in out
    assert "as training reads it, out/train.json: 205 images (0 without boxes), 2,804 boxes, 3 classes" in out
    config = config_of(out, tmp_path)
    assert str(config.data.train.annotations) == "out/train.json"
    assert config.data.val.images == bccd / "images"


def test_yolo_there_and_back(run, shapes: Path, tmp_path: Path) -> None:
    out = run(
        *("to-yolo", "--train", shapes / "annotations/train.json", shapes / "train", "--output", "yolo"),
        *("--val", shapes / "annotations/val.json", shapes / "val"),
    )
    assert "written: yolo/data.yaml" in out
    assert "crowd boxes" in out
    out = run("from-yolo", "yolo", "--output", "back", "--follow-links")
    config = config_of(out, tmp_path)
    assert config.data.follow_links
    for name in ("train", "val"):
        split = getattr(config.data, name)
        found = load_coco(split.annotations, split.images, follow_links=True)
        expected = load_coco(shapes / f"annotations/{name}.json", shapes / name)
        assert found.names() == expected.names()
        assert found.labels.tolist() == expected.labels.tolist()
        assert (found.boxes - expected.boxes).abs().max() < 1e-3
    assert "exists and is not an empty folder" in run(
        *("to-yolo", "--train", shapes / "annotations/train.json", shapes / "train", "--output", "yolo"), code=2
    )
    out = run("from-yolo", "yolo", "--output", "links")
    assert "24 images left out: a link out of the image folder" in out


def test_split_and_merge_are_inverse(run, shapes: Path) -> None:
    whole = shapes / "annotations/train.json"
    out = run(
        *("split", whole, "--fractions", "train=0.75", "val=0.25", "--seed", "3", "--output", "parts"),
        *("--images", shapes / "train"),
    )
    assert "images 18 ( 75.0%) 6 ( 25.0%)" in [" ".join(row.split()) for row in out.splitlines()]
    parts = [read(f"parts/{name}.json") for name in ("train", "val")]
    for key in ("images", "annotations"):
        together = sorted([*parts[0][key], *parts[1][key]], key=lambda entry: entry["id"])
        assert together == sorted(read(whole)[key], key=lambda entry: entry["id"])
    folder = shapes / "train"
    out = run("merge", "parts/train.json", "parts/val.json", "--images", folder, folder, "--output", "both.json")
    merged, expected = load_coco(Path("both.json"), folder), load_coco(whole, folder)
    assert sorted(merged.names()) == sorted(expected.names())
    assert len(merged.boxes) == len(expected.boxes)
    assert out.splitlines()[-1] == f"# both: {{images: {folder}, annotations: both.json}}"
    assert "are in several of the files" in run(
        *("merge", whole, "parts/val.json", "--images", folder, folder, "--output", "other.json"), code=2
    )
    out = run(
        *("merge", whole, "parts/val.json", "--images", folder, folder, "--output", "other.json"),
        *("--duplicates", "first"),
    )
    assert "6 images left out: an image that an earlier one" in out
    assert load_coco(Path("other.json"), folder).names() == expected.names()


def test_merge_keeps_folders_apart(run, shapes: Path) -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        Image.new("RGB", (9, 9)).save(f"{name}/1.png")
        content = {
            "images": [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}],
            "annotations": [],
            "categories": [{"id": 1, "name": name}],
        }
        Path(f"{name}.json").write_text(json.dumps(content))
    out = run("merge", "a.json", "b.json", "--images", "a", "b", "--output", "new/train.json")
    assert "1 image kept: a copy, byte for byte" in out
    assert yaml.safe_load(out[out.index("data:") :]) == {
        "data": {"train": {"images": ".", "annotations": "new/train.json"}}
    }
    assert load_coco(Path("new/train.json"), Path(".")).names() == ["a/1.png", "b/1.png"]


def test_subset(run, shapes: Path) -> None:
    whole = shapes / "annotations/train.json"
    out = run(
        *("subset", whole, "--drop", "cross", "--rename", "circle=round=ish", "ring=round=ish"),
        *("--empty-images", "drop", "--output", "some.json"),
    )
    found = read("some.json")
    assert [c["name"] for c in found["categories"]] == ["round=ish", "square", "triangle"]
    assert {i["id"] for i in found["images"]} == {a["image_id"] for a in found["annotations"]}
    assert "left out: " in out
    run("subset", whole, "--output", "folder/name")
    assert read("folder/name") == read(whole)
    assert "did you mean 'circle'" in run("subset", whole, "--keep", "circles", "--output", "x.json", code=2)
    assert "expected OLD=NEW" in run("subset", whole, "--rename", "circle", "--output", "x.json", code=2)


def test_nothing_is_written_unless_entries_may_be_left_out(run) -> None:
    Image.new("RGB", (9, 9)).save("a.png")
    Path("train.csv").write_text(
        "path,x1,y1,x2,y2,class\na.png,1,1,5,5,cat\na.png,nan,1,5,5,cat\ngone.png,1,1,5,5,cat\n"
    )
    arguments = ("from-csv", "train.csv", "--images", ".", "--output", "out")
    assert "2 entries cannot be used, as said above; nothing was written" in run(*arguments, code=2)
    assert not Path("out").exists()
    assert "2 entries" in run(*arguments, "--examples", "0", code=2)
    out = run(*arguments, "--on-error", "drop")
    assert "train.csv:3: class 'cat'" in out
    assert "train.csv:4: 'gone.png'" in out
    assert len(read("out/train.json")["annotations"]) == 1
    assert "out/train.json: exists" in run(*arguments, "--on-error", "drop", code=2)
    run(*arguments, "--on-error", "drop", "--overwrite")


def test_from_labelme(run) -> None:
    Path("val").mkdir()
    Image.new("RGB", (9, 9)).save("val/a.png")
    Image.new("RGB", (9, 9)).save("val/b.png")
    evil = "cat\x1b[2J\nstep 9: AP 99"
    shape = {"label": evil, "points": [[5, 5], [1, 1]], "shape_type": "rectangle"}
    Path("val/a.json").write_text(json.dumps({"shapes": [shape], "imagePath": "a.png"}))
    out = run("from-labelme", "val", "--output", "out")
    assert all(line.isprintable() for line in out.splitlines())
    assert "not in it: 1 images that no labels are about" in out
    assert read("out/val.json")["categories"] == [{"id": 1, "name": evil}]
    assert read("out/val.json")["annotations"][0]["bbox"] == [1, 1, 4, 4]


def test_what_is_in_one_file_can_be_divided_by_the_printed_command(run) -> None:
    Path("a b").mkdir()
    for name in "abcdefgh":
        Image.new("RGB", (9, 9)).save(f"a b/{name}.png")
    Path("all.csv").write_text("".join(f"{name}.png,1,1,5,5,cat\n" for name in "abcdefgh"))
    out = run("from-csv", "all.csv", "--images", "a b", "--output", "out")
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["python", "tools/convert_data.py"]
    run(*command[2:])
    assert [len(read(f"out/{split}.json")["images"]) for split in ("train", "val")] == [6, 2]
    Path("all.csv").rename("train.csv")
    assert "to divide it" not in run("from-csv", "train.csv", "--images", "a b", "--output", "two")


def test_an_empty_result_is_refused(run) -> None:
    Path("val").mkdir()
    Image.new("RGB", (9, 9)).save("val/a.png")
    Path("val/a.json").write_text(json.dumps({"shapes": [], "imagePath": "a.png"}))
    assert "no class to write for 'val'" in run("from-labelme", "val", "--output", "out", code=2)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("from-voc", "nowhere", "--output", "o"), "nowhere: no such folder"),
        (("from-yolo", "nowhere", "--output", "o"), "nowhere: no such file"),
        (("from-csv", "nowhere.csv", "--images", ".", "--output", "o"), "nowhere.csv: cannot be read"),
        (("from-labelme", "nowhere", "--output", "o"), "nowhere: no such folder"),
        (("to-yolo", "--output", "o"), "--train, --val, --test"),
        (("split", "nowhere.json", "--fractions", "a=0.5", "b=0.5", "--output", "o"), "nowhere.json: cannot be read"),
        (("split", "nowhere.json", "--fractions", "a=0.5", "a=0.5", "--output", "o"), "a name is there twice: a a"),
        (("merge", "a.json", "b.json", "--images", "a", "--output", "o.json"), "1 folders for 2 files"),
    ],
)
def test_what_is_not_there(run, arguments: tuple[str, ...], message: str) -> None:
    assert message in run(*arguments, code=2)
    assert not Path("o").exists()


def test_what_cannot_be_written(run, shapes: Path) -> None:
    Path("file").touch()
    whole = shapes / "annotations/train.json"
    fractions = ("--fractions", "train=0.5", "val=0.5")
    assert "file: cannot be written" in run("split", whole, *fractions, "--output", "file", code=2)
    assert "file: exists" in run("subset", whole, "--output", "file", code=2)
    arguments = ("to-yolo", "--train", whole, shapes / "train", "--output", "file")
    assert "file: exists and is not an empty folder" in run(*arguments, code=2)


@pytest.mark.parametrize("fraction", ["train", "train=", "train=1", "train=nan", "../x=0.5", "=0.5"])
def test_fractions_that_are_none(tool, fraction: str) -> None:
    outcome = tool("convert_data", "split", "a.json", "--fractions", fraction, "--output", "o")
    assert outcome.code == 2
    assert "expected NAME=SHARE with a share between 0 and 1" in outcome.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(tool, command: str) -> None:
    outcome = tool("convert_data", command, "--help")
    assert outcome.code == 0
    assert "--output" in outcome.out
    assert f"convert_data.py {command} " in tool("convert_data", "--help").out
