"""Video files and cameras as streams of frames, and frames as video files, by OpenCV.

Frames are (H, W, 3) uint8, RGB, upright: OpenCV honours the rotation that phones note in their files.
Files are written as VP8 in WebM, without sound. OpenCV's wheels have no encoder for H.264; browsers do not play the
MPEG-4 part 2 that they have; VP9 takes seven times as long for half the size (1280x720: 4.6 instead of 30.7 frames per
second on two CPU cores).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpn_det.ahead import ahead
from fpn_det.extras import require
from fpn_det.files import write_errors
from fpn_det.structures import InputError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})

DEFAULT_FPS = 25.0
"""Where a file or a camera does not say."""

FRAMES_AHEAD = 8
"""So many frames of a file are decoded in advance; of a camera one, for what is shown should be now."""


class UnreadableVideo(InputError):
    """A file or camera that gives no frames."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """An open video file or camera.

    Attributes:
        name: of the file, or "camera 0".
        fps: frames per second.
        num_frames: as the file states it, mostly an estimate; None of cameras and where it does not say.
    """

    name: str
    fps: float
    num_frames: int | None
    _capture: Any
    _is_camera: bool

    def frames(self) -> Generator[NDArray[np.uint8], None, None]:
        """The frames, until the end, an undecodable one, or the camera's loss; read by a thread in advance."""
        depth = 1 if self._is_camera else FRAMES_AHEAD
        with closing(ahead(self._read, itertools.count(), depth=depth, num_threads=1)) as reads:
            for frame in reads:
                if frame is None:
                    return
                yield frame

    def is_cut_short(self, num_read: int) -> bool:
        """Whether clearly fewer frames could be read than the file states."""
        return self.num_frames is not None and num_read < 0.95 * self.num_frames - 1

    def _read(self, _: int) -> NDArray[np.uint8] | None:
        success, frame = self._capture.read()
        return np.ascontiguousarray(frame[:, :, ::-1]) if success else None


@contextmanager
def open_video(source: Path | int) -> Iterator[Video]:
    """Open a video file, or the camera of an index.

    Raises:
        UnreadableVideo: it cannot be opened.
        InputError: OpenCV is not installed.
    """
    cv2 = _opencv("Reading videos and cameras")
    name = f"camera {source}" if isinstance(source, int) else str(source)
    if isinstance(source, int):
        capture = cv2.VideoCapture(source)
    else:
        # Absolute: FFmpeg takes names like "concat:..." for protocols.
        capture = cv2.VideoCapture(str(source.absolute()), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            remedy = (
                "is it there, may you read /dev/video*, and does no other program use it?"
                if isinstance(source, int)
                else "damaged or cut short, or of a codec that OpenCV does not know; convert it, say to MP4 with H.264"
            )
            raise UnreadableVideo(f"{name}: cannot be opened as a video ({remedy})")
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        is_camera = isinstance(source, int)
        yield Video(
            name=name,
            fps=fps if math.isfinite(fps) and 0 < fps <= 240 else DEFAULT_FPS,
            num_frames=int(count) if not is_camera and 0 < count < 1e9 else None,
            _capture=capture,
            _is_camera=is_camera,
        )
    finally:
        capture.release()


class VideoWriter:
    """Writes a WebM file that appears under its name when it is complete; to be used in a `with` statement.

    The size is that of the first frame. OpenCV leaves out the last column or row of odd sizes, which VP8 has not.

    Args:
        path: the file, ending in .webm; its folder must exist.
        fps: frames per second.

    Raises:
        InputError: it cannot be written, or OpenCV is not installed. An older file of that name is intact.
    """

    def __init__(self, path: Path, *, fps: float) -> None:
        self.path = path
        self.fps = fps
        self.num_frames = 0
        self._temporary = path.with_name(f".{path.stem}.tmp.webm")  # the suffix decides about the format
        self._cv2 = _opencv("Writing videos")
        self._writer: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Append a frame, (H, W, 3) uint8 RGB, of the size of the first."""
        if self._writer is None:
            with write_errors(self.path):
                self._temporary.touch()  # the system's own words on why not
            h, w = frame.shape[:2]
            codec = self._cv2.VideoWriter_fourcc(*"VP80")
            with _silenced():
                self._writer = self._cv2.VideoWriter(
                    str(self._temporary.absolute()), self._cv2.CAP_FFMPEG, codec, self.fps, (w, h)
                )
            if not self._writer.isOpened():
                raise InputError(f"{self.path}: cannot be written (OpenCV {self._cv2.__version__} lacks VP8 or WebM)")
        self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
        self.num_frames += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is None:
            return
        try:
            self._writer.release()
            if kind is None:
                self._check()
                with write_errors(self.path):
                    self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _check(self) -> None:
        """Refuse a file that does not open: OpenCV says nothing where the disk is full."""
        written = self._cv2.VideoCapture(str(self._temporary.absolute()), self._cv2.CAP_FFMPEG)
        try:
            stated = written.get(self._cv2.CAP_PROP_FRAME_COUNT) if written.isOpened() else 0
            if stated < 0.95 * self.num_frames - 1:
                raise InputError(f"{self.path}: could not be written wholly. Is the disk full?")
        finally:
            written.release()


def _opencv(purpose: str) -> ModuleType:
    """OpenCV, told to be quiet and to follow no reference that leads out of the file system."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
    cv2 = require("cv2", extra="video", purpose=purpose)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing is written to standard error: OpenCV warns there that WebM has no four-letter codes."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
