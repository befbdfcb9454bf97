"""The snippets of docs/python.md run, in their order, in a folder like the one that they speak of."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from detecting import save_untrained
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_snippets_run(tiny, shapes, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)
    save_untrained(Path("runs/x/final.pth"), tiny, "model.roi_head.score_thresh=0.01")
    Path("photos").mkdir()
    for name, source in zip(("first", "second", "third"), sorted((shapes / "val").glob("*.jpg")), strict=False):
        shutil.copy(source, f"photos/{name}.jpg")
    Path("photos/fourth.jpg").write_bytes(b"no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)).save("aerial.png")

    assert len(SNIPPETS) == PAGE.count("```") // 2 == 9
    names: dict = {}
    for i, snippet in enumerate(SNIPPETS):
        if "predictions = " in snippet:  # which one bad file ends
            Path("photos/fourth.jpg").rename("fourth.jpg")
        exec(compile(snippet, f"snippet {i + 1} of docs/python.md", "exec"), names)
        if "predictions = " in snippet:
            Path("fourth.jpg").rename("photos/fourth.jpg")
            names["paths"] = sorted(Path("photos").glob("*.jpg"))

    detector = names["detector"]
    everything = names["everything"]
    assert len(everything) > 5
    assert len(names["predictions"]) == 3
    assert "fourth.jpg: cannot decode the image" in capsys.readouterr().out
    assert Image.open("found.png").width >= 320
    assert names["found"].size == (300, 400)
    assert len(names["detections"]) == len(names["records"]) == len(names["found"])
    same, first = names["same"], detector.predict("photos/first.jpg")
    assert same.labels.tolist() == first.labels.tolist()


def test_the_table_has_every_attribute() -> None:
    from fpn_det import Prediction

    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    own = {name for name in [*Prediction.__dataclass_fields__, "class_names", "category_ids"] if name != "categories"}
    assert named == own
