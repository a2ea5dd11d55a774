"""Checkpoints of the family: every published layout, to and from the one our models have.

`LAYOUTS` holds, per layout, what each of our keys is called there. Translating a key either way is matching a template
and filling in the other, so a key that no template matches is an unknown one, and both directions come from one table.
Layouts that split what we keep in one tensor (query, key, value) or stack what we keep apart (the two layer scales) are
brought to one tensor per template first.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

# Our name, the authors' and transformers' of what a block holds.
_BLOCK = (
    ("norm1.{p}", "norm1.{p}", "layernorm_before.{p}"),
    ("norm2.{p}", "norm2.{p}", "layernorm_after.{p}"),
    ("attn.qkv.{p}", "attn.qkv.{p}", "attention.self.qkv.{p}"),
    ("attn.rpb", "attn.rpb", "attention.self.rpb"),
    ("attn.proj.{p}", "attn.proj.{p}", "attention.output.dense.{p}"),
    ("mlp.fc1.{p}", "mlp.fc1.{p}", "intermediate.dense.{p}"),
    ("mlp.fc2.{p}", "mlp.fc2.{p}", "output.dense.{p}"),
    ("ls1.gamma", "gamma1", "layer_scale_parameters.0"),
    ("ls2.gamma", "gamma2", "layer_scale_parameters.1"),
)
# What stands in for a field of a template. {h} is {i} + 1: our levels downsample first, the others' last.
_FIELDS = {"p": "weight|bias", "d": r"norm\.weight|norm\.bias|reduction\.weight"} | dict.fromkeys("ijnh", r"\d+")


def _templates(block: str, level: str, column: int) -> dict[str, str]:
    """Our templates and those of a layout whose blocks and levels are called so."""
    return {f"levels.{{i}}.blocks.{{j}}.{names[0]}": f"{block}.{names[column]}" for names in _BLOCK} | {
        "levels.{h}.downsample.{d}": f"{level}.downsample.{{d}}"
    }


_AUTHORS = {
    name: name for name in ("patch_embed.proj.{n}.{p}", "patch_embed.proj.{p}", "patch_embed.norm.{p}", "norm.{p}")
} | {"head.fc.{p}": "head.{p}", "feature_norms.{i}.{p}": "norm{i}.{p}"}
_TRANSFORMERS = {
    "patch_embed.proj.{n}.{p}": "embeddings.patch_embeddings.projection.{n}.{p}",
    "patch_embed.norm.{p}": "embeddings.norm.{p}",
    "norm.{p}": "layernorm.{p}",
    "feature_norms.{i}.{p}": "hidden_states_norms.stage{h}.{p}",
} | _templates("encoder.levels.{i}.layers.{j}", "encoder.levels.{i}", 2)


@dataclass(frozen=True)
class Layout:
    """How a kind of file names things.

    Attributes:
        summary: What the file is.
        templates: Our template to the layout's, without the prefix.
        prefix: In front of every key but the classifier's.
        classifier: Of the classifier's keys, which have no prefix; None where there is no classifier.
        is_backbone: Whether all levels have a norm, and there is no classifier.
    """

    summary: str
    templates: Mapping[str, str]
    prefix: str = ""
    classifier: str | None = None
    is_backbone: bool = False

    def name_of(self, ours: str) -> str:
        """What one of our templates is called in the file, for people to read."""
        if self.classifier and ours.startswith("head.fc."):
            return ours.replace("head.fc", self.classifier)
        return self.prefix + self.templates[ours].replace("self.qkv", "self.{query,key,value}")


_OURS = {ours: ours for ours in (*_AUTHORS, *_templates("", "", 0))}
_HIERARCHICAL = _AUTHORS | _templates("levels.{i}.blocks.{j}", "levels.{i}", 1)
LAYOUTS = {
    "timm": Layout("this package's models", _OURS),
    "original": Layout("the authors' files", _HIERARCHICAL),
    "detection": Layout("backbone of a detector or segmenter", _HIERARCHICAL, "backbone.", is_backbone=True),
    "transformers": Layout("DinatForImageClassification", _TRANSFORMERS, "dinat.", "classifier"),
    "nat": Layout("NatForImageClassification, of older transformers", _TRANSFORMERS, "nat.", "classifier"),
    "backbone": Layout("DinatBackbone", _TRANSFORMERS, is_backbone=True),
    "oneformer": Layout("backbone of OneFormer", _TRANSFORMERS, "model.pixel_level_module.encoder.", is_backbone=True),
}
# The authors' files of DiNAT_s and of the isotropic models: other names, and only ever these.
_DINAT_S = Layout("the authors' DiNAT_s", _AUTHORS | _templates("layers.{i}.blocks.{j}", "layers.{i}", 1))
_ISOTROPIC = Layout(
    "the authors' isotropic models",
    {
        ours.replace("{j}", "0"): theirs
        for ours, theirs in (_AUTHORS | _templates("layers.{i}", "layers.{i}", 1)).items()
    },
)

_ANCHORS = re.compile(r"(patch_embed\.proj|embeddings\.patch_embeddings\.projection)(\.\d+)?\.weight$")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


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


def read_state_dict(path: str | Path) -> StateDict:
    """Reads a file of tensors, safetensors or torch's, without running anything that it holds."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint file: {path}")
    try:
        return load_state_dict(str(path))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot read {path}: {reason}\nIt is truncated, no checkpoint, or holds Python objects besides tensors. "
            f"Fetch it again, or re-save nothing but its state dict where you trust it."
        ) from error


