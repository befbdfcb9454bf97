"""tools/predict.py on folders, patterns, videos and cameras; test_tools.py has more on images."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detecting import CATEGORIES, save_untrained
from PIL import Image
from pycocotools.coco import COCO

from fpn_det import Detector
from fpn_det.data import transforms
from fpn_det.data.sources import find_sources
from fpn_det.data.video import open_video
from fpn_det.detector import Prediction
from fpn_det.structures import InputError


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("predict") / "random.pth", tiny)


@pytest.fixture(scope="module")
def photos(shapes) -> list[Path]:
    return sorted((shapes / "val").glob("*.jpg"))


@pytest.fixture
def predict(tool, checkpoint, tmp_path):
    """Run the tool; returns its outcome and the records it wrote to tmp_path/out."""

    def run(*inputs: object, options: Sequence[object] = ()):
        outcome = tool(
            "predict", "--checkpoint", checkpoint, *options, "--output", tmp_path / "out", "--input", *inputs
        )
        path = tmp_path / "out/predictions.json"
        return outcome, json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.fixture
def frames(photos) -> list[np.ndarray]:
    return [np.asarray(Image.open(p).convert("RGB").resize((96, 64))) for p in photos] * 3


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float = 12.0, codec: str = "mp4v") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame[:, :, ::-1])
    writer.release()
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    fps, frames = capture.get(cv2.CAP_PROP_FPS), []
    while (read := capture.read())[0]:
        frames.append(read[1][:, :, ::-1])
    return frames, fps


# What is found


def test_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.jpg", "a/deep/2.PNG", "b/1.jpg", "b/notes.txt", "b/[x].png", "clip.mp4", "5"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()

    def names(*inputs: str, recursive: bool = False) -> list[str]:
        return [source.name for source in find_sources(inputs, recursive=recursive)]

    assert names("a") == ["1.jpg"]
    assert names("a", recursive=True) == ["1.jpg", "deep/2.PNG"]
    assert names("a", "b") == ["a/1.jpg", "b/1.jpg", "b/[x].png"]  # two have one name
    assert names("a", "a/1.jpg") == ["1.jpg"]  # each once
    assert names("*/*.jpg") == ["a/1.jpg", "b/1.jpg"]
    assert names("a/**/*") == ["1.jpg", "deep/2.PNG"]
    assert names("b/[x].png") == ["[x].png"]  # a file before a pattern
    assert names("5", "0") == ["5", "camera0"]
    assert [(s.is_image, s.is_camera) for s in find_sources(["clip.mp4", "0", "a"])] == [
        (False, False),
        (False, True),
        (True, False),
    ]
    for given, words in (
        ("https://example.org/a.jpg", "download the file"),
        ("rtsp://camera/1", "addresses are not read"),
        ("nothing", "no such image or folder"),
        ("*.jpg", "no image or video matches"),
        ("b/*.txt", "no image or video matches"),
    ):
        with pytest.raises(InputError, match=words):
            find_sources([given])


# Images


def test_several_inputs_of_one_name(predict, photos, tmp_path) -> None:
    for folder in ("a/deep", "b/deep"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(photos[0], tmp_path / folder / "1.jpg")
    outcome, records = predict(
        tmp_path / "a", tmp_path / "b", "model.roi_head.score_thresh=0.01", options=["--recursive"]
    )
    assert (outcome.code, outcome.err) == (0, "")
    pictures = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")}
    assert pictures == {"a/deep/1.jpg.png", "b/deep/1.jpg.png"}
    assert {(r["image_id"], r["file_name"]) for r in records} == {(1, "a/deep/1.jpg"), (2, "b/deep/1.jpg")}
    assert "2 images" in outcome.out
    assert "images/s" in outcome.out


def test_results_are_coco_and_those_of_the_detector(predict, checkpoint, photos, shapes) -> None:
    detector = Detector.load(checkpoint)
    two = sorted({name for p in detector.predict(photos, score_thresh=0) for name in p.class_names})[:2]
    outcome, records = predict(shapes / "val", options=["--classes", *two, "--save", "json"])
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted({r["category_name"] for r in records}) == two
    assert len(two) == 2
    assert all(CATEGORIES.names[CATEGORIES.ids.index(r["category_id"])] == r["category_name"] for r in records)
    expected = detector.predict(photos, score_thresh=0, classes=two)
    assert [r["score"] for r in records] == [s for p in expected for s in p.scores.tolist()]

    truth = COCO(str(shapes / "annotations/val.json"))
    ids = {image["file_name"]: image["id"] for image in truth.dataset["images"]}
    loaded = truth.loadRes([r | {"image_id": ids[r["file_name"]]} for r in records])
    assert len(loaded.anns) == len(records) > 0


def test_options(predict, photos, tmp_path) -> None:
    outcome, _ = predict(*photos[:3], options=["--save", "pictures", "--picture-format", "jpg", "--tile-size", "40"])
    assert outcome.code == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{p.name}.jpg" for p in photos[:3]}
    assert Image.open(tmp_path / f"out/{photos[0].name}.jpg").format == "JPEG"
    outcome, _ = predict(photos[0], options=["--classes", "circel"])
    assert (outcome.code, outcome.err) == (2, "error: no class 'circel'; did you mean circle?\n")


def test_results_do_not_replace_inputs(predict, photos, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(photos[0], tmp_path / "out/1.jpg")
    outcome, _ = predict(tmp_path / "out")
    assert outcome.code == 0
    before = (tmp_path / "out/1.jpg.png").read_bytes()
    outcome, _ = predict(tmp_path / "out/../out")
    assert outcome.code == 2
    assert "1.jpg.png: an input, which the result of" in outcome.err
    assert (tmp_path / "out/1.jpg.png").read_bytes() == before


def test_ctrl_c_keeps_what_was_done(predict, photos, tmp_path, monkeypatch) -> None:
    for i in range(40):
        shutil.copy(photos[0], tmp_path / f"{i:02d}.jpg")
    num_read = 0

    def interrupted_read(path: Path):
        nonlocal num_read
        num_read += 1
        if num_read == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return transforms.load_image(path)

    monkeypatch.setattr("fpn_det.detector.load_image", interrupted_read)
    outcome, records = predict(tmp_path, options=["--batch-size", "1"])
    assert (outcome.code, outcome.err) == (130, "interrupted: what was done until then is written\n")
    done = sorted({r["file_name"] for r in records})
    assert 0 < len(done) < 40
    assert done == [f"{i:02d}.jpg" for i in range(len(done))]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_second_ctrl_c_keeps_what_was_done_too(predict, photos, tmp_path, monkeypatch) -> None:
    for i in range(40):
        shutil.copy(photos[0], tmp_path / f"{i:02d}.jpg")
    to_coco, num_done = Prediction.to_coco, 0

    def interrupted_twice(prediction: Prediction, image_id: int):
        nonlocal num_done
        num_done += 1
        if num_done == 20:
            noting = signal.getsignal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is noting:  # two at once would be one
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        return to_coco(prediction, image_id)

    monkeypatch.setattr(Prediction, "to_coco", interrupted_twice)
    outcome, records = predict(tmp_path, options=["--batch-size", "1"])
    assert (outcome.code, outcome.err) == (130, "interrupted\n")
    assert sorted({r["file_name"] for r in records}) == [f"{i:02d}.jpg" for i in range(19)]
    assert not list((tmp_path / "out").glob(".*"))


def test_out_of_memory_names_the_option_of_this_tool(predict, photos, monkeypatch) -> None:
    def exhausted(*_: object):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("fpn_det.models.faster_rcnn.FasterRCNN.predict", exhausted)
    outcome, _ = predict(photos[0])
    assert outcome.code == 2
    assert "--batch-size" in outcome.err
    assert "eval.batch_size" not in outcome.err


# Videos and cameras


def test_a_video_comes_back_with_as_many_frames(predict, frames, checkpoint, tmp_path) -> None:
    source = write_video(tmp_path / "clip.avi", frames, codec="MJPG")
    outcome, records = predict(source, options=["--score-thresh", "0.3"])
    assert (outcome.code, outcome.err) == (0, "")
    assert "24 frames of 1 videos" in outcome.out
    written, fps = read_video(tmp_path / "out/clip.avi.webm")
    assert (len(written), written[0].shape, fps) == (24, (64, 96, 3), 12.0)
    assert not list((tmp_path / "out").glob(".*"))

    assert {(r["image_id"], r["frame"]) for r in records} == {(i + 1, i) for i in range(24)}
    read, _ = read_video(source)
    expected = Detector.load(checkpoint).predict([frame.copy() for frame in read], score_thresh=0)
    found = [r["score"] for r in records]
    assert found == pytest.approx([score for p in expected for score in p.scores.tolist()], abs=1e-5)
    [plain, drawn] = (
        [np.abs(w.astype(int) - f).mean() for w, f in zip(written, other, strict=True)]
        for other in (
            read,
            [
                np.asarray(p.filter(score_thresh=0.3).draw(f.copy(), enlarge=False))
                for p, f in zip(expected, read, strict=True)
            ],
        )
    )
    assert np.mean(drawn) < np.mean(plain) / 2  # the boxes are in it, and the colours are not swapped


def test_a_video_plays_in_a_browser(predict, frames, browser, tmp_path) -> None:
    predict(write_video(tmp_path / "clip.mp4", frames))
    page = browser.new_page()
    (tmp_path / "out/page.html").write_text('<video src="clip.mp4.webm" muted></video>')
    page.goto((tmp_path / "out/page.html").as_uri())
    page.wait_for_function("document.querySelector('video').readyState >= 2", timeout=20_000)
    video = "document.querySelector('video')"
    assert [page.evaluate(f"{video}.{key}") for key in ("videoWidth", "videoHeight")] == [96, 64]
    assert page.evaluate(f"{video}.duration") == pytest.approx(2.0, abs=0.2)
    page.close()


def test_videos_that_cannot_be_read(predict, frames, tmp_path) -> None:
    whole = write_video(tmp_path / "whole.mp4", frames)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:-600])  # its index is at the end
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 100)
    (tmp_path / "empty.webm").touch()
    for name in ("cut.mp4", "noise.mp4", "empty.webm"):
        outcome, records = predict(tmp_path / name)
        assert (outcome.code, outcome.out, records) == (2, "", None), outcome
        assert outcome.err.startswith(f"error: {tmp_path / name}: cannot be opened as a video")
        assert outcome.err.count("\n") == 1
    outcome, records = predict(tmp_path / "noise.mp4", whole)
    assert outcome.code == 1
    assert outcome.err.startswith(f"skipped: {tmp_path / 'noise.mp4'}: ")
    assert {r["file_name"] for r in records} == {"whole.mp4"}

    webm = write_video(tmp_path / "long.webm", frames * 2, codec="VP80").read_bytes()
    (tmp_path / "half.webm").write_bytes(webm[: len(webm) // 2])
    outcome, records = predict(tmp_path / "half.webm")
    assert outcome.code == 1
    assert "cut short: " in outcome.err
    num_read = len({r["frame"] for r in records})
    assert f"{num_read} of the 48 frames" in outcome.err
    assert 10 < num_read < 45


def test_a_video_leads_to_no_address(tmp_path) -> None:
    """A list of parts is a video to FFmpeg, and the parts may be anywhere."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lines = [
        "#EXTM3U",
        "#EXT-X-TARGETDURATION:1",
        "#EXTINF:1,",
        f"http://127.0.0.1:{server.server_port}/a.ts",
        "#EXT-X-ENDLIST",
    ]
    (tmp_path / "list.m3u8").write_text("\n".join(lines))
    with pytest.raises(InputError, match="cannot be opened as a video"), open_video(tmp_path / "list.m3u8"):
        pass
    server.shutdown()
    assert asked == []


