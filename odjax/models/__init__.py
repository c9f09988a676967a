"""Reference Flax Linen models that real weights can be loaded into."""

from odjax.models.attention import Attention, attend, segment_mask
from odjax.models.axes import ACTIVATION_AXES, PARAMETER_AXES
from odjax.models.beam import Translations, translate_beam
from odjax.models.bert import Bert, bert
from odjax.models.decoder import Decoder, decoder, flops_per_token, parameter_count
from odjax.models.encoder_decoder import EncoderDecoder, encoder_decoder
from odjax.models.feedforward import FeedForward, SwiGLU
from odjax.models.generate import generate, keep_top, sample, translate
from odjax.models.mlp import MLP
from odjax.models.norms import LayerNorm, RMSNorm
from odjax.models.resnet import ResNet, resnet
from odjax.models.rotary import RotaryScaling
from odjax.models.stack import REMAT_POLICIES, stack_layers, unstack_layers
from odjax.models.vit import Tokens, ViT, vit

__all__ = [
    "ACTIVATION_AXES",
    "MLP",
    "PARAMETER_AXES",
    "REMAT_POLICIES",
    "Attention",
    "Bert",
    "Decoder",
    "EncoderDecoder",
    "FeedForward",
    "LayerNorm",
    "RMSNorm",
    "ResNet",
    "RotaryScaling",
    "SwiGLU",
    "Tokens",
    "Translations",
    "ViT",
    "attend",
    "bert",
    "decoder",
    "encoder_decoder",
    "flops_per_token",
    "generate",
    "keep_top",
    "parameter_count",
    "resnet",
    "sample",
    "segment_mask",
    "stack_layers",
    "translate",
    "translate_beam",
    "unstack_layers",
    "vit",
]
