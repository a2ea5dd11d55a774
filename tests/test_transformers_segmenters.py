"""transformers' segmenters with a DiNAT backbone."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

pytestmark = pytest.mark.usefixtures("enabled")

SMALL = [[1, 2], [1], [2], [1]]
# Dilations published for segmentation, with kernel 11.
MASK2FORMER = [[1, 14, 1], [1, 4, 1, 7], [*[1, 2, 1, 3] * 4, 1, 3], [1] * 5]
ONEFORMER = [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2, 1, 2, 1]]


def backbone_config(dilations):
    depths = [len(level) for level in dilations]
    return transformers.DinatConfig(
        embed_dim=8, depths=depths, num_heads=[1, 2, 4, 8], kernel_size=11, dilations=dilations, mlp_ratio=1.0,
        drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def maskformer(dilations):
    decoder = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=backbone_config(dilations), decoder_config=decoder,
        num_labels=4,
    )  # fmt: skip
    return transformers.MaskFormerForInstanceSegmentation(config), {}


def mask2former(dilations):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config(dilations), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        num_queries=5, train_num_points=64, num_labels=4,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config), {}


def oneformer(dilations):
    config = transformers.OneFormerConfig(
        backbone_config=backbone_config(dilations), conv_dim=64, mask_dim=64, hidden_dim=64, encoder_feedforward_dim=64,
        dim_feedforward=64, text_encoder_width=64, text_encoder_context_length=8, text_encoder_num_layers=1,
        text_encoder_vocab_size=32, text_encoder_n_ctx=4, task_seq_len=8, encoder_layers=1, decoder_layers=2,
        query_dec_layers=1, num_attention_heads=2, num_queries=9, train_num_points=64, num_labels=4, is_training=True,
    )  # fmt: skip
    words = {"task_inputs": torch.randint(0, 32, (1, 8)), "text_inputs": torch.randint(0, 32, (1, 5, 8))}
    return transformers.OneFormerForUniversalSegmentation(config), words


@pytest.mark.parametrize(
    ("make", "dilations", "size"),
    [
        # Smaller than the window on every level but for the first layer, so that all the rest is padded.
        (maskformer, SMALL, 64),
        (mask2former, SMALL, 64),
        (oneformer, SMALL, 64),
        (mask2former, MASK2FORMER, 512),
        pytest.param(maskformer, MASK2FORMER, 512, marks=pytest.mark.slow),
        pytest.param(oneformer, ONEFORMER, 640, marks=pytest.mark.slow),
    ],
)
def test_segmenters_train_on_a_dinat(make, dilations, size: int) -> None:
    model, words = make(dilations)
    image = torch.randn(1, 3, size, size)
    masks = (torch.rand(2, size, size) > 0.5).float()
    outputs = model.train()(image, mask_labels=[masks], class_labels=[torch.tensor([0, 2])], **words)
    outputs.loss.backward()
    assert outputs.masks_queries_logits.shape[-2:] == (size // 4, size // 4)
    assert outputs.loss.isfinite()
    rpbs = {name: p for name, p in model.named_parameters() if name.endswith("rpb")}
    assert len(rpbs) == sum(map(len, dilations))
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in rpbs.values())
