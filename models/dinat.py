"""NAT and DiNAT: Neighborhood Attention Transformers, plain and dilated.

Papers:
* `Neighborhood Attention Transformer` - https://arxiv.org/abs/2204.07143
* `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001

One class serves the whole family: NAT is DiNAT with every dilation 1, DiNAT_s (`dinat_s.py`) has other embedding and
downsampling layers, and the isotropic models (`isotropic.py`) have one block per level and no downsampling.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import log2
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerScale,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    named_apply,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import nn

from dinat_triton.map_batch import has_sizes
from dinat_triton.models import map_sizes
from dinat_triton.models.checkpoints import checkpoint_filter_fn
from dinat_triton.models.dilations import Dilation, Dilations, resolve_dilations
from dinat_triton.models.variants import VARIANTS
from dinat_triton.modules import NeighborhoodAttention2D

__all__ = ["DiNAT"]

register_notrace_module(NeighborhoodAttention2D)


@register_notrace_function
def check_image(x: torch.Tensor, in_chans: int, min_size: int) -> None:
    """Refuses what the convolutions would take and turn into something else, or report less clearly."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"image must be [batch, {in_chans}, height, width], got shape {x.shape}")
    if min(x.shape[2], x.shape[3]) < min_size:
        raise ValueError(f"image must be at least {min_size} x {min_size}, got {x.shape[2]} x {x.shape[3]}")


