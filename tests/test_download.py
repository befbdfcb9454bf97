"""Downloads from a server on this machine that does what servers and networks do."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request

import pytest

from fpn_det import download as module
from fpn_det.download import download
from fpn_det.structures import InputError

CONTENT = hashlib.shake_256(b"weights").digest(200_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """A server whose behaviour tests set.

    Attributes:
        content: the file, at any path but those of `contents` and `redirects`.
        contents: path to file.
        tag: its ETag; None sends none.
        cuts: of each request in turn, after how many bytes the connection ends; none left: it does not.
        statuses: of each request in turn, an HTTP status other than success.
        ignores_ranges: whether it sends the whole file whatever was asked for.
        ignores_if_range: whether it continues although the file changed.
        stated_length: what it claims to have, other than it has.
        chunked: whether it sends in chunks, without a length.
        pause_s: between pieces of 20,000 bytes.
        redirects: path to address.
        requests: headers of the requests so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.statuses = CONTENT, [], []
        self.contents: dict[str, bytes] = {}
        self.tag: str | None = '"one"'
        self.headers: dict[str, str] = {}
        self.ignores_ranges = self.ignores_if_range = self.chunked = False
        self.stated_length: int | None = None
        self.pause_s = 0.0
        self.redirects: dict[str, str] = {}
        self.requests: list[dict[str, str]] = []
        self.scheme = "http"

    def url(self, path: str = "/weights.pth") -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}{path}"

    @property
    def ranges(self) -> list[str | None]:
        """What each request asked for."""
        return [headers.get("Range") for headers in self.requests]

    def handle_error(self, *_: object) -> None:
        pass  # connections that the other side ends


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        cut = server.cuts.pop(0) if server.cuts else None
        self.close_connection = True
        if server.statuses and (status := server.statuses.pop(0)):
            self.send_error(status)
            return
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = server.contents.get(self.path, server.content)
        begin, total = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range") in (server.tag, server.headers.get("Last-Modified"))
        if asked and not server.ignores_ranges and (unchanged or server.ignores_if_range):
            begin = int(asked[1])
            if begin >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        stated = server.stated_length or total
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{stated - 1}/{stated}")
        if server.tag:
            self.send_header("ETag", server.tag)
        for name, value in server.headers.items():
            self.send_header(name, value)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(stated - begin))
        self.end_headers()
        end = total if cut is None else min(total, begin + cut)
        for i in range(begin, end, 20_000):
            piece = content[i : min(i + 20_000, end)]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if server.chunked else piece)
            time.sleep(server.pause_s)
        if server.chunked and cut is None:
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, short waits, no proxy in between."""
    monkeypatch.setattr(module, "PAUSES_S", (0, 0, 0, 0))
    monkeypatch.setattr(module, "TIMEOUT_S", 2.0)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(url: str, path: Path, sha256: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        download(url, path, sha256=sha256)
    assert not path.exists()
    return str(error.value)


@pytest.mark.parametrize("sha256", [None, SHA256, SHA256[:8]])
def test_a_file_arrives_whole_and_alone(server: Server, tmp_path: Path, sha256: str | None) -> None:
    path = tmp_path / "hub" / "weights.pth"
    download(server.url(), path, sha256=sha256)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["weights.pth"]
    download(server.url(), path, sha256=sha256)
    assert len(server.requests) == 1  # the second time it is there


def test_progress_on_a_terminal(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    server.cuts = [100_000]
    download(server.url(), tmp_path / "weights\x1b.pth")
    shown = sys.stderr.getvalue()
    assert re.search(r"weights\\x1b\.pth: +50%\|.*97\.7k/195k \[", shown)  # where the second attempt begins
    assert re.search(r"100%\|.*195k/195k \[\d\d:\d\d<.*B/s\]", shown)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_cut_connection_is_taken_up_again(server: Server, tmp_path: Path, capsys, chunked: bool) -> None:
    server.chunked, server.cuts = chunked, [70_000, 40_000]
    download(server.url(), tmp_path / "weights.pth", sha256=SHA256)
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=70000-", "bytes=110000-"]
    assert [headers.get("If-Range") for headers in server.requests] == [None, '"one"', '"one"']
    assert names(tmp_path) == ["weights.pth"]
    assert capsys.readouterr().err.count("trying again in 0 s") == 2


def test_a_later_call_continues(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.cuts = [70_000, *[0] * 10]
    path = tmp_path / "weights.pth"
    message = refusal(server.url(), path)
    assert "cut after 70,000 of 200,000 bytes; tried again 4 times in vain" in message
    assert (tmp_path / "weights.pth.part").read_bytes() == CONTENT[:70_000]
    server.cuts, server.requests = [], []
    download(server.url(), path)
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=70000-"]
    assert names(tmp_path) == ["weights.pth"]


def test_a_process_that_was_killed_before_renaming_left_all(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    (tmp_path / "weights.pth.part.version").write_text('"one"')
    download(server.url(), tmp_path / "weights.pth", sha256=SHA256)
    assert server.ranges == ["bytes=200000-"]
    assert names(tmp_path) == ["weights.pth"]


@pytest.mark.parametrize("size", [100, 199_000, 200_001])
@pytest.mark.parametrize("version", [None, '"two"'])
def test_bytes_of_unknown_or_another_version_are_not_used(
    server: Server, tmp_path: Path, version: str | None, size: int
) -> None:
    (tmp_path / "weights.pth.part").write_bytes(b"x" * size)
    if version:
        (tmp_path / "weights.pth.part.version").write_text(version)
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_a_part_that_is_longer_than_the_file_is_not_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT + b"x")
    (tmp_path / "weights.pth.part.version").write_text('"one"')
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    server.ignores_ranges, server.cuts = True, [70_000, 50_000]
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=70000-", "bytes=50000-"]


def test_a_server_without_ranges_that_always_cuts_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ignores_ranges, server.cuts = True, [70_000] * 20
    assert "tried again 4 times in vain" in refusal(server.url(), tmp_path / "weights.pth")
    assert len(server.requests) == 5


@pytest.mark.parametrize("honest", [True, False])
def test_a_file_that_changed_starts_anew(server: Server, tmp_path: Path, honest: bool) -> None:
    server.cuts = [70_000, *[0] * 10]
    refusal(server.url(), tmp_path / "weights.pth")
    server.cuts, server.content, server.tag = [], CONTENT[::-1], '"two"'
    server.ignores_if_range = not honest
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT[::-1]


def test_the_time_of_change_serves_where_there_is_no_strong_tag(server: Server, tmp_path: Path) -> None:
    server.tag, server.headers = 'W/"weak"', {"Last-Modified": formatdate(0, usegmt=True)}
    server.cuts = [70_000]
    download(server.url(), tmp_path / "weights.pth", sha256=SHA256)
    assert server.requests[1]["If-Range"] == "Thu, 01 Jan 1970 00:00:00 GMT"
    assert server.ranges == [None, "bytes=70000-"]


def test_without_a_version_there_is_no_continuing(server: Server, tmp_path: Path) -> None:
    server.tag, server.cuts = None, [70_000]
    download(server.url(), tmp_path / "weights.pth", sha256=SHA256)
    assert server.ranges == [None, None]


@pytest.mark.parametrize("stated", [200_001, 10**12])
def test_a_server_that_has_less_than_it_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**13))
    server.stated_length = stated
    server.ignores_ranges = True
    assert f"after 200,000 of {stated:,} bytes" in refusal(server.url(), tmp_path / "weights.pth")


def test_a_truncated_file_with_a_matching_length_has_the_wrong_checksum(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1]
    message = refusal(server.url(), tmp_path / "weights.pth", SHA256)
    assert re.search(
        rf"{server.url()}: SHA-256 .* {hashlib.sha256(CONTENT[:-1]).hexdigest()}, expected {SHA256}", message
    )
    assert names(tmp_path) == []


def test_a_checksum_is_a_checksum(tmp_path: Path) -> None:
    for wrong in ("", "abc", "g" * 64, SHA256 + "0", SHA256.upper()):
        with pytest.raises(ValueError, match="8 to 64 lower-case hexadecimal digits"):
            download("https://example.org/a", tmp_path / "a", sha256=wrong)


def test_a_file_that_is_there_is_verified_and_kept(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match=rf"{path}: its SHA-256 is .*, expected {SHA256[:8]}, .* Delete it"):
        download(server.url(), path, sha256=SHA256[:8])
    assert path.read_bytes() == b"mine"
    download(server.url(), path)  # nobody knows its checksum
    assert path.read_bytes() == b"mine"
    assert server.requests == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_not_repeated(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status]
    path = tmp_path / "weights.pth"
    assert re.search(rf"{server.url()}: the server answers {status} .* put it to {path}$", refusal(server.url(), path))
    assert len(server.requests) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status, status]
    download(server.url(), tmp_path / "weights.pth", sha256=SHA256)
    server.statuses = [status] * 10
    assert f"answers {status}" in refusal(server.url(), tmp_path / "other.pth")
    assert len(server.requests) == 6


def test_pauses_grow(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module, "PAUSES_S", (1, 2, 4, 8))
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.cuts = [70_000, 0, 0, 50_000, *[0] * 9]
    refusal(server.url(), tmp_path / "weights.pth")
    assert [pause for pause in pauses if pause] == [1, 2, 4, 1, 2, 4, 8]


def test_no_network(tmp_path: Path) -> None:
    with Server() as server:
        url = server.url()
    message = refusal(url, tmp_path / "weights.pth")
    assert re.search(rf"{url}: no connection .*refused.*; tried again 2 times .* https_proxy", message)
    assert names(tmp_path) == []
    assert "no connection" in refusal("https://..", tmp_path / "weights.pth")


def test_a_slow_server_is_waited_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 1.0)
    server.content, server.pause_s = CONTENT[:100_000], 0.25  # 1.25 s in all
    download(server.url(), tmp_path / "weights.pth")
    assert len(server.requests) == 1


def test_a_silent_server_is_not(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    server.content, server.pause_s = CONTENT[:60_000], 1.0
    download(server.url(), tmp_path / "weights.pth")
    assert server.ranges == [None, "bytes=20000-", "bytes=40000-"]


def test_a_full_disk_is_told_before_the_download(server: Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=150_000))
    message = refusal(server.url(), tmp_path / "weights.pth")
    assert "200,000 bytes are missing, and there is room for 150,000. Free some space" in message
    assert names(tmp_path) == []
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:70_000])  # with what is here, the rest has room
    (tmp_path / "weights.pth.part.version").write_text('"one"')
    download(server.url(), tmp_path / "weights.pth", sha256=SHA256)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_becomes_full(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").symlink_to("/dev/full")
    message = refusal(server.url(), tmp_path / "weights.pth")
    assert re.search(
        r"weights\.pth: cannot be downloaded to this place \(No space left on device\)\. Make room", message
    )


def test_a_place_that_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert re.search(r"\(File exists|\(Not a directory", refusal(server.url(), tmp_path / "file" / "weights.pth"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # what a read-only folder does to all but root
    assert "(Permission denied). Make room there or give write permission" in refusal(server.url(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/weights.pth",
        "http://127.0.0.1.example.org/weights.pth",
        "ftp://127.0.0.1/weights.pth",
        "file:///etc/passwd",
        "https:///weights.pth",
        "https://[::1/weights.pth",
        "https://example.org/a b",
        "https://example.org/\x1b[2J",
        "weights.pth",
        "",
    ],
)
def test_only_https_is_downloaded(tmp_path: Path, url: str) -> None:
    assert "only https:// addresses are downloaded" in refusal(url, tmp_path / "weights.pth")


def test_redirections_are_followed_within_https(server: Server, tmp_path: Path) -> None:
    server.redirects = {"/old": server.url(), "/relative": "/weights.pth"}
    for i, path in enumerate(server.redirects):
        download(server.url(path), tmp_path / str(i), sha256=SHA256)
    server.redirects = {"/old": "http://example.org/weights.pth", "/file": "file:///etc/passwd", "/loop": "/loop"}
    assert f"{server.url('/old')}: redirects to 'http://example.org/w" in refusal(server.url("/old"), tmp_path / "w")
    assert "the server answers 302" in refusal(server.url("/file"), tmp_path / "w")
    assert "the server answers 302" in refusal(server.url("/loop"), tmp_path / "w")


def test_a_redirection_from_https_to_this_machine_is_refused() -> None:
    handler = module._Redirections()
    request = Request("https://example.org/weights.pth")
    for url in ("http://127.0.0.1/weights.pth", "http://example.org/weights.pth"):
        with pytest.raises(InputError, match=r"^https://example\.org/weights\.pth: redirects to .*only https"):
            handler.redirect_request(request, None, 302, "Found", {}, url)
    assert handler.redirect_request(request, None, 302, "Found", {}, "https://example.com/w") is not None


def test_processes_of_a_job_download_once(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lock belongs to an open file, so threads of a process stand for processes here."""
    server.pause_s, server.cuts = 0.02, [70_000]
    path = tmp_path / "hub" / "weights.pth"
    errors: list[BaseException] = []

    def run() -> None:
        try:
            download(server.url(), path, sha256=SHA256)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=70000-"]
    assert names(path.parent) == ["weights.pth"]
    assert "waiting for the process that downloads weights.pth" in capsys.readouterr().err


