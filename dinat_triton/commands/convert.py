"""`dinat-triton convert`: a checkpoint of the family from any published layout to any other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dinat_triton.commands.options import add_force
from dinat_triton.files import check_target, replacing

if TYPE_CHECKING:
    from dinat_triton.models.checkpoints import Checkpoint


def configure(parser: argparse.ArgumentParser) -> None:
    from dinat_triton.models.layouts import LAYOUTS

    parser.add_argument("source", type=Path, help="file in any of the layouts; it says itself which")
    parser.add_argument("target", type=Path, help="a .safetensors, .pth, .pt or .bin file, or a folder for timm")
    parser.add_argument("--to", choices=LAYOUTS, default="timm", help="layout of the target (default: timm)")
    parser.add_argument("--model", help="of a folder for timm, as the weights do not tell dilations: dinat_mini, ...")
    add_force(parser)
    layouts = "\n".join(f"  {name:13} {layout.summary}" for name, layout in LAYOUTS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"layouts:\n{layouts}"


def run(args: argparse.Namespace) -> int:
    from dinat_triton.models import checkpoints, layouts

    is_folder = args.target.is_dir() or not args.target.suffix
    if is_folder:
        _check_folder(args)
    else:
        check_target(args.target, endings=checkpoints.ENDINGS, force=args.force, source=args.source)
    checkpoint = checkpoints.read_checkpoint(args.source)
    checkpoints.check_complete(checkpoint.tensors)
    tensors, left_out = layouts.from_native(checkpoint.tensors, args.to)
    if is_folder:
        _save_folder(checkpoint, args.model, args.target)
    else:
        checkpoints.save_state_dict(tensors, args.target)
    _report(args, checkpoint, left_out)
    print(f"wrote {args.target}: {len(tensors)} tensors in layout {args.to!r}")
    return 0


def _report(args: argparse.Namespace, checkpoint: Checkpoint, left_out: list[str]) -> None:
    """Prints what the source is, and what became of its tensors."""
    from dinat_triton.models import checkpoints, layouts

    names = checkpoints.variants(checkpoint.tensors)
    print(f"{args.source}: {checkpoint.summary}, of {' or '.join(names) or 'an unpublished size'}")
    layout = layouts.layout_for(checkpoint.tensors, args.to)
    names_in = {ours: source.replace("self.qkv", "self.{query,key,value}") for source, ours in checkpoint.mapped}
    width = max(map(len, names_in.values()))
    for (_, ours), count in sorted(checkpoint.mapped.items()):
        kept = ours in layout.templates or (layout.classifier and ours.startswith("head."))
        print(f"  {count:4} x {names_in[ours]:{width}} -> {layout.name_of(ours) if kept else '(left out)'}")
    if checkpoint.left_out:
        parts = sorted({key.split(".")[0] for key in checkpoint.left_out})
        shown = layouts.some(parts, most=20)
        print(f"left out: {len(checkpoint.left_out)} tensors of the rest of a larger model, {shown}")
    if left_out:
        print(f"left out: {', '.join(left_out)}, which layout {args.to!r} has no place for")


def _files(folder: Path) -> tuple[Path, Path]:
    """Weights and configuration, as `timm.create_model("local-dir:...")` reads them."""
    return folder / "model.safetensors", folder / "config.json"


def _check_folder(args: argparse.Namespace) -> None:
    import timm

    if args.to != "timm" or args.model is None:
        raise ValueError(
            f"{args.target} has no file ending, so it would be a folder for timm: pass --model and --to timm"
        )
    if not timm.is_model(args.model):
        raise ValueError(f"--model must be a model of timm, got {args.model!r}")
    for path in _files(args.target):
        check_target(path, force=args.force, source=args.source, folder=True)


def _save_folder(checkpoint: Checkpoint, model_name: str, folder: Path) -> None:
    import timm
    from timm.models._hub import save_config_for_hf

    from dinat_triton.models import checkpoints

    classes = checkpoints.model_args(checkpoint.tensors)["num_classes"]
    model = timm.create_model(model_name, num_classes=classes)
    checkpoints.load_checkpoint(model, checkpoint)
    weights, config = _files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.save_state_dict(model.state_dict(), weights)
    with replacing(config) as beside:
        save_config_for_hf(model, str(beside))