class ConvTokenizer(nn.Module):
    """Overlapping patch embedding: a 3x3 convolution of stride 2 for every doubling of the patch size."""

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 64,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if patch_size not in (2, 4, 8, 16):
            raise ValueError(f"patch_size must be 2, 4, 8 or 16, got {patch_size}")
        num_convs = int(log2(patch_size))
        chans = [in_chans, *(embed_dim // 2**i for i in reversed(range(num_convs)))]
        self.proj = nn.Sequential(
            *[nn.Conv2d(chans[i], chans[i + 1], kernel_size=3, stride=2, padding=1, **dd) for i in range(num_convs)]
        )
        self.norm = norm_layer(embed_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Channels last from the start: the first convolution is cheap, and all maps behind it need no copy.
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """Halves the map with an overlapping convolution."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm = norm_layer(out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x)


class NeighborhoodBlock(nn.Module):
    """Neighborhood attention and an MLP, on NHWC."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: Dilation = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = NeighborhoodAttention2D(
            dim,
            num_heads,
            kernel_size,
            dilation=dilation,
            rel_pos_bias=True,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.ls1 = LayerScale(dim, layer_scale, **dd) if layer_scale is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, layer_scale, **dd) if layer_scale is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor, sizes: list[list[int]] | None = None) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), sizes=sizes)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class DiNATStage(nn.Module):
    """A level: downsampling, where there is any, and its blocks."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dilations: Sequence[Dilation],
        drop_path: Sequence[float],
        downsample: nn.Module,
        device=None,
        dtype=None,
        **block_args: Any,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(
            *[
                NeighborhoodBlock(dim, num_heads, dilation=dilation, drop_path=rate, **block_args, **dd)
                for dilation, rate in zip(dilations, drop_path, strict=True)
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class DiNAT(nn.Module):
    """Dilated Neighborhood Attention Transformer.

    Args:
        img_size: Image that `dilations="auto"` fits. Any other image works just as well.
        patch_size: Stride of the patch embedding.
        in_chans: Channels of the image.
        num_classes: Classes, or 0 for no classifier.
        global_pool: Pooling before the classifier.
        embed_dim: Channels of the first level, doubled at each further one, or the channels of every level.
        depths: Blocks of each level.
        num_heads: Heads of each level; heads of 32 channels by default.
        kernel_size: Keys in a window along each axis.
        dilations: An integer for all blocks; a list with, for each level, an integer or a list of one dilation per
            block; a key of `DILATIONS`; or "auto", which alternates 1 and the largest that fits `img_size`.
        mlp_ratio: Hidden channels of the MLPs against their inputs.
        qkv_bias: Whether the packed projections have a bias.
        qk_scale: Of the dot products; `head_dim ** -0.5` by default.
        layer_scale: Initial layer scale, or None for none.
        feature_norms: Whether each level's intermediate features have a norm of their own, for dense prediction.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the projections and in the MLPs.
        attn_drop_rate: Dropout of attention probabilities.
        drop_path_rate: Stochastic depth at the last block, rising linearly from 0 at the first.
        embed_layer: Patch embedding.
        downsample_layer: Downsampling between levels of different width.
        act_layer: Activation of the MLPs.
        norm_layer: Normalization.
        weight_init: "" for the authors' initialisation, "skip" for that of torch's layers.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int | Sequence[int] = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] | None = None,
        kernel_size: int = 7,
        dilations: Dilations = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        feature_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        embed_layer: Callable[..., nn.Module] = ConvTokenizer,
        downsample_layer: Callable[..., nn.Module] = ConvDownsampler,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        weight_init: str = "",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        num_levels = len(depths)
        dims = [embed_dim * 2**i for i in range(num_levels)] if isinstance(embed_dim, int) else list(embed_dim)
        heads = [max(1, dim // 32) for dim in dims] if num_heads is None else list(num_heads)
        for name, values in (("embed_dim", dims), ("num_heads", heads)):
            if len(values) != num_levels:
                raise ValueError(f"{name} must have one value per level of depths {tuple(depths)}, got {values}")
        self.num_features = dims[-1]

        shrinks = [i > 0 and dims[i] != dims[i - 1] for i in range(num_levels)]
        reductions = [patch_size * 2 ** sum(shrinks[: i + 1]) for i in range(num_levels)]
        self.min_size = reductions[-1]
        block_dilations = resolve_dilations(dilations, depths, img_size, reductions, kernel_size)
        drop_path: Any = calculate_drop_path_rates(drop_path_rate, sum(depths))

        self.patch_embed = embed_layer(
            patch_size=patch_size, in_chans=in_chans, embed_dim=dims[0], norm_layer=norm_layer, **dd
        )
        levels = []
        for i in range(num_levels):
            down = downsample_layer(dims[i - 1], dims[i], norm_layer=norm_layer, **dd) if shrinks[i] else nn.Identity()
            stage = DiNATStage(
                dims[i],
                heads[i],
                block_dilations[i],
                drop_path[sum(depths[:i]) : sum(depths[: i + 1])],
                down,
                kernel_size=kernel_size,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                layer_scale=layer_scale,
                act_layer=act_layer,
                norm_layer=norm_layer,
                **dd,
            )
            levels.append(stage)
        self.levels = nn.Sequential(*levels)
        self.feature_info = [
            dict(num_chs=dims[i], reduction=reductions[i], module=f"levels.{i}") for i in range(num_levels)
        ]
        # The last level's features have the final norm; the identity keeps the two lists of one length.
        norms = [norm_layer(dim, **dd) if feature_norms else nn.Identity() for dim in dims[:-1]]
        self.feature_norms = nn.ModuleList([*norms, nn.Identity()])

        self.norm = norm_layer(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            **dd,
        )
        self.head_hidden_size = self.head.num_features
        if weight_init not in ("", "skip"):
            raise ValueError(f"weight_init must be '' or 'skip', got {weight_init!r}")
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initializes as the authors do.

        Args:
            needs_reset: Whether layers must also be reset, because they were built without values.
        """
        named_apply(partial(_init_weights, needs_reset=needs_reset), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^patch_embed",
            blocks=[
                (r"^levels\.(\d+)", None),
                (r"^(?:feature_norms|norm)", (99999,)),
            ]
            if coarse
            else [
                (r"^levels\.(\d+)\.downsample", (0,)),
                (r"^levels\.(\d+)\.\w+\.(\d+)", None),
                (r"^(?:feature_norms|norm)", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for level in self.levels:
            level.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: Classes of the new one, or 0 for none.
            global_pool: Pooling before it; unchanged by default.
        """
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        sizes: list[list[int]] | None = None,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward features, with those of the levels before the next one's downsampling.

        Args:
            x: Image.
            indices: Levels: the last n if an integer, all if None.
            norm: Whether to apply each level's norm: the final one, and with `feature_norms` all others.
            stop_early: Whether to stop at the last of `indices`.
            output_fmt: "NCHW" or "NHWC", of the intermediate features.
            intermediates_only: Whether to leave out the final features.
            sizes: Height and width of each image, where they differ.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be NCHW or NHWC."
        intermediates: list[torch.Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        last = len(self.levels) - 1

        check_image(x, self.in_chans, self.min_size)
        if torch.jit.is_scripting():
            assert sizes is None, "sizes must be None in TorchScript"
        elif has_sizes(sizes):
            stop = max_index if stop_early else last
            x, intermediates = map_sizes.forward_intermediates(self, x, sizes, take_indices, stop, norm, output_fmt)
            return intermediates if intermediates_only else (x, intermediates)
        x = self.patch_embed(x)
        i = 0
        for i, (level, level_norm) in enumerate(zip(self.levels, self.feature_norms)):  # noqa: B905  (torchscript)
            # torchscript cannot slice the levels
            if torch.jit.is_scripting() or not stop_early or i <= max_index:
                x = level(x)
                if i in take_indices:
                    y = x
                    if norm:
                        y = self.norm(x) if i == last else level_norm(x)
                    intermediates.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)

        if intermediates_only:
            return intermediates

        if torch.jit.is_scripting() or not stop_early or max_index == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops what the features of some levels do not need.

        Args:
            indices: Levels to keep, as in `forward_intermediates`.
            prune_norm: Whether to drop the norms too.
            prune_head: Whether to drop the classifier.

        Returns:
            The levels to take.
        """
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        prune_end = max_index < len(self.levels) - 1
        for i in range(len(self.levels)):
            if prune_norm or i not in take_indices:
                self.feature_norms[i] = nn.Identity()
        if prune_end:
            # the last level kept is now the final one, and so is its norm
            self.norm = self.feature_norms[max_index]
            self.feature_norms[max_index] = nn.Identity()
        elif prune_norm:
            self.norm = nn.Identity()
        self.levels = self.levels[: max_index + 1]
        self.feature_norms = self.feature_norms[: max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor, sizes: list[list[int]] | None = None) -> torch.Tensor:
        """Features, `[batch, height, width, channels]`; of images of different sizes, zero in their padding."""
        check_image(x, self.in_chans, self.min_size)
        if torch.jit.is_scripting():
            assert sizes is None, "sizes must be None in TorchScript"
        elif has_sizes(sizes):
            return map_sizes.forward_features(self, x, sizes)[0]
        x = self.patch_embed(x)
        x = self.levels(x)
        x = self.norm(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor, sizes: list[list[int]] | None = None) -> torch.Tensor:
        """Logits.

        Args:
            x: Images.
            sizes: Height and width of each image in the top left corner of its batch item, where they differ. Every
                image gives what it would give alone.
        """
        if torch.jit.is_scripting():
            assert sizes is None, "sizes must be None in TorchScript"
        elif has_sizes(sizes):
            check_image(x, self.in_chans, self.min_size)
            return map_sizes.forward_head(self, *map_sizes.forward_features(self, x, sizes))
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _init_weights(module: nn.Module, name: str = "", needs_reset: bool = True) -> None:
    if needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and isinstance(module, NeighborhoodAttention2D):
        trunc_normal_(module.rpb, std=0.02)


def create_dinat(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """Builds a registered variant with its published arguments, but for those given."""
    return build_dinat(variant, pretrained, **(VARIANTS[variant].args | kwargs))


def build_dinat(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """Builds a variant of any module of the family from all of its arguments.

    Feature extraction takes two more options: `output_fmt`, "NHWC" or "NCHW", and `feature_norms=True`, which gives
    every level's features their norm, as the published detection and segmentation backbones have it.
    """
    if rate := kwargs.pop("drop_block_rate", None):  # timm's training script passes it to every model
        raise ValueError(f"drop_block_rate is for convolutional networks, use drop_path_rate; got {rate}")
    feature_cfg: dict[str, Any] = dict(flatten_sequential=True, out_indices=kwargs.pop("out_indices", None))
    if feature_cfg["out_indices"] is None:
        feature_cfg["out_indices"] = tuple(range(len(kwargs["depths"])))
    if kwargs.get("features_only", False):
        # a backbone has no classifier, so that checkpoints without one load
        kwargs.setdefault("num_classes", 0)
        output_fmt = kwargs.pop("output_fmt", "NHWC")
        if kwargs.get("feature_norms", False) or output_fmt != "NHWC":
            kwargs.setdefault("feature_cls", "getter")
            feature_cfg.update(output_fmt=output_fmt, norm=kwargs.get("feature_norms", False))
    return build_model_with_cfg(
        DiNAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


AUTHORS = "https://shi-labs.com/projects/dinat/checkpoints"


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        **kwargs,
    }


def _cfg_384(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return _cfg(url, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg(hf_hub_id="shi-labs/nat-mini-in1k-224"),
        "nat_tiny.in1k": _cfg(hf_hub_id="shi-labs/nat-tiny-in1k-224"),
        "nat_small.in1k": _cfg(hf_hub_id="shi-labs/nat-small-in1k-224"),
        "nat_base.in1k": _cfg(hf_hub_id="shi-labs/nat-base-in1k-224"),
        "dinat_mini.in1k": _cfg(hf_hub_id="shi-labs/dinat-mini-in1k-224"),
        "dinat_tiny.in1k": _cfg(hf_hub_id="shi-labs/dinat-tiny-in1k-224"),
        "dinat_small.in1k": _cfg(hf_hub_id="shi-labs/dinat-small-in1k-224"),
        "dinat_base.in1k": _cfg(hf_hub_id="shi-labs/dinat-base-in1k-224"),
        "dinat_large.in22k_ft_in1k": _cfg(hf_hub_id="shi-labs/dinat-large-in22k-in1k-224"),
        "dinat_large.in22k": _cfg(f"{AUTHORS}/imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
        "dinat_large_384.in22k_ft_in1k": _cfg_384(hf_hub_id="shi-labs/dinat-large-in22k-in1k-384"),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg_384(hf_hub_id="shi-labs/dinat-large-11x11-in22k-in1k-384"),
        "dinat_large_384_11x11.in22k": _cfg_384(
            f"{AUTHORS}/imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841
        ),
    }
)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("nat_mini", pretrained, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("nat_tiny", pretrained, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("nat_small", pretrained, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("nat_base", pretrained, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("dinat_mini", pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("dinat_tiny", pretrained, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("dinat_small", pretrained, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("dinat_base", pretrained, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("dinat_large", pretrained, **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("dinat_large_384", pretrained, **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return create_dinat("dinat_large_384_11x11", pretrained, **kwargs)
