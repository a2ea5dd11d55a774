"""Backbone of a detector: torchvision's FPN and Mask R-CNN on a small DiNAT, trained on drawn squares."""

from collections import OrderedDict

import timm
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import dinat_triton  # noqa: F401  (registers the models)

SIZE = 64


class Pyramid(nn.Module):
    """Features of all levels, each with its norm, brought to one width."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.body = timm.create_model(
            "dinat_mini", features_only=True, feature_norms=True, output_fmt="NCHW", out_indices=(1, 2, 3),
            dilations="auto", img_size=SIZE, embed_dim=32, depths=(1, 1, 1, 1), kernel_size=3,
        )  # fmt: skip
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn(OrderedDict((str(i), feature) for i, feature in enumerate(self.body(x))))


def detector():
    levels = ["0", "1", "2"]
    return MaskRCNN(
        Pyramid(), num_classes=2, min_size=SIZE, max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (48,)), ((1.0,),) * 3),
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        rpn_batch_size_per_image=32, box_batch_size_per_image=32,
        rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20,
    )  # fmt: skip


def squares(count):
    """A bright rectangle on noise, with its box and mask."""
    masks = torch.zeros(count, 1, SIZE, SIZE, dtype=torch.uint8)
    masks[..., 12:40, 8:32] = 1
    box, label = torch.tensor([[8.0, 12.0, 32.0, 40.0]]), torch.ones(1, dtype=torch.int64)
    images = list(0.2 * torch.rand(count, 3, SIZE, SIZE) + 0.7 * masks)
    return images, [dict(boxes=box, labels=label, masks=mask) for mask in masks]


def test_mask_rcnn_learns():
    model = detector()
    images, targets = squares(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        parts = model(images, targets)
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    model.eval()
    with torch.inference_mode():
        found = model(images)
    assert all(set(f) == {"boxes", "labels", "scores", "masks"} for f in found)