def to_native(state_dict: Mapping[str, Any]) -> Checkpoint:
    """Translates a state dict in any known layout to ours, or says what it does not understand."""
    tensors = _unwrap(state_dict)
    anchor = next((m for m in map(_ANCHORS.search, tensors) if m), None)
    if anchor is None:
        raise ValueError(
            f"not a NAT or DiNAT checkpoint: no patch embedding among its {len(tensors)} keys ({_some(tensors)})"
        )
    prefix = anchor.string[: anchor.start()]
    name, layout = _recognise(tensors, prefix, is_transformers=anchor[1].startswith("embeddings"))
    checkpoint = Checkpoint(name, layout.summary, {})
    inside: StateDict = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            inside[key.removeprefix(prefix)] = tensor
        elif layout.classifier and key.startswith(f"{layout.classifier}."):
            inside["head.fc." + key.removeprefix(f"{layout.classifier}.")] = tensor
        else:
            checkpoint.left_out.append(key)
    if layout.classifier and checkpoint.left_out:
        raise ValueError(f"checkpoint looks like {layout.summary}, but has unknown keys: {_some(checkpoint.left_out)}")

    unknown = []
    for key, tensor in _joined(inside).items():
        found = _translate(key, layout, to_ours=True)
        if found is None:
            unknown.append(key)
        else:
            ours, *templates = found
            checkpoint.tensors[ours] = tensor
            checkpoint.mapped[templates[0], templates[1]] += 1
    if unknown:
        raise ValueError(f"checkpoint looks like {layout.summary}, but has unknown keys: {_some(unknown)}")
    _rename_last_norm(checkpoint.tensors, "feature_norms.{}", "norm")
    return checkpoint


def _unwrap(state_dict: Mapping[str, Any]) -> StateDict:
    """The tensors inside a training checkpoint, without the prefixes of wrappers."""
    for key in _WRAPPERS:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    strangers = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if strangers or not state_dict:
        raise ValueError(f"not a state dict: it holds {_some(strangers) if strangers else 'nothing'}")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in state_dict.items()}


def _recognise(tensors: StateDict, prefix: str, is_transformers: bool) -> tuple[str, Layout]:
    if is_transformers:
        by_prefix = {LAYOUTS[name].prefix: name for name in ("transformers", "nat", "oneformer", "backbone")}
        name = by_prefix.get(prefix, "backbone")
        return name, LAYOUTS[name]
    keys = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    if any(key.startswith("layers.") for key in keys):
        return "original", _DINAT_S if any(".blocks." in key for key in keys) else _ISOTROPIC
    if any(re.match(r"levels\.0\.downsample|head\.weight|norm\d", key) for key in keys):
        name = "detection" if prefix else "original"
        return name, LAYOUTS[name]
    return "timm", LAYOUTS["timm"]


