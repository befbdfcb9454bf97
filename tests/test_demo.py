"""The demo page, served over a socket and used in a real browser."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import anyio
import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import expect
from starlette.testclient import TestClient
from starlette.types import Message

from fpn_det.demo.app import make_app
from fpn_det.structures import Categories

NAMES = ("cat", "<b>dog</b>\u202e", "bird")
MAX_BYTES = 300_000
OCTETS = {"content-type": "application/octet-stream"}


class Stub:
    """Finds boxes of known scores wherever it looks; the real detector is tested on its own."""

    categories = Categories(ids=(7, 8, 30), names=NAMES)

    def predict(self, image, score_thresh: float) -> SimpleNamespace:
        assert score_thresh == 0
        height, width = image.shape[1:]
        boxes = np.array([[0, 0, width, height], [2, 3, 12, 8], [5, 5, 20, 20]], np.float32)
        return SimpleNamespace(
            boxes=boxes, scores=np.array([0.9, 0.6, 0.2], np.float32), labels=np.array([0, 1, 0], np.int64)
        )


def application(hosts=("127.0.0.1", "testserver")):
    return make_app(Stub(), title="runs/best.pth", max_bytes=MAX_BYTES, hosts=hosts)  # type: ignore[arg-type]


def encoded(width: int = 64, height: int = 48, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def client() -> TestClient:
    return TestClient(application())


def test_detections_are_those_of_the_detector(client):
    answer = client.post("/detect?name=a.png", content=encoded(), headers=OCTETS).json()
    assert (answer["width"], answer["height"]) == (64, 48)
    assert answer["detections"][0] == {"box": [0, 0, 64, 48], "score": 0.9, "label": 0}
    assert [d["score"] for d in answer["detections"]] == [0.9, 0.6, 0.2]


def test_exif_rotation_is_applied_as_browsers_do(client):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(buffer, "JPEG", exif=exif)
    answer = client.post("/detect", content=buffer.getvalue(), headers=OCTETS).json()
    assert (answer["width"], answer["height"]) == (48, 64)


def test_the_model_names_its_classes(client):
    model = client.get("/model").json()
    assert [(c["id"], c["name"]) for c in model["classes"]] == [(7, "cat"), (8, "<b>dog</b>\\u202e"), (30, "bird")]


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"", OCTETS, 422, "a.png: the file is empty"),
        (b"no image at all", OCTETS, 422, "a.png: cannot decode the image"),
        (encoded()[:60], OCTETS, 422, "a.png: cannot decode the image"),
        (b"x" * (MAX_BYTES + 1), OCTETS, 413, "a.png: more than the limit of 0.286"),
        (encoded(), {"content-type": "text/plain"}, 415, "application/octet-stream"),
    ],
    ids=["empty", "text", "cut off", "too large", "what other sites can send"],
)
def test_uploads_that_are_refused(client, content, headers, status, words):
    answer = client.post("/detect?name=a.png", content=content, headers=headers)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_a_bomb_is_refused(client):
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG", compress_level=9)
    assert len(bomb.getvalue()) < MAX_BYTES
    answer = client.post("/detect?name=b.png", content=bomb.getvalue(), headers=OCTETS)
    assert answer.status_code == 422
    assert "decompression bomb" in answer.json()["error"]


def test_an_endless_upload_is_cut_off_at_the_limit(client):
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 50 * MAX_BYTES:
            sent += 10_000
            yield b"x" * 10_000

    assert client.post("/detect", content=endless(), headers=OCTETS).status_code == 413


def test_an_upload_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr("fpn_det.demo.app.UPLOAD_SECONDS", 0.05)
    sent: list[Message] = []

    async def run() -> None:
        is_first = True

        async def receive() -> Message:
            nonlocal is_first
            if not is_first:
                await anyio.sleep(60)
            is_first = False
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", b"testserver"), (b"content-type", b"application/octet-stream")]
        scope = {"type": "http", "method": "POST", "path": "/detect", "query_string": b"", "headers": headers}
        await application()(scope, receive, send)

    thread = threading.Thread(target=anyio.run, args=[run])  # the browser of other tests has a loop in this one
    thread.start()
    thread.join()
    assert sent[0]["status"] == 408


def test_a_page_that_is_closed_while_it_sends_is_no_failure_of_the_server(server, caplog):
    address = server.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        head = f"POST /detect HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/octet-stream\r\n"
        connection.sendall(f"{head}Content-Length: 100000\r\n\r\nsome".encode())
        time.sleep(0.2)
    time.sleep(0.3)
    with urllib.request.urlopen(f"{server}/model") as answer:
        assert answer.status == 200
    assert "Exception in ASGI application" not in caplog.text


def test_names_of_other_sites_are_refused(client):
    assert client.get("/model", headers={"host": "evil.example"}).status_code == 400
    assert TestClient(application(hosts=["*"])).get("/model", headers={"host": "box.lan"}).status_code == 200


def test_every_answer_forbids_foreign_content(client):
    for path in ("/", "/page.js", "/model", "/no-such-file"):
        assert "default-src 'none'" in client.get(path).headers["content-security-policy"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = uvicorn.Server(uvicorn.Config(application(), log_level="error"))
        thread = threading.Thread(target=service.run, kwargs={"sockets": [listener]})
        thread.start()
        while not service.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        service.should_exit = True
        thread.join()


@pytest.fixture
def page(browser, server):
    """The demo in a window of its own; errors on its console and requests to other places fail the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((server, "blob:", "data:")) else troubles.append(r.url))
    page.goto(server)
    expect(page).to_have_title("runs/best.pth")
    yield page
    context.close()
    expected = r"status of 4\d\d"  # Chromium's note about an answer that refuses an upload
    assert [t for t in troubles if not re.search(expected, t)] == []


