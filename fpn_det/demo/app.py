"""The demo as a web application: static files, what the model is, and detection in the image that is posted.

It keeps nothing: an image lives in memory until its detections are sent back. Made for one person on their own machine:
there are no accounts, no encryption, and one image is looked at after the other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fpn_det.data.transforms import IMAGE_SUFFIXES, decode_image
from fpn_det.detector import Detector
from fpn_det.draw import class_color, text_color
from fpn_det.structures import InputError, printable

HEADERS = {
    # The page may load its own parts and talk to this server, and nothing else.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

UPLOAD_SECONDS = 120.0
"""So long an upload may take."""


def make_app(detector: Detector, *, title: str, max_bytes: int, hosts: Sequence[str]) -> Starlette:
    """The application.

    Args:
        detector: what detects.
        title: of the page.
        max_bytes: larger files are refused.
        hosts: names under which the page may be opened; others are refused, so that no site of the web can reach a
            server on this machine by giving its own name this machine's address (DNS rebinding). `["*"]` allows all.
    """
    turn = anyio.Lock()  # one image after the other: a second at the same time takes memory and gains no speed

    def model(request: Request) -> JSONResponse:
        classes = [
            {"name": printable(name), "id": category_id, "color": _css(class_color(label))}
            | {"text": _css(text_color(class_color(label)))}
            for label, (category_id, name) in enumerate(
                zip(detector.categories.ids, detector.categories.names, strict=True)
            )
        ]
        return JSONResponse(
            {
                "title": title,
                "classes": classes,
                "max_bytes": max_bytes,
                "suffixes": sorted(IMAGE_SUFFIXES),
            }
        )

    async def detect(request: Request) -> JSONResponse:
        name = printable(request.query_params.get("name", "")[:200]) or "image"
        if request.headers.get("content-type") != "application/octet-stream":
            # Pages of other sites cannot send this type without asking, and nobody answers them.
            return _refused("send the file as application/octet-stream", 415)
        data = bytearray()
        try:
            with anyio.fail_after(UPLOAD_SECONDS):  # whoever stops in the middle would keep a place for ever
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > max_bytes:
                        return _refused(f"{name}: more than the limit of {max_bytes / 2**20:g} MiB; scale it down", 413)
        except TimeoutError:
            return _refused(f"{name}: not sent within {UPLOAD_SECONDS:g} seconds; scale it down", 408)
        except ClientDisconnect:
            return _refused("the page was closed", 400)  # which nobody reads
        if not data:
            return _refused(f"{name}: the file is empty", 422)
        async with turn:
            try:
                found = await run_in_threadpool(_detect, detector, bytes(data), name)
            except InputError as error:
                return _refused(printable(str(error)), 422)
        return JSONResponse(found)

    return Starlette(
        routes=[
            Route("/model", model),
            Route("/detect", detect, methods=["POST"]),
            Mount("/", StaticFiles(directory=Path(__file__).parent / "static", html=True)),
        ],
        middleware=[
            Middleware(_WithHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
    )


def _detect(detector: Detector, data: bytes, name: str) -> dict[str, object]:
    """Decode and detect: what the page shows of an image.

    Raises:
        InputError: it cannot be decoded, or does not fit into the memory.
    """
    start = time.perf_counter()
    image = decode_image(data, Path(name))
    found = detector.predict(image, score_thresh=0.0)
    height, width = image.shape[1:]
    detections = [
        {"box": [round(x, 2) for x in box], "score": round(score, 4), "label": label}
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
    seconds = time.perf_counter() - start
    return {"width": width, "height": height, "seconds": round(seconds, 4), "detections": detections}


def _refused(reason: str, status: int) -> JSONResponse:
    # The rest of an upload that is refused midway is not read: close the connection.
    return JSONResponse({"error": reason}, status_code=status, headers={"connection": "close"})


def _css(color: tuple[int, int, int]) -> str:
    return f"rgb({color[0]} {color[1]} {color[2]})"


class _WithHeaders:
    """Adds `HEADERS` to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = Headers(raw=message["headers"]).mutablecopy()
                headers.update(HEADERS)
                message["headers"] = headers.raw
            await send(message)

        await self.app(scope, receive, with_headers)
