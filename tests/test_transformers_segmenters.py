"""transformers' segmenters with a DiNAT backbone."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

pytestmark = pytest.mark.usefixtures("enabled")

# Dilations published for segmentation, with kernel 11.
MASK2FORMER = [[1, 14, 1], [1, 4, 1, 7], [*[1, 2, 1, 3] * 4, 1, 3], [1] * 5]
ONEFORMER = [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2, 1, 2, 1]]


def backbone_config(dilations):
    return transformers.DinatConfig(
        embed_dim=8,
        depths=[len(level) for level in dilations],
        num_heads=[1, 2, 4, 8],
        kernel_size=11,
        dilations=dilations,
        mlp_ratio=1.0,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def maskformer(dilations):
    decoder = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        fpn_feature_size=32,
        mask_feature_size=32,
        backbone_config=backbone_config(dilations),
        decoder_config=decoder,
        num_labels=4,
    )
    return transformers.MaskFormerForInstanceSegmentation(config), {}


def mask2former(dilations):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config(dilations),
        **{name: 32 for name in ("feature_size", "mask_feature_size", "hidden_dim")},
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        train_num_points=64,
        num_labels=4,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), {}


def oneformer(dilations):
    config = transformers.OneFormerConfig(
        backbone_config=backbone_config(dilations),
        **{name: 64 for name in ("conv_dim", "mask_dim", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")},
        text_encoder_width=64,
        text_encoder_context_length=8,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=32,
        text_encoder_n_ctx=4,
        task_seq_len=8,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        num_queries=9,
        train_num_points=64,
        num_labels=4,
        is_training=True,
    )
    words = {"task_inputs": torch.randint(0, 32, (1, 8)), "text_inputs": torch.randint(0, 32, (1, 5, 8))}
    return transformers.OneFormerForUniversalSegmentation(config), words


def check_segmenter(make, dilations, size: int) -> None:
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


@pytest.mark.parametrize("make", [maskformer, mask2former, oneformer])
def test_segmenters_train_on_a_dinat(make) -> None:
    """Smaller than the window on every level but for the first layer, so that all the rest is padded."""
    check_segmenter(make, [[1, 2], [1], [2], [1]], 64)


@pytest.mark.parametrize("size", [512, 640])
@pytest.mark.parametrize(
    ("make", "dilations"), [(maskformer, MASK2FORMER), (mask2former, MASK2FORMER), (oneformer, ONEFORMER)]
)
def test_segmenters_train_with_published_dilations(make, dilations, size: int) -> None:
    check_segmenter(make, dilations, size)
