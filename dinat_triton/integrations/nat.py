"""NAT in transformers: the model type `nat`, which transformers had until 4.57, as a DiNAT without dilation.

Folders such as `shi-labs/nat-mini-in1k-224` load again, and what is saved has their keys.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.dinat.configuration_dinat import DinatConfig

from dinat_triton.integrations.dinat import FLAGS
from dinat_triton.integrations.transformers import enable, load_modeling

_dinat: Any = load_modeling()

__all__ = ["NatBackbone", "NatConfig", "NatForImageClassification", "NatModel", "NatPreTrainedModel"]


class NatConfig(DinatConfig):
    """Config of a NAT: a `DinatConfig` with every dilation 1."""

    model_type = "nat"

    def __post_init__(self, **kwargs: Any) -> None:
        ones = [[1] * depth for depth in self.depths]
        if self.dilations and [list(level) for level in self.dilations] != ones:
            raise ValueError(f"a NAT has no dilation, use a DinatConfig: got dilations={self.dilations}")
        self.dilations = ones
        super().__post_init__(**kwargs)


class NatPreTrainedModel(_dinat.DinatPreTrainedModel):
    """Base of all models of the type."""

    config: NatConfig
    config_class = NatConfig
    base_model_prefix = "nat"
    accepts_loss_kwargs = FLAGS["accepts_loss_kwargs"]
    supports_gradient_checkpointing = FLAGS["supports_gradient_checkpointing"]
    _no_split_modules = FLAGS["_no_split_modules"]

    def __init__(self, config: NatConfig, *args: Any, **kwargs: Any) -> None:
        with enable():
            super().__init__(config, *args, **kwargs)


class NatModel(NatPreTrainedModel, _dinat.DinatModel):
    """The features of a NAT, pooled."""


class NatBackbone(NatPreTrainedModel, _dinat.DinatBackbone):
    """The feature maps of a NAT, for detectors and segmenters."""


class NatForImageClassification(NatPreTrainedModel):
    """A NAT with a linear classifier."""

    def __init__(self, config: NatConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.nat = NatModel(config)
        features = self.nat.num_features
        self.classifier = nn.Linear(features, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The logits, and the loss where there are labels; the rest as `NatModel`."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.nat(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.classifier(outputs[1])
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if not return_dict:
            return tuple(x for x in (loss, logits) if x is not None) + outputs[2:]
        return _dinat.DinatImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


_AUTO_CLASSES = (
    (AutoModel, NatModel),
    (AutoModelForImageClassification, NatForImageClassification),
    (AutoBackbone, NatBackbone),
)


def register() -> None:
    """Makes the Auto classes know the type."""
    AutoConfig.register("nat", NatConfig)
    for auto, model in _AUTO_CLASSES:
        auto.register(NatConfig, model)
    IMAGE_PROCESSOR_MAPPING.register(NatConfig, IMAGE_PROCESSOR_MAPPING[DinatConfig])


def unregister() -> None:
    """Makes the Auto classes forget it. transformers has no way to say so, hence its private dictionaries."""
    mappings: list[Any] = [CONFIG_MAPPING, IMAGE_PROCESSOR_MAPPING, *(auto._model_mapping for auto, _ in _AUTO_CLASSES)]
    for mapping in mappings:
        for key in ("nat", NatConfig):
            mapping._extra_content.pop(key, None)
