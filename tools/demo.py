"""Try a detector in the browser: drop an image, move the threshold, see boxes, download JSON.

    python tools/demo.py --checkpoint K [--config C] [--host 127.0.0.1] [--port 8000] [--max-mb 50] [key=value ...]

Serves a page to this machine only; images are not stored and go nowhere else. The config is the one in the checkpoint
unless one is given. --port 0 takes any free port. With --host 0.0.0.0 everybody who reaches this machine can use it:
there is no password and no encryption. Needs starlette and uvicorn: pip install -e ".[demo]".
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from fpn_det.cli import count, say, user_errors
from fpn_det.detector import Detector
from fpn_det.extras import require
from fpn_det.structures import InputError, printable

LOCAL = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights to use")
    parser.add_argument("--config", type=Path, help="YAML file (default: the config in the checkpoint)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument("--max-mb", type=count, default=50, help="largest file to accept, in MiB")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the config")
    args = parser.parse_intermixed_args()
    with user_errors():
        for module in ("starlette", "uvicorn"):
            require(module, extra="demo", purpose="The demo page")
        detector = Detector.load(args.checkpoint, config=args.config, overrides=args.overrides)
        serve(detector, args.checkpoint, host=args.host, port=args.port, max_bytes=args.max_mb * 2**20)


def serve(detector: Detector, checkpoint: Path, *, host: str, port: int, max_bytes: int) -> None:
    """Serve until a signal ends it."""
    import uvicorn

    from fpn_det.demo.app import make_app

    listener = listen(host, port)
    port = listener.getsockname()[1]
    is_local = host in LOCAL
    app = make_app(
        detector,
        title=printable(f"{checkpoint.parent.name}/{checkpoint.name}"),
        max_bytes=max_bytes,
        hosts=LOCAL if is_local else ["*"],
    )
    shown = f"[{host}]" if ":" in host else host
    say(f"demo: http://{shown}:{port} (Ctrl-C ends it)")
    if not is_local:
        say(f"warning: whoever reaches {host}:{port} can use it; there is no password", file=sys.stderr)
    sys.stdout.flush()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", limit_concurrency=32, timeout_keep_alive=5))
    server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address or the port cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, None)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"cannot listen on {host}:{port} ({reason}); choose another --port or --host") from error


if __name__ == "__main__":
    main()
