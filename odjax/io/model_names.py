"""Names of the models of `transformers`, of residual networks, and paths of ours, see `odjax.io.path_map`.

Llama's are in `odjax.io.path_map.LLAMA`.
"""

from odjax.io.path_map import Pair, PathMap, under

BERT = PathMap(
    (
        Pair("embeddings.word_embeddings", "embed", "embedding"),
        Pair("embeddings.position_embeddings", "positions", "embedding"),
        Pair("embeddings.token_type_embeddings", "types", "embedding"),
        Pair("embeddings.LayerNorm", "embed_norm", "norm"),
        Pair("encoder.layer.{i}.attention.self.query", "layers[i]/attn/q"),
        Pair("encoder.layer.{i}.attention.self.key", "layers[i]/attn/k"),
        Pair("encoder.layer.{i}.attention.self.value", "layers[i]/attn/v"),
        Pair("encoder.layer.{i}.attention.output.dense", "layers[i]/attn/o", inputs=2),
        Pair("encoder.layer.{i}.attention.output.LayerNorm", "layers[i]/attn_norm", "norm"),
        Pair("encoder.layer.{i}.intermediate.dense", "layers[i]/mlp/up"),
        Pair("encoder.layer.{i}.output.dense", "layers[i]/mlp/down"),
        Pair("encoder.layer.{i}.output.LayerNorm", "layers[i]/mlp_norm", "norm"),
        Pair("pooler.dense", "pooler"),
    ),
    ignore=(r"embeddings\.position_ids",),
)
"""Names of `transformers`' BertModel and of `odjax.models.bert.Bert`."""


def with_head(names: PathMap, prefix: str, *ignore: str) -> PathMap:
    """The map of a model for classification, whose encoder has a prefix and whose head is `classifier`.

    Args:
        names: of the encoder.
        prefix: of the encoder in the larger model, "bert." for example.
        *ignore: further tensors without a place in Flax.

    Returns:
        The map.

    Example:
        >>> [pair.torch for pair in with_head(BERT, "bert.").pairs[-2:]]
        ['bert.pooler.dense', 'classifier']
    """
    inside = under(names, prefix)
    return PathMap((*inside.pairs, Pair("classifier", "head")), (*inside.ignore, *ignore))


BERT_CLASSIFIER = with_head(BERT, "bert.", r"cls\..*")
"""Names of BertForSequenceClassification, and of the encoder in the pretraining models."""

_VIT_EMBEDDINGS = (
    Pair("embeddings.cls_token", "cls", "parameter", ones=1),
    Pair("embeddings.position_embeddings", "positions", "parameter", ones=1),
    Pair("embeddings.patch_embeddings.projection", "patch", "conv"),
    Pair("layernorm", "norm", "norm"),
)
_VIT_ATTENTION = (
    Pair("encoder.layer.{i}.attention.attention.query", "layers[i]/attn/q"),
    Pair("encoder.layer.{i}.attention.attention.key", "layers[i]/attn/k"),
    Pair("encoder.layer.{i}.attention.attention.value", "layers[i]/attn/v"),
    Pair("encoder.layer.{i}.attention.output.dense", "layers[i]/attn/o", inputs=2),
)

VIT = PathMap(
    (
        *_VIT_EMBEDDINGS,
        *_VIT_ATTENTION,
        Pair("encoder.layer.{i}.layernorm_before", "layers[i]/attn_norm", "norm"),
        Pair("encoder.layer.{i}.layernorm_after", "layers[i]/mlp_norm", "norm"),
        Pair("encoder.layer.{i}.intermediate.dense", "layers[i]/mlp/up"),
        Pair("encoder.layer.{i}.output.dense", "layers[i]/mlp/down"),
    ),
    ignore=(r"embeddings\.mask_token", r"pooler\..*"),
)
"""Names of ViTModel and of `odjax.models.ViT`, which has no pooler."""

VIT_CLASSIFIER = with_head(VIT, "vit.")
"""Names of ViTForImageClassification."""

_DINOV2 = (
    *_VIT_EMBEDDINGS,
    *_VIT_ATTENTION,
    Pair("embeddings.register_tokens", "registers", "parameter", ones=1),
    Pair("encoder.layer.{i}.norm1", "layers[i]/attn_norm", "norm"),
    Pair("encoder.layer.{i}.norm2", "layers[i]/mlp_norm", "norm"),
    Pair("encoder.layer.{i}.layer_scale1.lambda1", "layers[i]/attn_scale", "parameter"),
    Pair("encoder.layer.{i}.layer_scale2.lambda1", "layers[i]/mlp_scale", "parameter"),
)

DINOV2 = PathMap(
    (
        *_DINOV2,
        Pair("encoder.layer.{i}.mlp.fc1", "layers[i]/mlp/up"),
        Pair("encoder.layer.{i}.mlp.fc2", "layers[i]/mlp/down"),
    ),
    ignore=(r"embeddings\.mask_token",),
)
"""Names of Dinov2Model, with registers or without, and of `odjax.models.ViT`."""

DINOV2_SWIGLU = PathMap(
    (
        *_DINOV2,
        # `weights_in` of the file, cut in two by `load_vit`.
        Pair("encoder.layer.{i}.mlp.{p:gate|up}_proj", "layers[i]/mlp/{p}"),
        Pair("encoder.layer.{i}.mlp.weights_out", "layers[i]/mlp/down"),
    ),
    ignore=DINOV2.ignore,
)
"""The same with SwiGLU; the gate and the other matrix have names of their own."""

_BLOCK = ("layer{s}.{i}", "stage_{s}_block_{i}")
_RESNET_NORMS = (
    ("bn1", "stem_norm"),
    (f"{_BLOCK[0]}.bn{{n}}", f"{_BLOCK[1]}/norm_{{n}}"),
    (f"{_BLOCK[0]}.shortcut.1", f"{_BLOCK[1]}/shortcut_norm"),
)

RESNET = PathMap(
    (
        Pair("conv1", "params/stem", "conv"),
        Pair(f"{_BLOCK[0]}.conv{{n}}", f"params/{_BLOCK[1]}/conv_{{n}}", "conv"),
        Pair(f"{_BLOCK[0]}.shortcut.0", f"params/{_BLOCK[1]}/shortcut", "conv"),
        *(Pair(torch, f"params/{flax}", "norm") for torch, flax in _RESNET_NORMS),
        *(
            Pair(f"{torch}.running_{name}", f"batch_stats/{flax}/{name}", "parameter")
            for torch, flax in _RESNET_NORMS
            for name in ("mean", "var")
        ),
        Pair("linear", "params/head"),
    ),
    ignore=(r".*\.num_batches_tracked",),
)
"""Names that are usual for the CIFAR family in PyTorch, and the variables of `odjax.models.ResNet`, of both
collections: {"params": ..., "batch_stats": ...}."""
