"""diffusers' LTX-2.5 decoder on this package's attention, against its own FlexAttention."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers import LTX2VideoDiffusionDecoderModel
from diffusers.models.autoencoders import ltx2_diffusion_decoder as ltx2

from dinat_triton.integrations import natten
from dinat_triton.integrations.diffusers import disable, enable, is_enabled

TINY = {
    "latent_channels": 8,
    "patch_size": 2,
    "decoder_head_dim": 16,
    "decoder_stage_channels": (64, 32, 32, 32, 32),
    "decoder_stage_depths": (1, 1, 1, 1, 2),
    "decoder_stage_kernels": ((3, 3, 3), (3, 3, 3), (3, 3, 2), (3, 3, 3)),
    "decoder_upsample_strides": ((1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 1, 1)),
    "decoder_upsample_channel_reductions": (2, 1, 1, 1),
    "decoder_stage5_kernel": (3, 5, 4),
    "decoder_t_emb_dim": 16,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}


@pytest.fixture(autouse=True)
def _disabled():
    """diffusers as it comes."""
    disable()
    yield
    disable()


def decode(model) -> torch.Tensor:
    latents = torch.randn(2, 8, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.decode(latents, generator=torch.Generator().manual_seed(1)).sample


def test_a_decoder_gives_the_video_of_its_own_fallback(tmp_path) -> None:
    theirs = LTX2VideoDiffusionDecoderModel(**TINY).eval()
    theirs.save_pretrained(tmp_path)
    expected = decode(theirs)
    assert expected.std() > 0.01
    with enable():
        ours = LTX2VideoDiffusionDecoderModel.from_pretrained(tmp_path).eval()
        theirs.set_attn_processor(ltx2.LTX2VideoVaeNeighborhoodNattenProcessor(backend="cutlass-fna"))
    for model in (ours, theirs):  # also after the block
        assert all(processor._na3d is natten.na3d for processor in model.attn_processors.values())
        torch.testing.assert_close(decode(model), expected, rtol=1e-4, atol=1e-5)


def test_enabling_is_idempotent_and_reversible() -> None:
    init = ltx2.LTX2VideoVaeNeighborhoodNattenProcessor.__init__
    default = ltx2.LTX2VideoVaeNeighborhoodAttention._default_processor_cls
    with enable(), enable():
        pass
    assert not is_enabled()
    assert ltx2.LTX2VideoVaeNeighborhoodNattenProcessor.__init__ is init
    assert ltx2.LTX2VideoVaeNeighborhoodAttention._default_processor_cls is default


def test_a_decoder_that_is_not_known_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(ltx2.LTX2VideoVaeNeighborhoodNattenProcessor, "__init__", lambda self: None)
    with pytest.raises(RuntimeError, match=r"decoder of diffusers .* does not ask for NATTEN .* Nothing was changed"):
        enable()
    assert not is_enabled()