def choose(page, name: str, content: bytes) -> None:
    page.set_input_files("#file", files=[{"name": name, "mimeType": "image/png", "buffer": content}])


def saved(page, button: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.click(button)
    waiting.value.save_as(folder / waiting.value.suggested_filename)
    return folder / waiting.value.suggested_filename


def test_an_image_its_boxes_threshold_classes_and_downloads(page, tmp_path):
    choose(page, "photo.png", encoded(320, 240))
    page.wait_for_selector("#boxes g")
    assert page.locator("#boxes g").count() == 2  # at a threshold of 0.5
    assert page.inner_text("#count") == "2 of 3 detections"
    assert page.locator("#boxes g").last.locator("rect").first.get_attribute("width") == "320"  # the best on top
    assert page.locator("#rows tr").nth(1).inner_text().split("\t")[:2] == [" <b>dog</b>\\u202e", "0.600"]

    page.fill("#threshold", "0.1")
    assert page.locator("#boxes g").count() == 3
    page.uncheck("#classes input[value='0']")
    assert page.locator("#boxes g").count() == 1
    page.fill("#threshold", "0.7")
    assert page.locator("#boxes g").count() == 0
    page.fill("#threshold", "0.5")

    [record] = json.loads(saved(page, "#json", tmp_path).read_text())
    assert record["bbox"] == [2, 3, 10, 5]
    assert (record["category_id"], record["file_name"]) == (8, "photo.png")
    with Image.open(saved(page, "#picture", tmp_path)) as picture:
        assert picture.size == (320, 240)
        assert np.asarray(picture.convert("RGB")).reshape(-1, 3).std(axis=0).any()  # boxes are painted

    page.hover("#rows tr")
    assert page.locator("#boxes g.chosen").count() == 1


def test_what_cannot_be_shown_is_said_and_the_page_goes_on(page):
    choose(page, "broken.png", b"not an image")
    expect(page.locator("#message.error")).to_contain_text("broken.png: cannot decode the image")
    choose(page, "huge.png", b"x" * (MAX_BYTES + 1))  # refused by the page, unsent
    expect(page.locator("#message.error")).to_contain_text("huge.png: 0.3 MiB, the limit is")
    choose(page, "good.png", encoded())
    page.wait_for_selector("#boxes g")
    assert page.locator("#message.error").count() == 0


def test_dropping_a_file(page):
    page.evaluate(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, cancelable: true}));
        }""",
        list(encoded()),
    )
    page.wait_for_selector("#boxes g")
    assert "dropped.png" in page.inner_text("#message")


def test_an_answer_that_is_not_json_is_told(page):
    page.route("**/detect*", lambda route: route.fulfill(status=429, body="Too Many Requests"))
    choose(page, "good.png", encoded())
    expect(page.locator("#message.error")).to_contain_text("the server answers 429")
    page.unroute("**/detect*")


def test_tags_stay_within_the_image(page):
    found = [{"box": [60, 5, 64, 40], "score": 1, "label": 1}]
    answer = {"width": 64, "height": 48, "seconds": 1, "detections": found}
    page.route("**/detect*", lambda route: route.fulfill(json=answer))
    choose(page, "good.png", encoded())
    page.wait_for_selector("#boxes g")
    tag, image = page.locator("#boxes .tag").bounding_box(), page.locator("#image").bounding_box()
    assert tag["x"] + tag["width"] <= image["x"] + image["width"] + 1
    assert tag["x"] >= image["x"]
    page.unroute("**/detect*")


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_phones_and_wide_screens(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    choose(page, "a.png", encoded(1600, 900))
    page.wait_for_selector("#boxes g")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box, image = page.locator("#boxes").bounding_box(), page.locator("#image").bounding_box()
    assert box == pytest.approx(image, abs=1)  # so boxes lie where they belong
