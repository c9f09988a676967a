"""The Flax models of tests/io/peft_reference.py, with the weights that it wrote."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from odjax.io import BERT_CLASSIFIER, LLAMA, Pair, PathMap, load_peft, load_safetensors, to_params
from odjax.models import Decoder
from odjax.models.bert import Bert

FOLDER = pathlib.Path(__file__).parent / "peft"
ADAPTERS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
UNROLLED = ("llama-layers",)  # an adapter in one layer of two


class Net(nn.Module):
    """Embedding, convolution and linear layers, one of them GPT-2's, none of them square."""

    def setup(self):
        self.emb = nn.Embed(10, 6)
        self.conv = nn.Conv(5, (3, 2), padding="VALID")
        self.fc = nn.Dense(7)
        self.mix = nn.Dense(4)
        self.head = nn.Dense(3)

    def __call__(self, tokens):
        x = nn.relu(self.conv(self.emb(tokens)))
        return self.head(nn.tanh(self.mix(nn.relu(self.fc(jnp.reshape(x, (x.shape[0], -1)))))))


NAMES = {
    "net": PathMap(
        (
            Pair("emb", "emb", "embedding"),
            Pair("conv", "conv", "conv"),
            Pair("mix", "mix", "conv1d"),
            Pair("{p:fc|head}", "{p}"),
        )
    ),
    "llama": LLAMA,
    "bert": BERT_CLASSIFIER,
}
INPUTS = {
    kind: jnp.asarray(((np.arange(np.prod(shape)) * 7 + 3) % vocab).reshape(shape), jnp.int32)
    for kind, (shape, vocab) in {"net": ((2, 4, 4), 10), "llama": ((2, 6), 16), "bert": ((2, 6), 16)}.items()
}


def model_of(kind: str, *, scan: bool = True) -> nn.Module:
    if kind == "net":
        return Net()
    if kind == "llama":
        return Decoder(
            vocab=16,
            layers=2,
            width=8,
            heads=2,
            kv_heads=1,
            head_dim=6,
            mlp_width=12,
            max_length=16,
            scan=scan,
        )
    return Bert(
        vocab=16,
        layers=2,
        width=8,
        heads=2,
        mlp_width=12,
        max_length=8,
        classes=3,
        pooling="pooler",
        scan=scan,
    )


def base_of(kind: str, *, scan: bool = True, folder: pathlib.Path = FOLDER):
    """(model, params) with the reference's weights."""
    model = model_of(kind, scan=scan)
    like = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), INPUTS[kind]))["params"]
    params = to_params(load_safetensors(folder / f"{kind}.safetensors"), NAMES[kind], like)
    return model, jax.tree.map(jnp.asarray, params)


def outputs_of(model: nn.Module, params, kind: str) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)({"params": params}, INPUTS[kind]))


def adapted(name):
    """(adapted model, params) of a committed adapter."""
    kind = name.split("-")[0]
    model, base = base_of(kind, scan=name not in UNROLLED)
    return load_peft(FOLDER / name, model, base, NAMES[kind])


def parts(name):
    """(bare model, base, tensors, config, names) of an adapter, to damage."""
    kind = name.split("-")[0]
    model, base = base_of(kind, scan=name not in UNROLLED)
    config = json.loads((FOLDER / name / "adapter_config.json").read_text())
    return model, base, load_safetensors(FOLDER / name / "adapter_model.safetensors"), config, NAMES[kind]
