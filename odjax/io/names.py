"""Which names of `transformers` the parameters of our models have."""

from __future__ import annotations

import flax.linen as nn

from odjax.io.model_names import BERT, BERT_CLASSIFIER, DINOV2, DINOV2_SWIGLU, VIT, with_head
from odjax.io.path_map import LLAMA, PathMap
from odjax.lowrank.adapt import Adapted
from odjax.models.bert import Bert
from odjax.models.decoder import Decoder
from odjax.models.vit import ViT


def names_of(model: nn.Module) -> PathMap:
    """The names in `transformers` of the parameters of one of our models.

    Args:
      model: a `Decoder` (LlamaForCausalLM), `Bert` (BertModel, with classes BertForSequenceClassification) or
        `ViT` (ViTModel or, with LayerScale, Dinov2Model; with classes the models for image classification),
        adapted or bare.

    Returns:
      The map.

    Raises:
      ValueError: another model, which needs a `PathMap` of its own.

    Example:
      >>> from odjax.models import decoder
      >>> names_of(decoder("tiny")) == LLAMA
      True
    """
    bare = model.inner if isinstance(model, Adapted) else model
    if isinstance(bare, Decoder):
        return LLAMA
    if isinstance(bare, Bert):
        return BERT if bare.classes is None else BERT_CLASSIFIER
    if not isinstance(bare, ViT):
        raise ValueError(
            f"there are no names for {type(bare).__name__}: write an odjax.io.PathMap of its modules"
        )
    if bare.layer_scale is None:
        inside, prefix = VIT, "vit."
    else:
        inside = DINOV2_SWIGLU if bare.activation == "swiglu" else DINOV2
        prefix = "dinov2_with_registers." if bare.registers else "dinov2."
    return inside if bare.classes is None else with_head(inside, prefix)