class Camera:
    """What cv2.VideoCapture is for a camera; Ctrl-C comes at the tenth frame."""

    def __init__(self, frames: Sequence[np.ndarray], *, interrupts: bool) -> None:
        self.frames = frames
        self.interrupts = interrupts
        self.num_read = 0
        self.is_released = False

    def isOpened(self) -> bool:
        return bool(self.frames)

    def get(self, _: int) -> float:
        return 0.0  # as of cameras that do not know

    def read(self) -> tuple[bool, np.ndarray | None]:
        assert not self.is_released
        self.num_read += 1
        if self.interrupts and self.num_read == 10:
            os.kill(os.getpid(), signal.SIGINT)
        if not self.interrupts and self.num_read > 5:
            return False, None
        return True, self.frames[self.num_read % len(self.frames)]

    def release(self) -> None:
        self.is_released = True


@pytest.mark.parametrize("interrupts", [True, False])
def test_a_camera_runs_until_ctrl_c_or_its_loss(predict, frames, tmp_path, monkeypatch, interrupts) -> None:
    camera, real = Camera(frames, interrupts=interrupts), cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda source, *_: camera if source == 0 else real(source, *_))
    outcome, records = predict(0)
    assert (outcome.code, outcome.err) == (0, "")
    assert camera.is_released
    written, fps = read_video(tmp_path / "out/camera0.webm")
    num_seen = len({r["frame"] for r in records})
    assert fps == 25.0
    if interrupts:
        assert 9 <= num_seen == len(written) < 20
    else:
        assert num_seen == len(written) == 5


def test_a_missing_camera_is_one_line(predict, monkeypatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: Camera([], interrupts=False))
    outcome, _ = predict(3)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith("error: camera 3: cannot be opened as a video (is it there")