def _joined(tensors: StateDict) -> StateDict:
    """One tensor where a layout has three (query, key, value), and two where it has a stack of two (layer scales)."""
    joined: StateDict = {}
    for key, tensor in tensors.items():
        if key.endswith("layer_scale_parameters"):
            joined[f"{key}.0"], joined[f"{key}.1"] = tensor.unbind()
        elif match := re.fullmatch(r"(.*attention\.self\.)(query|key|value)\.(weight|bias)", key):
            parts = [tensors.get(f"{match[1]}{name}.{match[3]}") for name in ("query", "key", "value")]
            if any(part is None for part in parts):
                joined[key] = tensor  # stays unknown, and is reported
            else:
                joined[f"{match[1]}qkv.{match[3]}"] = torch.cat([part for part in parts if part is not None])
        else:
            joined[key] = tensor
    return joined


def _parted(tensors: StateDict) -> StateDict:
    """The inverse of `_joined`, in transformers' layout."""
    parted: StateDict = {}
    for key, tensor in tensors.items():
        if key.endswith("layer_scale_parameters.0"):
            stem = key.removesuffix(".0")
            parted[stem] = torch.stack([tensor, tensors[f"{stem}.1"]])
        elif "attention.self.qkv." in key:
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                parted[key.replace(".qkv.", f".{name}.")] = part.clone()
        elif not key.endswith("layer_scale_parameters.1"):
            parted[key] = tensor
    return parted


@lru_cache(maxsize=1024)
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"\{(\w)\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", escaped))


def _translate(key: str, layout: Layout, to_ours: bool) -> tuple[str, str, str] | None:
    """The key on the other side, and the source's and the target's template."""
    for ours, theirs in [*layout.templates.items(), ("head.fc.{p}", "head.fc.{p}")]:
        source, target = (theirs, ours) if to_ours else (ours, theirs)
        if match := _pattern(source).fullmatch(key):
            fields: dict[str, Any] = match.groupdict()
            if "h" in fields:
                fields["i"] = int(fields["h"]) - 1
            elif "i" in fields:
                fields["h"] = int(fields["i"]) + 1
            return target.format(**fields), source, target
    return None


def _rename_last_norm(tensors: StateDict, source: str, target: str) -> None:
    """Our final norm is the last level's where all levels have one."""
    last = max((int(key.split(".")[1]) for key in tensors if key.startswith("levels.")), default=0)
    for p in ("weight", "bias"):
        if (key := f"{source.format(last)}.{p}") in tensors:
            tensors[f"{target.format(last)}.{p}"] = tensors.pop(key)


def layout_for(tensors: StateDict, name: str) -> Layout:
    """The layout of that name, for the kind of model that the tensors are of."""
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {name!r}")
    if name == "timm" or "patch_embed.proj.weight" not in tensors:
        return LAYOUTS[name]
    is_isotropic = not any(".downsample." in key for key in tensors)
    if name != "original":
        kind = "isotropic models" if is_isotropic else "DiNAT_s"
        raise ValueError(f"there is no layout {name!r} of {kind}: choose 'timm' or 'original'")
    return _ISOTROPIC if is_isotropic else _DINAT_S


def from_native(tensors: StateDict, name: str) -> tuple[StateDict, list[str]]:
    """Translates from our layout to another.

    Returns:
        The state dict, and those of our keys that the layout has no place for.
    """
    layout, tensors = layout_for(tensors, name), dict(tensors)
    has_head = layout.classifier is not None or not layout.is_backbone
    left_out = [key for key in tensors if key.startswith("head.") and not has_head]
    left_out += [key for key in tensors if key.startswith("feature_norms.") and layout.classifier]
    for key in left_out:
        del tensors[key]
    if layout.is_backbone or (name == "original" and any(key.startswith("feature_norms.") for key in tensors)):
        _rename_last_norm(tensors, "norm", "feature_norms.{}")
    out: StateDict = {}
    for key, tensor in tensors.items():
        if layout.classifier and key.startswith("head.fc."):
            out[key.replace("head.fc", layout.classifier)] = tensor
            continue
        found = _translate(key, layout, to_ours=False)
        if found is None:
            raise ValueError(f"layout {name!r} ({layout.summary}) cannot express {key}")
        out[layout.prefix + found[0]] = tensor
    return (_parted(out) if layout.templates is _TRANSFORMERS else out), left_out


