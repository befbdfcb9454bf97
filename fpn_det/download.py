"""Downloads over HTTPS: resumed after an interruption, verified, and in place only when whole.

While a file arrives it is called NAME.part, and NAME.part.version says which version of the server's file that is a
part of. One process at a time writes them: the others of a job wait for its lock, and find the file there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import ssl
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from tqdm import tqdm

from fpn_det.structures import InputError, printable

TIMEOUT_S = 30.0  # of every wait for the network: to connect, to agree on a key, for the next bytes
PAUSES_S = (1, 2, 4, 8, 16, 32)  # before attempts after ones that brought nothing new
NUM_FIRST_PAUSES = 2  # .. of them while nothing has come at all: there may be no network
CHUNK_BYTES = 1 << 20


class _InterruptedError(Exception):
    """The connection was cut or not made, or the file starts anew: another attempt may succeed."""


def download(url: str, path: Path, *, sha256: str | None = None) -> None:
    """Put the file at `url` to `path`, unless it is there.

    What an interrupted call has received is kept, and continued if the server still has the same version. `path`
    appears when its length and checksum are right. A progress bar with rate and remaining time is shown on a terminal.

    Args:
        url: an https:// address, or http:// of a loopback address; redirections must not leave HTTPS.
        path: the file; its folder is created.
        sha256: checksum in hexadecimal digits, or the first 8 or more of them. A file that is there already is
            verified as well. None trusts the length that the server states (if it states none, the connection).

    Raises:
        InputError: a wrong address or checksum, a refusal of the server, no connection, or a disk that is full or
            cannot be written.
        ValueError: `sha256` is no such number.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", sha256):
        raise ValueError(f"sha256 must be 8 to 64 lower-case hexadecimal digits, got {sha256!r}")
    _check_address(url)
    part_path = path.with_name(f"{path.name}.part")
    version_path = path.with_name(f"{path.name}.part.version")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(part_path, version_path) as part:
                if not path.exists():  # the process that had the lock before may have been quicker
                    _fetch(url, part, version_path, path)
                    os.fsync(part.fileno())
                    if received := _mismatch(part_path, sha256):
                        part_path.unlink()
                        version_path.unlink(missing_ok=True)
                        raise InputError(
                            f"{url}: SHA-256 of what was received is {received}, expected {sha256}; it is deleted. A "
                            "proxy or the log-in page of a network may have answered: try again over another network, "
                            f"or get the file elsewhere and put it to {path}"
                        )
                    part_path.replace(path)
                    version_path.unlink(missing_ok=True)
                    return
        if received := _mismatch(path, sha256):
            raise InputError(
                f"{path}: its SHA-256 is {received}, expected {sha256}, so it is damaged or not the file of {url}. "
                "Delete it, and it will be downloaded again"
            )
    except OSError as error:  # of the disk: those of the network are of other types by now
        raise InputError(
            f"{path}: cannot be downloaded to this place ({error.strerror}). Make room there or give write permission; "
            f"or get {url} elsewhere and put it there"
        ) from error


@contextmanager
def _exclusive(path: Path, companion: Path) -> Iterator[IO[bytes]]:
    """Open a file for appending, one process at a time; left empty, it and its companion are deleted."""
    import fcntl  # here, because Windows lacks it: there, what is downloaded by other means can be used

    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _tell(f"waiting for the process that downloads {path.stem}")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # its last owner renamed or deleted it while this process waited
            try:
                yield file
            finally:
                if file.tell() == 0 and _is_at(file, path):
                    companion.unlink(missing_ok=True)
                    path.unlink()
            return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _mismatch(path: Path, sha256: str | None) -> str:
    """The checksum of a file if it does not begin with `sha256`, else nothing."""
    if sha256 is None:
        return ""
    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        _progress(f"verifying {path.name.removesuffix('.part')}", path.stat().st_size, delay=1.0) as bar,
    ):
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    received = digest.hexdigest()
    return "" if received.startswith(sha256) else received


def _progress(what: str, total: int | None, *, initial: int = 0, delay: float = 0.0) -> tqdm[NoReturn]:
    """A bar of bytes with rate and remaining time, from `delay` seconds on."""
    return tqdm(
        desc=printable(what),
        total=total,
        initial=initial,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=delay,
        disable=None,  # shown on terminals
        file=sys.stderr,
    )


def _fetch(url: str, part: IO[bytes], version_path: Path, path: Path) -> None:
    """Append the rest of the file to `part`, in as many attempts as it takes; `path` is for messages."""
    start = furthest = part.tell()
    num_failures = 0
    while True:
        try:
            _receive(url, part, version_path, path)
            return
        except _InterruptedError as error:
            if part.tell() > furthest:  # a file that starts anew makes progress only beyond what there was
                furthest, num_failures = part.tell(), 0
            pauses = PAUSES_S if furthest > start else PAUSES_S[:NUM_FIRST_PAUSES]
            if num_failures == len(pauses):
                raise InputError(
                    f"{url}: {error}; tried again {num_failures} times in vain. What has come is kept: check "
                    "the network (a proxy goes into https_proxy) and run the same command again, or get the "
                    f"file elsewhere and put it to {path}"
                ) from error
            pause = pauses[num_failures]
            num_failures += 1
            _tell(f"{url}: {error}; trying again in {pause} s")
            time.sleep(pause)


