"""Detect in images, videos and cameras: annotated copies and a file of results.

    python tools/predict.py --checkpoint K --input IMAGE|FOLDER|PATTERN|VIDEO|CAMERA ... --output D
        [--config C] [--recursive] [--score-thresh 0.5] [--classes NAME ...] [--batch-size N]
        [--tile-size 1024 --tile-overlap 0.2] [--save pictures video json] [--picture-format png|jpg] [key=value ...]

Writes D/NAME.png per image and D/NAME.webm per video, with the boxes that score at least the threshold, and
D/predictions.json: all detections in COCO's results format with the category ids of the training data, plus
`category_name`, `file_name` and, of videos, `frame` (from 0). `image_id` counts the images and frames from 1. NAME is
the path below the folder of --input, or the file's name. `model.kind` rpn gives its proposals, all of category 1,
"object".

A pattern in quotes ('photos/**/*.jpg') is looked up here; a number is a camera, which Ctrl-C ends. Videos keep their
size and rate, but not their sound. --tile-size looks at larger images in overlapping tiles, too, and finds what is too
small in the resized whole. With `eval.tta={}` the detections in several sizes of each image and its mirror image are
merged. Only images of one size share a batch: results do not depend on what else is in the folder.

An image or video that cannot be read is passed over, unless it is the only one: standard error says why, and the exit
code is 1. Ctrl-C ends the work after the images at hand, a second one at once; what was done is written, and the exit
code is 130.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fpn_det.ahead import ahead
from fpn_det.cli import config_parser, say, user_errors
from fpn_det.data.sources import Source, find_sources
from fpn_det.data.video import UnreadableVideo, VideoWriter, open_video
from fpn_det.detector import NUM_THREADS, Detector, Prediction
from fpn_det.engine.train import StopSignal
from fpn_det.files import replacing, write_errors
from fpn_det.structures import InputError, printable

SAVED = ("pictures", "video", "json")

FORMATS = {"png": "PNG", "jpg": "JPEG"}

JPEG_QUALITY = 92

AHEAD = 8
"""So many pictures may wait for being drawn and written while the model goes on."""

Outcome = tuple[Tensor, Prediction] | InputError
Write = Callable[[dict[str, Any]], object]


def main() -> None:
    """Read the command line and predict."""
    parser = config_parser(__doc__, required=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights to use")
    parser.add_argument("--input", nargs="+", required=True, help="images, folders, patterns, videos, camera numbers")
    parser.add_argument("--recursive", action="store_true", help="look into the folders of a folder, too")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures, videos and predictions.json")
    parser.add_argument("--score-thresh", type=score, default=0.5, help="draw boxes that score at least this")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="detect these classes only")
    parser.add_argument("--batch-size", type=int, help="images per forward pass; eval.batch_size by default")
    parser.add_argument("--tile-size", type=int, help="look at larger images in tiles of this side in pixels, too")
    parser.add_argument("--tile-overlap", type=float, default=0.2, help="of neighbours, as a fraction of a tile")
    parser.add_argument("--save", nargs="+", choices=SAVED, default=SAVED, help="what to write; everything by default")
    parser.add_argument("--picture-format", choices=FORMATS, default="png", help="jpg is smaller and faster")
    args = parser.parse_intermixed_args()
    # What follows several values of an option is taken for another one.
    overrides = [text for text in args.input if "=" in text and not Path(text).exists()]
    with user_errors():
        sources = find_sources([text for text in args.input if text not in overrides], recursive=args.recursive)
        check_outputs(sources, args.output, args.picture_format)
        detector = Detector.load(args.checkpoint, config=args.config, overrides=[*args.overrides, *overrides])
        run = Run(
            detector=detector,
            folder=args.output,
            score_thresh=args.score_thresh,
            save=frozenset(args.save),
            picture_format=args.picture_format,
            is_only_one=len(sources) == 1,
            options={
                "score_thresh": 0.0,
                "classes": args.classes,
                "batch_size": args.batch_size,
                "tile_size": args.tile_size,
                "tile_overlap": args.tile_overlap,
            },
        )
        code = run.predict(sources)
    sys.exit(code)


@dataclass(kw_only=True)
class Run:
    """One call of this tool: how it treats each source, and what it has done.

    Attributes:
        detector: what detects.
        folder: for what is written.
        score_thresh: detections that score at least this are drawn.
        save: of `SAVED`.
        picture_format: of `FORMATS`.
        is_only_one: whether there is one source, which cannot be passed over.
        options: of `Detector.stream`.
        num_images, num_videos, num_frames, num_detections, num_drawn: so far.
        problems: what could not be read, and why.
    """

    detector: Detector
    folder: Path
    score_thresh: float
    save: frozenset[str]
    picture_format: str
    is_only_one: bool
    options: dict[str, Any]
    num_images: int = 0
    num_videos: int = 0
    num_frames: int = 0
    num_detections: int = 0
    num_drawn: int = 0
    problems: list[str] = field(default_factory=list)

    def predict(self, sources: Sequence[Source]) -> int:
        """Detect in all of them and report; returns the exit code."""
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        begun, image_ids = time.monotonic(), count(1)
        with StopSignal("stopping after what has begun") as stop, self._results() as write:
            for is_image, group in groupby(sources, key=lambda source: source.is_image):
                if is_image:
                    self._images(list(group), image_ids, write, stop)
                    continue
                for source in group:
                    if not stop.requested:
                        self._video(source, image_ids, write, stop)
        self._report(time.monotonic() - begun)
        for problem in self.problems:
            say(printable(problem), file=sys.stderr)
        if stop.requested and not all(source.is_camera for source in sources):
            say("interrupted: what was done until then is written", file=sys.stderr)
            return 130
        return 1 if self.problems else 0

    def _images(self, sources: Sequence[Source], image_ids: Iterator[int], write: Write, stop: StopSignal) -> None:
        """Detect in images, which are read before and drawn after it by threads."""
        paths = (str(source.path) for source in sources)
        outcomes = self.detector.stream(paths, **self.options, show_progress=True)
        saved = ahead(self._save_picture, zip(sources, outcomes, strict=True), depth=AHEAD, num_threads=NUM_THREADS)
        with closing(saved), progress("image", len(sources)) as bar:
            for source, outcome in saved:
                image_id = next(image_ids)
                bar.update()
                if isinstance(outcome, Prediction):
                    self.num_images += 1
                    self._write_records(write, outcome, image_id, {"file_name": source.name})
                elif self.is_only_one:
                    raise outcome
                else:
                    self.problems.append(f"skipped: {outcome}")
                if stop.requested:
                    return

    def _save_picture(self, item: tuple[Source, Outcome]) -> tuple[Source, Prediction | InputError]:
        source, outcome = item
        if isinstance(outcome, InputError):
            return source, outcome
        image, prediction = outcome
        if "pictures" in self.save:
            picture = prediction.filter(score_thresh=self.score_thresh).draw(image)
            with replacing(self._place(source)) as file:
                picture.save(file, format=FORMATS[self.picture_format], quality=JPEG_QUALITY)
        return source, prediction

    def _video(self, source: Source, image_ids: Iterator[int], write: Write, stop: StopSignal) -> None:
        """Detect in the frames of a video or camera, which are read, drawn and written by threads."""
        options = self.options | ({"batch_size": 1} if source.is_camera else {})  # frames are shown as they come
        num_frames = 0
        try:
            with (
                open_video(source.path) as video,
                closing(video.frames()) as frames,
                VideoWriter(self._place(source), fps=video.fps) as writer,
            ):
                until_stop = takewhile(lambda _: not stop.requested, frames)  # so what was read is written, too
                drawn = ahead(
                    self._draw_frame, self.detector.stream(until_stop, **options), depth=AHEAD, num_threads=NUM_THREADS
                )
                finished = ahead(partial(self._save_frame, writer), drawn, depth=AHEAD, num_threads=1)
                with closing(finished), progress("frame", video.num_frames) as bar:
                    for prediction in finished:
                        extra = {"file_name": source.name, "frame": num_frames}
                        self._write_records(write, prediction, next(image_ids), extra)
                        num_frames += 1
                        bar.update()
                if num_frames == 0:
                    raise UnreadableVideo(f"{video.name}: no frame of it can be decoded; convert it, or leave it out")
        except UnreadableVideo as error:
            if self.is_only_one:
                raise
            self.problems.append(f"skipped: {error}")
            return
        self.num_videos += 1
        self.num_frames += num_frames
        if video.is_cut_short(num_frames) and not stop.requested:
            self.problems.append(
                f"cut short: {video.name}: {num_frames} of the {video.num_frames} frames stated could be decoded"
            )

    def _draw_frame(self, outcome: Outcome) -> tuple[Prediction, NDArray[np.uint8] | None]:
        assert not isinstance(outcome, InputError), "frames are arrays, which need no reading"
        frame, prediction = outcome
        if "video" not in self.save:
            return prediction, None
        return prediction, np.asarray(prediction.filter(score_thresh=self.score_thresh).draw(frame, enlarge=False))

    def _save_frame(self, writer: VideoWriter, item: tuple[Prediction, NDArray[np.uint8] | None]) -> Prediction:
        prediction, picture = item
        if picture is not None:
            writer.write(picture)
        return prediction

    def _place(self, source: Source) -> Path:
        """The file of the annotated copy, in a folder that exists."""
        path = self.folder / output_name(source, self.picture_format)
        with write_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def _results(self) -> Iterator[Write]:
        """Writes predictions.json record by record; it appears under its name in the end, also that by Ctrl-C."""
        if "json" not in self.save:
            yield lambda record: None
            return
        interrupt: KeyboardInterrupt | None = None
        with replacing(self.folder / "predictions.json") as file:
            end = file.write(b"[")

            def write(record: dict[str, Any]) -> None:
                nonlocal end
                file.write((b", " if end > 1 else b"") + json.dumps(record).encode())
                end = file.tell()

            try:
                yield write
            except KeyboardInterrupt as error:  # the second, by somebody who does not wait for the images at hand
                interrupt = error
            file.seek(end)  # behind the last whole record
            file.truncate()
            file.write(b"]")
        if interrupt is not None:
            raise interrupt

    def _write_records(self, write: Write, prediction: Prediction, image_id: int, extra: dict[str, Any]) -> None:
        for record, name in zip(prediction.to_coco(image_id), prediction.class_names, strict=True):
            write(record | {"category_name": name} | extra)
        self.num_detections += len(prediction)
        self.num_drawn += int((prediction.scores >= self.score_thresh).sum())

    def _report(self, seconds: float) -> None:
        """Say what was done, how fast, and where it is."""
        done, written = [], []
        if self.num_images or not self.num_videos:
            done.append(f"{self.num_images} images")
            written += [f"*.{self.picture_format}"] if "pictures" in self.save else []
        if self.num_videos:
            done.append(f"{self.num_frames} frames of {self.num_videos} videos")
            written += ["*.webm"] if "video" in self.save else []
        drawn = f"{self.num_drawn} of them {'drawn ' if written else ''}(score >= {self.score_thresh:g})"
        written += ["predictions.json"] if "json" in self.save else []
        say(
            f"{', '.join(done)}, {self.num_detections} detections, {drawn}, "
            f"{(self.num_images + self.num_frames) / seconds:.3g} images/s: "
            f"{', '.join(f'{self.folder}/{name}' for name in written)}"
        )


def progress(unit: str, total: int | None) -> tqdm[Any]:
    """A progress bar, on a terminal only."""
    return tqdm(total=total, desc="detecting", unit=unit, disable=None, file=sys.stderr)


def check_outputs(sources: Sequence[Source], folder: Path, picture_format: str) -> None:
    """Refuse to write over what is to be read: the pictures of an earlier call in the same folder, for example."""
    real = {parent: os.path.realpath(parent) for parent in {s.path.parent for s in sources if isinstance(s.path, Path)}}
    inputs = {os.path.join(real[s.path.parent], s.path.name) for s in sources if isinstance(s.path, Path)}
    root = os.path.realpath(folder)
    for source in sources:
        output = os.path.join(root, output_name(source, picture_format))
        if output in inputs:
            raise InputError(
                f"{output}: an input, which the result of {source.path} would replace; give another --output"
            )


def output_name(source: Source, picture_format: str) -> str:
    """Name of the annotated copy."""
    return f"{source.name}.{picture_format if source.is_image else 'webm'}"


def score(text: str) -> float:
    """A number 0..1 from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


if __name__ == "__main__":
    main()
