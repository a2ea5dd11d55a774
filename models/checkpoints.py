"""Checkpoint files: read without trust, made to fit a model, loaded whole or not at all, and written."""

from __future__ import annotations

import argparse
import logging
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from dinat_triton.files import replacing
from dinat_triton.models.layouts import StateDict, find_model, some, translate
from dinat_triton.models.variants import VARIANTS
from dinat_triton.words import counted

_logger = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Far above what anybody trains, and still quick to refuse.
MAX_TENSORS, MAX_BLOCKS = 50_000, 500


@dataclass
class Checkpoint:
    """A checkpoint in our layout, and what was done to get there.

    Attributes:
        layout: What the file was, a key of `LAYOUTS`.
        summary: The same in words.
        tensors: In our layout.
        mapped: How often each of the file's templates became which of ours.
        left_out: Keys of the larger model that the file's prefix says it is a part of.
    """

    layout: str
    summary: str
    tensors: StateDict
    mapped: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a file in any known layout."""
    return to_native(read_file(path))


def read_file(path: str | Path) -> Mapping[str, Any]:
    """Reads what a file holds, safetensors or torch's, without running anything of it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint file: {path}")
    try:
        is_bomb = zipfile.is_zipfile(path) and _unpacked(path) > path.stat().st_size
        if not is_bomb:
            return _load(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"cannot read {path}: it is truncated, no checkpoint, or holds Python objects besides tensors. "
            f"Fetch it again, or re-save nothing but its state dict where you trust it"
        ) from error
    raise ValueError(f"{path} unpacks to more bytes than it has, which files of torch never do")