def model_args(tensors: StateDict) -> dict[str, Any]:
    """The arguments of a `DiNAT` that has tensors of these shapes. They say nothing of dilations."""
    depths: Counter[int] = Counter()
    for key in tensors:
        if match := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.attn\.rpb", key):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    if not depths:
        raise ValueError("checkpoint has no relative positional bias: it is not of a NAT or DiNAT")
    firsts = [f"levels.{i}.blocks.0." for i in range(max(depths) + 1)]
    lost = [f"{first}attn.rpb" for first in firsts if f"{first}attn.rpb" not in tensors]
    lost += [key for key in ("patch_embed.norm.weight", f"{firsts[0]}mlp.fc1.weight") if key not in tensors]
    if lost:
        raise ValueError(f"checkpoint is incomplete, it lacks {_some(lost)}")
    rpbs = [tensors[f"{first}attn.rpb"] for first in firsts]
    stem = [key for key in tensors if re.fullmatch(r"patch_embed\.proj(\.\d+)?\.weight", key)]
    hidden, dim = tensors[f"{firsts[0]}mlp.fc1.weight"].shape
    dims = [tensors[f"{first}norm1.weight"].shape[0] if f"{first}norm1.weight" in tensors else dim for first in firsts]
    head = tensors.get("head.fc.weight")
    return dict(
        patch_size=tensors[stem[0]].shape[-1] if stem == ["patch_embed.proj.weight"] else 2 ** len(stem),
        in_chans=tensors[stem[0]].shape[1],
        num_classes=0 if head is None else head.shape[0],
        embed_dim=dims,
        depths=[depths[i] for i in range(len(firsts))],
        num_heads=[rpb.shape[0] for rpb in rpbs],
        kernel_size=(rpbs[0].shape[-1] + 1) // 2,
        mlp_ratio=hidden / dim,
        qkv_bias=f"{firsts[0]}attn.qkv.bias" in tensors,
        layer_scale=1e-5 if any(".ls1." in key for key in tensors) else None,
        feature_norms=any(key.startswith("feature_norms.") for key in tensors),
    )


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
    model = DiNAT(**args, embed_layer=layers[0], downsample_layer=layers[1], device="meta")
    wanted = model.state_dict()
    tensors = dict(tensors)
    _fit_feature_norms(tensors, wanted)
    problems = _differences(tensors, wanted)
    if problems:
        raise ValueError(f"checkpoint is incomplete or inconsistent:\n{problems}")
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
    _fit_biases(tensors, wanted)
    _fit_feature_norms(tensors, wanted)
    _fit_classifier(tensors, wanted, new_classifier)
    stem = next(key for key in tensors if key.startswith("patch_embed.proj") and key.endswith("weight"))
    adaptable = stem in wanted and tensors[stem].shape[0] == wanted[stem].shape[0]
    problems = _differences(tensors, wanted, ignore={stem} if adaptable else set())
    if problems:
        raise ValueError(
            f"checkpoint of {_describe(tensors)} does not fit this model, {_describe(wanted)}:\n{problems}\n"
            f"Create the model that the checkpoint is of, or choose another checkpoint."
        )


