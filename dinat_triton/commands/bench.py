"""`dinat-triton bench`: what takes how long, side by side with what others offer. One subject per question."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

# Module and summary. (A module named profile would hide Python's own from scripts in its folder.)
SUBJECTS = {
    "ops": ("ops", "attention layers against their peers"),
    "models": ("models", "whole models against timm's of the same size: inference, training step, memory"),
    "cpu": ("cpu", "every layer of DiNAT-Mini on the CPU, with peak memory and targets"),
    "overhead": ("overhead", "microseconds of Python per call, before anything is launched"),
    "first-call": ("first_call", "what the first call of a layer takes, compilation included"),
    "profile": ("profiling", "where a model's step spends its time"),
    "scaling": ("scaling", "cost against image size, kernel, dilation and batch, on paper"),
    "compare": ("compare", "one result file against another"),
}
EXIT_CODES = """exit codes: 0 all is well; 1 something is slower (--compare), or failed, or was missed under --strict;
2 wrong use, such as an unknown name, no GPU where one was asked for, or a file of another schema"""


class SubjectParser(argparse.ArgumentParser):
    """Imports its module only when it is the one that was called for."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        module = import_module(f"dinat_triton.bench.{SUBJECTS[self.prog.rpartition(' ')[2]][0]}")
        module.configure(self)
        self.set_defaults(run_subject=module.run)
        return super().parse_known_args(args, namespace)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXIT_CODES
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True, parser_class=SubjectParser)
    for name, (_, summary) in SUBJECTS.items():
        subjects.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    return args.run_subject(args)
