"""Names of a model's tensors in every published layout, and translation to and from our own names.

`LAYOUTS` holds, per layout, what each of our keys is called there. Translating a key either way is matching a template
and filling in the other, so a key that no template matches is an unknown one, and both directions come from one table.
Layouts that split what we keep in one tensor (query, key, value) or stack what we keep apart (the two layer scales) are
brought to one tensor per template first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

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
_NUMBER = "0|[1-9][0-9]{0,3}"
_FIELDS = {"p": "weight|bias", "d": r"norm\.weight|norm\.bias|reduction\.weight"} | dict.fromkeys("ijnh", _NUMBER)


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
class KeyLayout:
    """Names in one kind of file.

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
        """Name of one of our templates in the file, for people to read."""
        if self.classifier and ours.startswith("head.fc."):
            return ours.replace("head.fc", self.classifier)
        return self.prefix + self.templates[ours].replace("self.qkv", "self.{query,key,value}")


_OURS = {ours: ours for ours in (*_AUTHORS, *_templates("", "", 0))}
_HIERARCHICAL = _AUTHORS | _templates("levels.{i}.blocks.{j}", "levels.{i}", 1)
LAYOUTS = {
    "timm": KeyLayout("this package's models", _OURS),
    "original": KeyLayout("the authors' files", _HIERARCHICAL),
    "detection": KeyLayout("backbone of a detector or segmenter", _HIERARCHICAL, "backbone.", is_backbone=True),
    "transformers": KeyLayout("DinatForImageClassification", _TRANSFORMERS, "dinat.", "classifier"),
    "nat": KeyLayout("NatForImageClassification, of older transformers", _TRANSFORMERS, "nat.", "classifier"),
    "backbone": KeyLayout("DinatBackbone", _TRANSFORMERS, is_backbone=True),
    "oneformer": KeyLayout(
        "backbone of OneFormer", _TRANSFORMERS, "model.pixel_level_module.encoder.", is_backbone=True
    ),
}
# The authors' files of DiNAT_s and of the isotropic models: other names, and only ever these.
_DINAT_S = KeyLayout("the authors' DiNAT_s", _AUTHORS | _templates("layers.{i}.blocks.{j}", "layers.{i}", 1))
_ISOTROPIC = KeyLayout(
    "the authors' isotropic models",
    {
        ours.replace("{j}", "0"): theirs
        for ours, theirs in (_AUTHORS | _templates("layers.{i}", "layers.{i}", 1)).items()
    },
)

_ANCHORS = re.compile(r"(patch_embed\.proj|embeddings\.patch_embeddings\.projection)(\.\d+)?\.weight$")


@dataclass(frozen=True)
class Recognised:
    """The tensors of a model in a state dict, and the layout that they are in.

    Attributes:
        name: A key of `LAYOUTS`.
        layout: How the keys read.
        tensors: Of the model, without the layout's prefix; a classifier's as we name them.
        left_out: Keys of the larger model that the prefix says it is a part of.
    """

    name: str
    layout: KeyLayout
    tensors: StateDict
    left_out: list[str]


def find_model(tensors: StateDict) -> Recognised:
    """Finds a model of the family among tensors, or says that there is none."""
    anchor = next((m for m in map(_ANCHORS.search, tensors) if m), None)
    if anchor is None:
        raise ValueError(
            f"not a NAT or DiNAT checkpoint: no patch embedding among its {len(tensors)} keys ({some(tensors)})"
        )
    prefix = anchor.string[: anchor.start()]
    name, layout = _recognise(tensors, prefix, is_transformers=anchor[1].startswith("embeddings"))
    found = Recognised(name, layout, {}, [])
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            found.tensors[key.removeprefix(prefix)] = tensor
        elif layout.classifier and key.startswith(f"{layout.classifier}."):
            found.tensors["head.fc." + key.removeprefix(f"{layout.classifier}.")] = tensor
        else:
            found.left_out.append(key)
    if layout.classifier and found.left_out:
        raise ValueError(f"checkpoint looks like {layout.summary}, but has unknown keys: {some(found.left_out)}")
    return found


def _recognise(tensors: StateDict, prefix: str, is_transformers: bool) -> tuple[str, KeyLayout]:
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


def translate(found: Recognised) -> tuple[StateDict, Counter[tuple[str, str]]]:
    """Translates a model's tensors to our names, or says what it does not understand.

    Returns:
        The tensors, and how often each of the layout's templates became which of ours.
    """
    native: StateDict = {}
    mapped: Counter[tuple[str, str]] = Counter()
    unknown = []
    for key, tensor in _joined(found.tensors).items():
        translated = _translate_key(key, found.layout, to_ours=True)
        if translated is None:
            unknown.append(key)
            continue
        ours, *templates = translated
        if ours in native:
            raise ValueError(f"checkpoint has two tensors for {ours}")
        native[ours] = tensor
        mapped[templates[0], templates[1]] += 1
    if unknown:
        raise ValueError(f"checkpoint looks like {found.layout.summary}, but has unknown keys: {some(unknown)}")
    _rename_last_norm(native, "feature_norms.{}", "norm")
    return native, mapped


def _joined(tensors: StateDict) -> StateDict:
    """One tensor where a layout has three (query, key, value), and two where it has a stack of two (layer scales)."""
    joined: StateDict = {}
    for key, tensor in tensors.items():
        if key.endswith("layer_scale_parameters"):
            if len(tensor) != 2:
                raise ValueError(f"{some([key])} must be a stack of two, got shape {tuple(tensor.shape)}")
            joined[f"{key}.0"], joined[f"{key}.1"] = tensor.unbind()
        elif match := re.fullmatch(r"(.*attention\.self\.)(query|key|value)\.(weight|bias)", key):
            names = [f"{match[1]}{name}.{match[3]}" for name in ("query", "key", "value")]
            parts = [tensors[name] for name in names if name in tensors]
            if len(parts) < 3:
                joined[key] = tensor  # stays unknown, and is reported
            elif len({part.shape for part in parts}) > 1:
                raise ValueError(f"{some(names)} must have one shape, got {[tuple(part.shape) for part in parts]}")
            elif match[2] == "query":
                joined[f"{match[1]}qkv.{match[3]}"] = torch.cat(parts)
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


def _translate_key(key: str, layout: KeyLayout, to_ours: bool) -> tuple[str, str, str] | None:
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
        old, new = (f"{name.format(last)}.{p}" for name in (source, target))
        if old in tensors:
            if new in tensors:
                raise ValueError(f"checkpoint has two final norms, {old} and {new}")
            tensors[new] = tensors.pop(old)


def layout_for(tensors: StateDict, name: str) -> KeyLayout:
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
    """Translates from our names to another layout's.

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
        translated = _translate_key(key, layout, to_ours=False)
        if translated is None:
            raise ValueError(f"layout {name!r} ({layout.summary}) cannot express {key}")
        out[layout.prefix + translated[0]] = tensor
    return (_parted(out) if layout.templates is _TRANSFORMERS else out), left_out


def some(keys: Iterable[str], most: int = 6) -> str:
    """The first few keys, each readable on a line whatever is in it."""
    keys = list(keys)
    shown = [key if key.isprintable() and len(key) <= 100 else f"{key[:100]!a}..." for key in keys[:most]]
    return ", ".join(shown) + (f" and {len(keys) - most} more" if len(keys) > most else "")
