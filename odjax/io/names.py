"""Which names of PyTorch a model's parameters have."""

from __future__ import annotations

import flax.linen as nn

from odjax.io.huggingface import BERT, BERT_CLASSIFIER, VIT, VIT_CLASSIFIER
from odjax.io.path_map import LLAMA, PathMap
from odjax.lowrank.adapt import Adapted
from odjax.models.bert import Bert
from odjax.models.decoder import Decoder
from odjax.models.vit import ViT


def names_of(model: nn.Module) -> PathMap:
    """The names in `transformers` of the parameters of one of our models.

    Args:
      model: a `Decoder` (LlamaForCausalLM), `Bert` (BertModel, with classes BertForSequenceClassification) or
        `ViT` without LayerScale (ViTModel, ViTForImageClassification), adapted or bare.

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
    if isinstance(bare, ViT) and bare.layer_scale is None:
        return VIT if bare.classes is None else VIT_CLASSIFIER
    raise ValueError(
        f"there are no names for {type(bare).__name__}: write an odjax.io.PathMap of its modules (that of "
        "DINOv2 is odjax.io.huggingface.DINOV2)"
    )