def _fit_biases(tensors: StateDict, wanted: Mapping[str, Tensor]) -> None:
    """Resamples biases of another kernel size bicubically, as the authors do."""
    for key, rpb in tensors.items():
        target = wanted.get(key)
        if key.endswith(".rpb") and target is not None and target.shape != rpb.shape and len(target) == len(rpb):
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
        has = f"a classifier of {classes} classes" if classes else "no classifier"
        raise ValueError(
            f"checkpoint has {has}, the model one of {expected}. Create the model with num_classes={classes}, and with "
            f"pretrained_cfg_overlay=dict(num_classes={classes}, ...) where it is created with pretrained=True"
        )
    for key in ("head.fc.weight", "head.fc.bias"):
        tensors.pop(key, None)
        if expected:
            tensors[key] = wanted[key]
    _logger.info(f"Left out the checkpoint's classifier of {classes} classes.")


def _differences(tensors: StateDict, wanted: Mapping[str, Tensor], ignore: Iterable[str] = ()) -> str:
    """What is missing, unknown or of another shape, a line each; nothing if all fits."""
    shapes = [
        f"{key} {tuple(tensors[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in tensors
        if key in wanted and key not in ignore and tensors[key].shape != wanted[key].shape
    ]
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in wanted]
    lists = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return "\n".join(f"  {len(keys)} {what}: {_some(keys)}" for what, keys in lists if keys)


def _describe(tensors: Mapping[str, Tensor]) -> str:
    args = model_args(dict(tensors))
    scale = "with" if args["layer_scale"] else "without"
    return (
        f"{' or '.join(variants(dict(tensors))) or 'an unpublished size'} (embed_dim {args['embed_dim'][0]}, depths "
        f"{','.join(map(str, args['depths']))}, kernel {args['kernel_size']}, {scale} layer scale)"
    )


# Depths and the first level's channels of the published sizes, by what kind of model they are of.
_SIZES = {
    "{}nat_": {
        "mini": (64, [3, 4, 6, 5]),
        "tiny": (64, [3, 4, 18, 5]),
        "small": (96, [3, 4, 18, 5]),
        "base": (128, [3, 4, 18, 5]),
        "large": (192, [3, 4, 18, 5]),
    },
    "dinat_s_": {
        "tiny": (96, [2, 2, 6, 2]),
        "small": (96, [2, 2, 18, 2]),
        "base": (128, [2, 2, 18, 2]),
        "large": (192, [2, 2, 18, 2]),
    },
    "{}nat_isotropic_": {"small": (384, [1] * 12), "base": (768, [1] * 12)},
}


def variants(tensors: StateDict) -> list[str]:
    """The registered models of these shapes. Dilations leave no trace in a checkpoint, so NAT and DiNAT look alike."""
    args = model_args(tensors)
    is_conv = "patch_embed.proj.0.weight" in tensors
    size = (args["embed_dim"][0], args["depths"])
    for family, sizes in _SIZES.items():
        if (family == "{}nat_") == is_conv:
            for name, known in sizes.items():
                if size == known:
                    prefixes = ("di", "") if "{}" in family and name != "large" else ("di",)
                    return [family.format(prefix) + name for prefix in prefixes]
    return []


def load_checkpoint(model: nn.Module, path: str | Path, new_classifier: bool = False) -> Checkpoint:
    """Loads a file in any known layout, whole or not at all. Channels of the image are adapted.

    Args:
        model: Of the family.
        path: The file.
        new_classifier: Whether the model keeps its own classifier where that of the file has other classes.
    """
    checkpoint = to_native(read_state_dict(path))
    tensors = dict(checkpoint.tensors)
    fit(tensors, model, new_classifier)
    wanted = model.state_dict()
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:  # `fit` lets pass no other than the first convolution
            tensors[key] = adapt_input_conv(wanted[key].shape[1], tensor)
    model.load_state_dict(tensors)
    return checkpoint


def save_state_dict(tensors: StateDict, path: str | Path) -> None:
    """Writes .safetensors or a torch file, by the name's ending."""
    path = Path(path)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    elif path.suffix in (".pth", ".pt", ".bin"):
        torch.save(tensors, path)
    else:
        raise ValueError(f"file must end in .safetensors, .pth, .pt or .bin, got {str(path)!r}")


def _some(keys: Iterable[str], most: int = 6) -> str:
    keys = list(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