def test_processes_of_a_job_take_over_what_fails(server: Server, tmp_path: Path) -> None:
    """After a wrong checksum the part is deleted; whoever waits for it must not go on with the deleted file."""
    server.pause_s = 0.02
    good, server.content = server.content, CONTENT[::-1]
    outcomes: list[str] = []

    def run() -> None:
        try:
            download(server.url(), tmp_path / "weights.pth", sha256=SHA256)
            outcomes.append("whole")
        except InputError:
            server.content = good
            outcomes.append("refused")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "whole" in outcomes
    assert "refused" in outcomes
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT
    assert names(tmp_path) == ["weights.pth"]


@pytest.fixture
def https_server(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Path]:
    """The server behind TLS, and the certificate that it signs with."""
    if not shutil.which("openssl"):
        pytest.skip("needs the command openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    places = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *places], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.scheme = "https"
    return server, certificate


def test_https(https_server: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, certificate = https_server
    path = tmp_path / "weights.pth"
    message = refusal(server.url(), path)  # the system does not know this certificate
    assert re.search(r"cannot prove who it is \(.*self.signed.*\)\. Set the clock .* SSL_CERT_FILE", message)
    assert server.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.cuts = [70_000]
    download(server.url(), path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=70000-"]
    server.redirects = {"/old": f"http://127.0.0.1:{server.server_port}/weights.pth"}
    assert "redirects to 'http://127.0.0.1" in refusal(server.url("/old"), tmp_path / "other.pth")
