"""`dinat-triton explore`: a local page to play with windows, plans and receptive fields."""

from __future__ import annotations

import argparse
import webbrowser


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=8765, help="on 127.0.0.1; 0 takes a free one (default: 8765)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")


def run(args: argparse.Namespace) -> int:
    from dinat_triton.explore.server import Server

    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be between 0 and 65535, got {args.port}")
    try:
        server = Server(args.port)
    except OSError as error:
        raise OSError(f"port {args.port} cannot be used ({error.strerror}); --port 0 takes a free one") from error
    with server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        if not args.no_browser:
            webbrowser.open(server.url)
        server.serve_forever()
    return 0
