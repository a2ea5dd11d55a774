"""`dinat-triton export`: a model as a file for ONNX Runtime, OpenVINO, AOTInductor, libtorch or torch.export."""

from __future__ import annotations

import argparse
from pathlib import Path

from dinat_triton.commands.classify import class_names
from dinat_triton.commands.inputs import HUB, add_weights, build
from dinat_triton.commands.options import add_force

DTYPES = ("float32", "bfloat16", "float16", "int8")


def configure(parser: argparse.ArgumentParser) -> None:
    from dinat_triton.export import FORMATS

    parser.add_argument("model", help="any registered model: dinat_mini, ...")
    add_weights(parser, HUB)
    parser.add_argument("--to", choices=FORMATS, required=True, help="format of the file")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True,
                        help="file; with several sizes each is in its file's name")  # fmt: skip
    parser.add_argument("--size", nargs=2, type=int, action="append", default=[], metavar=("HEIGHT", "WIDTH"),
                        help="of the images (default: the model's); again for further files")  # fmt: skip
    parser.add_argument("--batch", type=batch, metavar="N", help="images at once, or dynamic: any number (default)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0],
                        help="to compute in; int8 is for onnx (default: float32)")  # fmt: skip
    add_force(parser)


def batch(text: str) -> int | None:
    """A number of images, or None for any."""
    return None if text == "dynamic" else int(text)


def run(args: argparse.Namespace) -> int:
    import torch

    from dinat_triton.export import export, format_of

    format_of(args.to)
    if len(args.size) < 2:
        paths = [args.out]
    else:
        paths = [args.out.with_stem(f"{args.out.stem}-{height}x{width}") for height, width in args.size]
    model, origin = build(args.model, args.weights)
    names = class_names(model.num_classes) if model.num_classes else None
    print(f"{args.model} with {origin}")
    for path, size in zip(paths, args.size or [None], strict=True):
        found = export(
            model, path, args.to, size=size, batch=args.batch, dtype=getattr(torch, args.dtype), class_names=names,
            force=args.force,
        )  # fmt: skip
        print(
            f"wrote {path}: at most {found.difference:.1e} from the model's output, which is up to {found.largest:.3g}"
        )
    return 0
