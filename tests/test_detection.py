"""Backbone of a detector: torchvision's FPN and Mask R-CNN on a small DiNAT, trained on drawn squares."""

from collections import OrderedDict

import pytest
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
    """Bright squares on noise, with their boxes and masks."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(count):
        image = 0.2 * torch.rand(3, SIZE, SIZE, generator=generator)
        side, top, left = torch.randint(16, 32, (3,), generator=generator).tolist()
        mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
        mask[top : top + side, left : left + side] = 1
        image[:, mask.bool()] += 0.7
        box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        images.append(image)
        targets.append(dict(boxes=box, labels=torch.ones(1, dtype=torch.int64), masks=mask[None]))
    return images, targets


def test_mask_rcnn_learns():
    torch.manual_seed(0)
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


@pytest.mark.parametrize("size", [(200, 304), (96, 130)])
def test_pyramid_of_ragged_maps(size):
    torch.manual_seed(0)
    pyramid = Pyramid().eval()
    with torch.no_grad():
        features = pyramid(torch.randn(1, 3, *size))
    shapes = [tuple(feature.shape[-2:]) for feature in features.values()]
    assert shapes == [tuple(-(-n // reduction) for n in size) for reduction in (8, 16, 32)]
    assert all(feature.isfinite().all() for feature in features.values())
