"""Decoding every image of a data set, to find the files that cannot be: in processes that may die of it."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from tqdm import tqdm

from fpn_det.data.coco import CocoAnnotations
from fpn_det.data.problems import Defect, shown
from fpn_det.data.transforms import load_image
from fpn_det.structures import InputError


class Decoded(NamedTuple):
    """What decoding one image file showed.

    Attributes:
        defect: what is wrong, if anything.
        value: the same in words.
        sha256: of the bytes of the file; empty where it cannot be decoded.
    """

    defect: Defect | None
    value: str = ""
    sha256: bytes = b""


def decode_all(data: CocoAnnotations, *, num_workers: int, name: str) -> Iterator[tuple[int, Decoded]]:
    """Decode every image as training does.

    Each image is decoded in one of `num_workers` processes (at least one), of which each has one image at a time: if a
    decoder crashes, or the system ends its process for want of memory, that image is known, and another process goes
    on with the next.

    Args:
        data: the images.
        num_workers: how many processes.
        name: of the data set, for the progress on stderr.

    Yields:
        Index and result of every image, in any order.
    """
    todo = iter(range(len(data)))
    busy: dict[Connection, tuple[BaseProcess, int]] = {}

    def give_next(process: BaseProcess, connection: Connection) -> None:
        index = next(todo, None)
        connection.send(index)
        if index is not None:
            busy[connection] = process, index

    try:
        for _ in range(min(max(num_workers, 1), len(data))):
            give_next(*_start(data))
        with tqdm(total=len(data), desc=f"decoding {name}", unit="image", disable=None, file=sys.stderr) as progress:
            while busy:
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    process, index = busy.pop(connection)
                    try:
                        result = connection.recv()
                    except (EOFError, OSError):
                        process.join()
                        cause = _cause(process.exitcode)
                        result = Decoded(Defect.IMAGE_KILLS_DECODER, _words(f"{data.path(index)}: {cause}"))
                        process, connection = _start(data)
                    give_next(process, connection)
                    progress.update()
                    yield index, result
    finally:
        for process, _ in busy.values():
            process.terminate()


def _start(data: CocoAnnotations) -> tuple[BaseProcess, Connection]:
    ours, theirs = Pipe()
    process = multiprocessing.Process(target=_work, args=(data, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a dead process is the end of the pipe
    return process, ours


def _work(data: CocoAnnotations, connection: Connection) -> None:
    """Decode the images whose indices come, until None comes or the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    torch.set_num_threads(1)
    try:
        while (index := connection.recv()) is not None:
            connection.send(_decode(data, index))
    except (EOFError, OSError):
        pass


def _decode(data: CocoAnnotations, index: int) -> Decoded:
    path = data.path(index)
    h, w = data.sizes[index].tolist()
    try:
        height, width = load_image(path).shape[1:]
        if (height, width) == (h, w):
            return Decoded(None, sha256=hashlib.sha256(path.read_bytes()).digest())
    except (InputError, OSError, MemoryError) as error:
        return Decoded(Defect.IMAGE_UNREADABLE, _words(str(error) or f"{path}: {type(error).__name__}"))
    try:
        load_image(path, (h, w))
    except InputError as error:
        return Decoded(Defect.IMAGE_SIZE_DIFFERS, _words(str(error)))
    return Decoded(
        Defect.IMAGE_NOT_UPRIGHT,
        _words(f"{path}: upright it is {width}x{height} (width x height), annotated {w}x{h}"),
        hashlib.sha256(path.read_bytes()).digest(),
    )


def _words(text: str) -> str:
    """A message as one printable line of bounded length."""
    return text if text.isprintable() and len(text) < 500 else shown(text)


def _cause(exit_code: int | None) -> str:
    """How a process ended, in words."""
    names = {-number: number.name for number in signal.Signals}
    cause = names.get(exit_code or 0, f"exit code {exit_code}")
    return f"{cause}, perhaps for want of memory" if cause == "SIGKILL" else cause
