"""`dinat-triton run`: a script with the models in timm, transformers repaired and, if asked for, our `natten`."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from pathlib import Path

STARTUP = Path(__file__).parents[1] / "startup"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--natten", action="store_true", help="make `import natten` this package")
    parser.add_argument("--natten-version", metavar="VERSION", help="of NATTEN, from 0.14 to 0.21; with --natten")
    parser.add_argument("--no-scores", action="store_true", help="leave out na2d_qk and its like; with --natten")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")


def run(args: argparse.Namespace) -> int:
    if not Path(args.script).is_file():
        raise ValueError(f"SCRIPT must be a Python file, got {args.script!r}")
    if not args.natten and (args.natten_version or args.no_scores):
        raise ValueError("--natten-version and --no-scores need --natten")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])])
    runpy.run_path(str(STARTUP / "sitecustomize.py"))  # this process started without it
    sys.argv = [args.script, *args.arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(args.script).absolute().parent)  # as Python itself has it for a script
    if args.natten:
        from dinat_triton.integrations.natten import install

        install(args.natten_version, scores=not args.no_scores)
    try:
        runpy.run_path(args.script, run_name="__main__")
    except Exception:  # it is the script's own, so the command line must not shorten it
        traceback.print_exc()
        return 1
    return 0
