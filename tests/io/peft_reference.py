"""What PEFT itself writes, computes and reads: small models with adapters of every kind that is exchanged.

    python tests/io/peft_reference.py make FOLDER    # base weights, adapters by PEFT, and their outputs
    python tests/io/peft_reference.py serve FOLDER   # outputs of the adapters in FOLDER/ours, saved again by PEFT

Needs torch, transformers, peft and safetensors. `tests/io/peft` is what `make` wrote with torch 2.13, transformers
5.23 and peft 0.21.2.
"""

import json
import pathlib
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class Net(torch.nn.Module):
    """Embedding, convolution and linear layers, one of them GPT-2's, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(10, 6)
        self.conv = torch.nn.Conv2d(6, 5, (3, 2))
        self.fc = torch.nn.Linear(30, 7)
        self.mix = Conv1D(4, 7)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(self.emb(tokens).permute(0, 3, 1, 2)))
        return self.head(torch.tanh(self.mix(torch.relu(self.fc(x.permute(0, 2, 3, 1).flatten(1))))))


def base(kind: str) -> torch.nn.Module:
    if kind == "net":
        return Net()
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=16,
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=6,
                rms_norm_eps=1e-5,
                max_position_embeddings=16,
                initializer_range=0.3,
                tie_word_embeddings=False,
            )
        )
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            initializer_range=0.3,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def inputs(kind: str) -> torch.Tensor:
    shape, vocab = {"net": ((2, 4, 4), 10), "llama": ((2, 6), 16), "bert": ((2, 6), 16)}[kind]
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + 3) % vocab).reshape(shape)


ADAPTERS = {
    "llama-lora": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "llama-rslora": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "o_proj", "mlp.down_proj"],
        "rank_pattern": {"q_proj": 2, "mlp.down_proj": 3},
        "alpha_pattern": {".*k_proj": 7},
        "exclude_modules": ["lm_head"],
    },
    "llama-dora": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": r".*\.(q|o|up)_proj"},
    "llama-layers": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["v_proj", "gate_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "task_type": "CAUSAL_LM",
    },
    "llama-table": {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "lm_head"]},
    "bert-classifier": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
        "bias": "lora_only",
    },
    "bert-biases": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["output.dense"],
        "bias": "all",
    },
    "bert-lora-bias": {"r": 2, "lora_alpha": 4, "target_modules": ["attention.self.key"], "lora_bias": True},
    "net-lora": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["emb", "conv", "fc"],
        "modules_to_save": ["head"],
    },
}


def logits(kind: str, model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        y = model(inputs(kind))
    return y if isinstance(y, torch.Tensor) else y.logits


def make(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {}
    for kind in ("net", "llama", "bert"):
        torch.manual_seed(len(kind))
        model = base(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        save_file(model.state_dict(), folder / f"{kind}.safetensors", {"format": "pt"})
        outputs[kind] = logits(kind, model)
    for name, settings in ADAPTERS.items():
        kind = name.split("-")[0]
        torch.manual_seed(len(name))
        model = get_peft_model(loaded(folder, kind), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        outputs[name] = logits(kind, model)
        model.save_pretrained(folder / name)
        config = folder / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()), separators=(",", ":")) + "\n")
        (folder / name / "README.md").unlink()
    save_file(outputs, folder / "outputs.safetensors")


def loaded(folder: pathlib.Path, kind: str) -> torch.nn.Module:
    model = base(kind)
    model.load_state_dict(load_file(folder / f"{kind}.safetensors"))
    return model


def serve(folder: pathlib.Path) -> None:
    """Outputs of `ours/*` into ours.safetensors; what PEFT writes of them again, into `again/*`.

    And what its rules say of every setting and module in rules.json, into answers.json.
    """
    outputs = {}
    for adapter in sorted((folder / "ours").iterdir()):
        kind = adapter.name.split("-")[0]
        model = PeftModel.from_pretrained(loaded(folder, kind), str(adapter))
        outputs[adapter.name] = logits(kind, model)
        model.save_pretrained(folder / "again" / adapter.name)
    save_file(outputs, folder / "ours.safetensors")
    asked = json.loads((folder / "rules.json").read_text())
    answers = [[rules(settings, module) for module in asked["modules"]] for settings in asked["settings"]]
    (folder / "answers.json").write_text(json.dumps(answers))


def rules(settings: dict, module: str) -> tuple[bool, int, int]:
    """Whether a module is a target, its rank and its alpha."""
    config = LoraConfig(**settings)
    found = check_target_module_exists(config, module)
    rank, alpha = (
        pattern.get(get_pattern_key(pattern.keys(), module), default)
        for pattern, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
    )
    return bool(found), rank, alpha


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"make": make, "serve": serve}[sys.argv[1]](pathlib.Path(sys.argv[2]))
