"""`dinat-triton convert`: a checkpoint of the family from any published layout to any other."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    from dinat_triton.models.checkpoints import LAYOUTS

    parser.add_argument("source", type=Path, help="file in any of the layouts; it says itself which")
    parser.add_argument("target", type=Path, help="a .safetensors, .pth, .pt or .bin file, or a folder for timm")
    parser.add_argument("--to", choices=LAYOUTS, default="timm", help="layout of the target (default: timm)")
    parser.add_argument("--model", help="of a folder for timm, as the weights do not tell dilations: dinat_mini, ...")
    layouts = "\n".join(f"  {name:13} {layout.summary}" for name, layout in LAYOUTS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"layouts:\n{layouts}"


def run(args: argparse.Namespace) -> int:
    from dinat_triton.models import checkpoints

    if args.source.resolve() == args.target.resolve():
        raise ValueError(f"the target would overwrite the source, {args.source}")
    checkpoint = checkpoints.to_native(checkpoints.read_state_dict(args.source))
    checkpoints.check_complete(checkpoint.tensors)
    if args.target.suffix:
        tensors, left_out = checkpoints.from_native(checkpoint.tensors, args.to)
        checkpoints.save_state_dict(tensors, args.target)
    else:
        _save_folder(args)
        tensors, left_out = checkpoint.tensors, []

    names = checkpoints.variants(checkpoint.tensors)
    print(f"{args.source}: {checkpoint.summary}, of {' or '.join(names) or 'an unpublished size'}")
    layout = checkpoints.layout_for(checkpoint.tensors, args.to)
    names_in = {ours: source.replace("self.qkv", "self.{query,key,value}") for source, ours in checkpoint.mapped}
    width = max(map(len, names_in.values()))
    for (_, ours), count in sorted(checkpoint.mapped.items()):
        kept = ours in layout.templates or (layout.classifier and ours.startswith("head."))
        print(f"  {count:4} x {names_in[ours]:{width}} -> {layout.name_of(ours) if kept else '(left out)'}")
    if checkpoint.left_out:
        parts = sorted({key.split(".")[0] for key in checkpoint.left_out})
        print(f"left out: {len(checkpoint.left_out)} tensors of the rest of a larger model, {', '.join(parts)}")
    if left_out:
        print(f"left out: {', '.join(left_out)}, which layout {args.to!r} has no place for")
    print(f"{args.target}: {len(tensors)} tensors in layout {args.to!r}")
    return 0


def _save_folder(args: argparse.Namespace) -> None:
    """Writes weights and configuration as `timm.create_model("local-dir:...")` reads them."""
    import timm

    from dinat_triton.models import checkpoints

    if args.to != "timm" or args.model is None:
        raise ValueError(
            f"{args.target} has no file ending, so it would be a folder for timm: pass --model and --to timm"
        )
    model = timm.create_model(args.model)
    checkpoints.load_checkpoint(model, args.source)
    timm.models.save_for_hf(model, str(args.target), safe_serialization=True)
