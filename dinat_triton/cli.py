"""The `dinat-triton` command."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from dinat_triton.version import __version__

# Imported only when called for, so that `--help` answers at once.
COMMANDS = {
    "bench": "time ops, models and whole steps side by side with their peers",
    "classify": "name what images show",
    "convert": "turn a checkpoint from any published layout into any other",
    "demo": "check and time every backend that runs here",
    "export": "write a model to a file for ONNX Runtime, OpenVINO, AOTInductor or libtorch",
    "explore": "play with windows, plans and receptive fields in the browser",
    "inspect": "compile the Triton kernels for any GPU, without one, and judge them",
    "models": "list the published models and their weights",
    "plot": "draw neighborhoods, receptive fields, plans and attention",
    "roofline": "draw every layer against what the machine allows",
    "run": "run a script that has the models in timm, transformers' DiNAT repaired and, if asked for, our natten",
    "train": "train or fine-tune a model on images, on any number of devices",
    "tune": "search the fastest tiles and launch options for this machine",
    "validate": "measure the accuracy of a model on labelled images",
}

# Those that run for hours and need neither torch nor timm, which take most of a gigabyte.
LIGHT = {"explore"}


def main(argv: list[str] | None = None) -> int:
    """Runs a command: the process's own without `argv`.

    Returns:
        Its exit code.
    """
    if argv is None and LIGHT.intersection(sys.argv[1:2]) and "torch" in sys.modules and os.name == "posix":
        os.execv(sys.executable, [sys.executable, "-P", str(Path(__file__).with_name("light.py")), *sys.argv[1:]])
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough: nothing more is written, not at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"dinat-triton {args.command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads a command line; `run` is the command."""
    parser = argparse.ArgumentParser(
        prog="dinat-triton", description="Dilated neighborhood attention without a CUDA build."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((a for a in argv if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == named:
            command = import_module(f"dinat_triton.commands.{name}")
            command.configure(subparser)
            subparser.set_defaults(run=command.run)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