def _load(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() == ".safetensors":
        return load_file(path)
    # timm's training checkpoints hold their arguments in a Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unpacked(path: Path) -> int:
    """Bytes of everything that an archive holds."""
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def to_native(state_dict: Mapping[str, Any]) -> Checkpoint:
    """Translates what a file holds to our layout, or says what it does not understand."""
    found = find_model(_unwrap(state_dict))
    _check_tensors(found.tensors)
    tensors, mapped = translate(found)
    return Checkpoint(found.name, found.layout.summary, tensors, mapped, found.left_out)


def _unwrap(state_dict: Mapping[str, Any]) -> StateDict:
    """The tensors inside a training checkpoint, without the prefixes of wrappers."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"not a state dict: it is a {type(state_dict).__name__}")
    for key in _WRAPPERS:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    strangers = [
        str(key) for key, value in state_dict.items() if not isinstance(key, str) or not torch.is_tensor(value)
    ]
    if strangers or not state_dict:
        raise ValueError(f"not a state dict: it holds {some(strangers) if strangers else 'nothing'}")
    if len(state_dict) > MAX_TENSORS:
        raise ValueError(f"not a NAT or DiNAT checkpoint: it holds {len(state_dict)} tensors")
    tensors: StateDict = {}
    for key, tensor in state_dict.items():
        name = re.sub(r"^((module|_orig_mod)\.)+", "", key)
        if name in tensors:
            raise ValueError(f"checkpoint has two tensors for {some([name])}, one of them under {some([key])}")
        tensors[name] = tensor
    return tensors


def _check_tensors(tensors: StateDict) -> None:
    """Refuses what no weights are, and what would take more memory than the file that it came from."""
    for key, tensor in tensors.items():
        problem = None
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
            problem = "is no dense tensor"
        elif tensor.dtype not in _DTYPES:
            problem = f"is of {tensor.dtype}, not of floating numbers"
        elif tensor.numel() == 0 or tensor.ndim == 0:
            problem = f"has shape {tuple(tensor.shape)}"
        if problem:
            raise ValueError(f"checkpoint cannot be used: its {some([key])} {problem}")
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(tensor.nbytes for tensor in tensors.values()) > stored:
        raise ValueError("checkpoint cannot be used: its tensors share memory")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"checkpoint cannot be used: its {some([key])} holds NaN or infinity")


def model_args(tensors: StateDict) -> dict[str, Any]:
    """The arguments of a `DiNAT` that has tensors of these shapes. They say nothing of dilations."""
    depths = _depths(tensors)
    firsts = [f"levels.{i}.blocks.0." for i in range(len(depths))]
    rpbs = [_shape(tensors, f"{first}attn.rpb", 3) for first in firsts]
    stem = [key for key in tensors if re.fullmatch(r"patch_embed\.proj(\.\d+)?\.weight", key)]
    hidden, dim = _shape(tensors, f"{firsts[0]}mlp.fc1.weight", 2)
    _, in_chans, _, patch_size = _shape(tensors, stem[0] if stem else "patch_embed.proj.weight", 4)
    return dict(
        patch_size=patch_size if stem == ["patch_embed.proj.weight"] else 2 ** min(len(stem), 5),
        in_chans=in_chans,
        num_classes=_shape(tensors, "head.fc.weight", 2)[0] if "head.fc.weight" in tensors else 0,
        embed_dim=[_shape(tensors, f"{first}norm1.weight", 1)[0] for first in firsts],
        depths=depths,
        num_heads=[heads for heads, *_ in rpbs],
        kernel_size=(rpbs[0][-1] + 1) // 2,
        mlp_ratio=hidden / dim,
        qkv_bias=f"{firsts[0]}attn.qkv.bias" in tensors,
        layer_scale=1e-5 if any(".ls1." in key for key in tensors) else None,
        feature_norms=any(key.startswith("feature_norms.") for key in tensors),
    )


def _depths(tensors: StateDict) -> list[int]:
    """Blocks of each level, which are numbered without a gap."""
    blocks: dict[int, set[int]] = defaultdict(set)
    for key in tensors:
        if match := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.attn\.rpb", key):
            blocks[int(match[1])].add(int(match[2]))
    if not blocks:
        raise ValueError("checkpoint has no relative positional bias: it is not of a NAT or DiNAT")
    count = sum(map(len, blocks.values()))
    if count > MAX_BLOCKS:
        raise ValueError(f"checkpoint has {count} blocks, and no model of more than {MAX_BLOCKS} is known")
    for i in range(len(blocks)):
        for j in range(max(1, len(blocks[i]))):
            if j not in blocks[i]:
                raise ValueError(f"checkpoint is incomplete, it lacks levels.{i}.blocks.{j}.attn.rpb")
    return [len(blocks[i]) for i in range(len(blocks))]


def _shape(tensors: StateDict, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there with so many axes."""
    if key not in tensors:
        raise ValueError(f"checkpoint is incomplete, it lacks {key}")
    if tensors[key].ndim != ndim:
        raise ValueError(f"checkpoint is inconsistent: {key} must have {ndim} axes, got {tuple(tensors[key].shape)}")
    return tuple(tensors[key].shape)


def check_complete(tensors: StateDict) -> dict[str, Any]:
    """Checks tensors in our layout against the model that they describe.

    Returns:
        That model's arguments.
    """
    from dinat_triton.models.dinat import ConvDownsampler, ConvTokenizer, DiNAT
    from dinat_triton.models.dinat_s import PatchMerging, PatchTokenizer

    args = model_args(tensors)
    is_conv = "patch_embed.proj.0.weight" in tensors
    layers = (ConvTokenizer, ConvDownsampler) if is_conv else (PatchTokenizer, PatchMerging)
    try:
        model = DiNAT(**args, embed_layer=layers[0], downsample_layer=layers[1], device="meta")
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"checkpoint is inconsistent: {error}") from error
    wanted = model.state_dict()
    tensors = dict(tensors)
    _fit_feature_norms(tensors, wanted)
    problems = _differences(tensors, wanted)
    if problems:
        raise ValueError(f"checkpoint is incomplete or inconsistent: {problems}")
    return args


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Turns a checkpoint in any known layout into one that fits the model, or says why it cannot.

    Biases of another kernel size are resampled. A first convolution of other channels is left to timm, which adapts it,
    and so is the choice of classes: a model created with another number of them than its configuration declares starts
    a new classifier.
    """
    tensors = to_native(state_dict).tensors
    classes = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    fit(tensors, model, new_classifier=classes is not None and classes != getattr(model, "num_classes", classes))
    return tensors


def fit(tensors: StateDict, model: nn.Module, new_classifier: bool = False) -> None:
    """Makes tensors in our layout fit the model, in place; all but the channels of the first convolution.

    Args:
        tensors: Of the checkpoint.
        model: What they are for.
        new_classifier: Whether the model's own stays where that of the checkpoint does not fit.
    """
    wanted = model.state_dict()
    if not any(key.endswith(".attn.rpb") for key in wanted):
        raise ValueError(f"model must be a NAT or DiNAT, got a {type(model).__name__}")
    _fit_biases(tensors, wanted)
    _fit_feature_norms(tensors, wanted)
    _fit_classifier(tensors, wanted, new_classifier)
    stem = next(key for key in tensors if key.startswith("patch_embed.proj") and key.endswith("weight"))
    problems = _differences(tensors, wanted, ignore={stem} if _is_adaptable(tensors[stem], wanted.get(stem)) else ())
    if problems:
        raise ValueError(
            f"checkpoint of {_describe(tensors)} does not fit this model, {_describe(wanted)}: {problems}. "
            f"Create the model that the checkpoint is of, or choose another checkpoint"
        )


def _is_adaptable(weight: Tensor, wanted: Tensor | None) -> bool:
    """Whether a first convolution, for images of three channels, becomes one for others."""
    if wanted is None or weight.ndim != 4 or weight.shape[1] != 3:
        return False
    return weight.shape[0] == wanted.shape[0] and weight.shape[2:] == wanted.shape[2:]


def _fit_biases(tensors: StateDict, wanted: Mapping[str, Tensor]) -> None:
    """Resamples biases of another kernel size bicubically, as the authors do."""
    for key, rpb in tensors.items():
        target = wanted.get(key)
        if target is None or not key.endswith(".rpb") or rpb.ndim != 3 or len(target) != len(rpb):
            continue
        if target.shape != rpb.shape:
            size = tuple(target.shape[1:])
            resampled = nn.functional.interpolate(rpb[None].float(), size=size, mode="bicubic", align_corners=False)
            tensors[key] = resampled[0].to(rpb.dtype)
            _logger.info(f"Resampled {key} from {tuple(rpb.shape[1:])} to {size}.")


def _fit_feature_norms(tensors: StateDict, wanted: Mapping[str, Tensor]) -> None:
    """Leaves out norms that the model has no place for, and keeps the model's where the checkpoint has none.

    A backbone has the norms of those levels only that its detector or segmenter reads.
    """
    optional = {key for key in wanted if key.startswith("feature_norms.")}
    if any(key.startswith("feature_norms.") for key in tensors):
        optional |= {"norm.weight", "norm.bias"}
    for key in [key for key in tensors if key.startswith("feature_norms.") and key not in wanted]:
        del tensors[key]
        _logger.info(f"Left out {key}: the model has no such norm.")
    for key in optional - set(tensors):
        tensors[key] = wanted[key]
        _logger.info(f"Kept the initial {key}: the checkpoint has none.")


def _fit_classifier(tensors: StateDict, wanted: Mapping[str, Tensor], new: bool) -> None:
    """Leaves out a classifier that the model does not want, or says how to get one that fits."""
    classes = len(tensors["head.fc.weight"]) if "head.fc.weight" in tensors else 0
    expected = len(wanted["head.fc.weight"]) if "head.fc.weight" in wanted else 0
    if classes == expected:
        return
    if expected and not new:
        has = f"a classifier of {counted(classes, 'class')}" if classes else "no classifier"
        raise ValueError(
            f"checkpoint has {has}, the model one of {expected}. Create the model with num_classes={classes}, and with "
            f"pretrained_cfg_overlay=dict(num_classes={classes}, ...) where it is created with pretrained=True"
        )
    for key in ("head.fc.weight", "head.fc.bias"):
        tensors.pop(key, None)
        if expected:
            tensors[key] = wanted[key]
    _logger.info(f"Left out the checkpoint's classifier of {counted(classes, 'class')}.")


def _differences(tensors: StateDict, wanted: Mapping[str, Tensor], ignore: Iterable[str] = ()) -> str:
    """Lists what is missing, unknown or of another shape; nothing if all fits."""
    shapes = [
        f"{key} {tuple(tensors[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in tensors
        if key in wanted and key not in ignore and tensors[key].shape != wanted[key].shape
    ]
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in wanted]
    lists = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return "; ".join(f"{len(keys)} {what}: {some(keys)}" for what, keys in lists if keys)


def _describe(tensors: Mapping[str, Tensor]) -> str:
    args = model_args(dict(tensors))
    scale = "with" if args["layer_scale"] else "without"
    return (
        f"{' or '.join(variants(dict(tensors))) or 'an unpublished size'} (embed_dim {args['embed_dim'][0]}, depths "
        f"{','.join(map(str, args['depths']))}, kernel {args['kernel_size']}, {scale} layer scale)"
    )


def variants(tensors: StateDict) -> list[str]:
    """The registered models of these shapes. Dilations leave no trace in a checkpoint, so NAT and DiNAT look alike."""
    args = model_args(tensors)
    size = (args["embed_dim"][0], args["depths"], args["kernel_size"], args["layer_scale"] is not None)
    return [name for name, variant in VARIANTS.items() if size == _size(variant.args)]


def _size(args: Mapping[str, Any]) -> tuple[int, list[int], int, bool]:
    """Sizes that tell a variant's checkpoint from others."""
    depths = args.get("depths") or [1] * args["depth"]
    return args["embed_dim"], list(depths), args.get("kernel_size", 7), "layer_scale" in args


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint, new_classifier: bool = False) -> None:
    """Loads a checkpoint whole or not at all. Channels of the image are adapted.

    Args:
        model: Of the family.
        checkpoint: What `read_checkpoint` returns.
        new_classifier: Whether the model keeps its own classifier where that of the checkpoint has other classes.
    """
    tensors = dict(checkpoint.tensors)
    fit(tensors, model, new_classifier)
    wanted = model.state_dict()
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:  # `fit` lets pass no other than the first convolution
            tensors[key] = adapt_input_conv(wanted[key].shape[1], tensor)
    model.load_state_dict(tensors)


def save_state_dict(tensors: StateDict, path: str | Path) -> None:
    """Writes a .safetensors or torch file, by the name's ending; one that is there already is replaced at the end."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise ValueError(f"file must end in .safetensors, .pth, .pt or .bin, got {str(path)!r}")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with replacing(path) as beside:
        try:
            if kind == ".safetensors":
                save_file(tensors, beside, metadata={"format": "pt"})
            else:
                torch.save(tensors, beside)
        except (SafetensorError, RuntimeError) as error:  # how these two report a full disk
            raise OSError(error) from error
