"""`dinat-triton bench`: what takes how long, side by side with what others offer. One subject per question."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from dinat_triton.commands.options import add_out, check_positive
from dinat_triton.files import FIGURES, check_target

# Module and summary. (A module named profile would hide Python's own from scripts in its folder.)
SUBJECTS = {
    "layers": ("layers", "attention layers against their peers"),
    "cpu": ("layers", "all layers of dinat_mini at 224 and 384 on this CPU, forward and backward"),
    "models": ("models", "whole models against timm's of the same size: inference, training step, memory"),
    "overhead": ("overhead", "microseconds of Python per call, before anything is launched"),
    "training": ("training", "a step of `dinat-triton train` against the bare step"),
    "profile": ("profiling", "where a model's step spends its time"),
}
# Answers that a subject assumes where nothing else is said.
PRESETS = {"cpu": {"layers": ["dinat_mini@224", "dinat_mini@384"], "device": "cpu", "backward": True}}
ALIASES = {"layers": ["ops"]}
READERS = {
    "compare": "one result file against another",
    "report": "result files as tables",
}
EXIT_CODES = """exit codes: 0 all is well; 1 something is slower (compare), or an implementation of ours failed;
2 wrong use, such as an unknown name, no GPU where one was asked for, or a file of another schema"""


class SubjectParser(argparse.ArgumentParser):
    """Imports its module only when it is the one that was called for."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        name = self.prog.rpartition(" ")[2]
        if name == "report":
            self.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="result files")
            add_out(self, "draw a file of roofline or bench profile, as .png, .svg or .pdf")
            self.set_defaults(run_subject=report)
        elif name == "compare":
            from dinat_triton.bench import compare

            compare.configure(self)
            self.set_defaults(run_subject=compare.run)
        else:
            subject = import_module(f"dinat_triton.bench.{SUBJECTS[name][0]}")
            subject.configure(self)
            self.set_defaults(**PRESETS.get(name, {}))
            self.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
            add_out(self, "keep the results, as .json")
            self.set_defaults(run_subject=measure, subject=subject)
        return super().parse_known_args(args, namespace)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXIT_CODES
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True, parser_class=SubjectParser)
    for name, summary in ({name: summary for name, (_, summary) in SUBJECTS.items()} | READERS).items():
        subjects.add_parser(
            name, aliases=ALIASES.get(name, []), help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    return args.run_subject(args)


def measure(args: argparse.Namespace) -> int:
    """Measures, reports and keeps. Returns 1 if an implementation of ours failed."""
    from dinat_triton.bench import harness

    check_positive(args, "threads")
    if args.out is not None:
        check_target(args.out, endings=[".json"], force=args.force)
    harness.prepare_process(args.threads)
    results = args.subject.run(args)
    print(args.subject.report(results))
    if args.out is not None:
        results.save(args.out)
        print(f"\nwrote {args.out}")
    failed = [record for record in results.records if record.failed]
    for record in failed:
        print(f"FAILED {record.title}, {record.implementation}: {record.reason}")
    return int(bool(failed))


def report(args: argparse.Namespace) -> int:
    """Tables of what files hold, and a figure."""
    from dinat_triton.bench.harness import Results

    if args.out is not None:
        check_target(args.out, endings=FIGURES, force=args.force)
    if args.out and len(args.files) > 1:
        raise ValueError(f"--out draws one file, got {len(args.files)}")
    for path in args.files:
        results = Results.load(path)
        modules = {name: module for name, (module, _) in SUBJECTS.items()} | {"roofline": "roofline"}
        if results.bench not in modules:
            raise ValueError(f"{path} must be of {', '.join(modules)}, got {results.bench!r}")
        environment = results.environment
        print(f"{path}: {results.bench} on {environment['device']}, {environment['date']}\n")
        print(import_module(f"dinat_triton.bench.{modules[results.bench]}").report(results) + "\n")
        if args.out is not None:
            from dinat_triton import plots
            from dinat_triton.bench import figures

            plots.save(figures.draw(results), args.out)
            print(f"wrote {args.out}")
    return 0