def _receive(url: str, part: IO[bytes], version_path: Path, path: Path) -> None:
    """One attempt: ask for what is missing and append what comes.

    Raises:
        InputError: another attempt will not help.
        _InterruptedError: it may.
    """
    begin = part.tell()
    version = version_path.read_text(encoding="latin1") if begin and version_path.exists() else None
    headers = {"User-Agent": "fpn_det"}
    if version:
        headers |= {"Range": f"bytes={begin}-", "If-Range": version}
    try:
        response = _open(url, headers, path)
    except _RangeError as error:
        if error.total == begin:  # it was whole: the last process ended before it could rename it
            return
        _empty(part)
        raise _InterruptedError(f"the server has {error.total} bytes, {begin} were here; starting anew") from error
    with response:
        if response.status == 206:
            stated = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not stated or int(stated[1]) != begin or _version(response.headers) not in (version, None):
                _empty(part)
                raise _InterruptedError("the file on the server changed meanwhile; starting anew")
            total: int | None = int(stated[2])
        else:  # all of it: asked for, or the version changed, or the server cannot continue
            _empty(part)
            total = response.length
            version_path.write_text(_version(response.headers) or "", encoding="latin1")
        missing = 0 if total is None else total - part.tell()
        free = shutil.disk_usage(path.parent).free
        if missing > free:
            raise InputError(
                f"{path}: {missing:,} bytes are missing, and there is room for {free:,}. Free some space, or choose "
                "another disk"
            )
        with _progress(path.name, total, initial=part.tell()) as bar:
            for chunk in _chunks(response):
                part.write(chunk)
                bar.update(len(chunk))
        part.flush()
    if total is not None and part.tell() != total:
        raise _InterruptedError(f"the connection was cut after {part.tell():,} of {total:,} bytes")


class _RangeError(Exception):
    """The server has no bytes from there on; it says how many it has, or not (None)."""

    def __init__(self, total: int | None) -> None:
        super().__init__(total)
        self.total = total


def _open(url: str, headers: dict[str, str], path: Path) -> HTTPResponse:
    """Send a request, follow redirections, and sort what may go wrong."""
    # Redirections included, this opener knows HTTP and HTTPS only as far as `_check_address` lets them pass.
    opener = urllib.request.build_opener(_Redirections)
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        with error:
            if error.code == 416:
                total = error.headers.get("Content-Range", "").rpartition("/")[2]
                raise _RangeError(int(total) if re.fullmatch(r"\d{1,18}", total) else None) from error
            answer = f"the server answers {error.code} {error.reason}"
            if error.code in (408, 429) or error.code >= 500:
                raise _InterruptedError(answer) from error
            raise InputError(
                f"{url}: {answer}. Check the address, or get the file elsewhere and put it to {path}"
            ) from error
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise InputError(
                f"{url}: the server cannot prove who it is ({error.reason.verify_message}). Set the clock if it is "
                "wrong; if a proxy of your network signs in the server's place, SSL_CERT_FILE names its certificate"
            ) from error
        raise _InterruptedError(f"no connection ({error.reason})") from error
    except (OSError, HTTPException, UnicodeError) as error:  # UnicodeError: of a host's name
        raise _InterruptedError(f"no connection ({error or type(error).__name__})") from error


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The content as it comes."""
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, HTTPException) as error:
            raise _InterruptedError(f"the connection was cut ({error or type(error).__name__})") from error
        if not chunk:
            return
        yield chunk


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows redirections to addresses that `_check_address` accepts."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        _check_address(newurl, origin=req.full_url)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str, *, origin: str | None = None) -> None:
    """Refuse what is not HTTPS, or HTTP within this machine.

    Args:
        url: an address.
        origin: the one that redirects to it.

    Raises:
        InputError: `url` is of another kind, or leaves HTTPS.
    """
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    except ValueError:
        scheme, host = "", None
    is_local = scheme == "http" and host in ("127.0.0.1", "::1") and urlsplit(origin or "").scheme != "https"
    if not re.fullmatch("[!-~]+", url) or not (is_local or (scheme == "https" and host)):
        redirected = f"{origin}: redirects to " if origin else ""
        raise InputError(
            f"{redirected}{url!r}: only https:// addresses are downloaded, so that nobody on the way can change the "
            "file. Use another source, or get the file elsewhere and check it"
        )


def _version(headers: HTTPMessage) -> str | None:
    """What tells the versions of a file apart byte for byte: a strong ETag, or else the time of the last change."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified")


def _empty(part: IO[bytes]) -> None:
    if part.tell():
        part.truncate(0)
        part.seek(0)


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr)
