"""Tiny random models of `transformers` with what they compute, and sentence vectors of all-MiniLM-L6-v2.

    python tests/io/hf_reference.py models FOLDER [NAME ...]
    python tests/io/hf_reference.py minilm MODEL_FOLDER TEXTS.json VECTORS.safetensors

The first writes a folder for each model: what `save_pretrained` writes, and `expected.safetensors` with inputs
and outputs. The committed fixture is `models tests/io/huggingface llama3 bert_classifier dinov2_registers`.
Needs torch, transformers and safetensors; the tests run it as a process of its own.
"""

import json
import sys
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "intermediate_size": 12, "vocab_size": 16, "max_position_embeddings": 16}
LLAMA = {**TEXT, "num_key_value_heads": 1}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
    "rope_theta": 50.0,
}

# name -> (model, configuration, its settings)
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {**LLAMA, "rms_norm_eps": 1e-5}),
    "llama3": (hf.LlamaForCausalLM, hf.LlamaConfig, {**LLAMA, "rope_parameters": ROPE}),
    "llama_tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {**LLAMA, "tie_word_embeddings": True}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {**LLAMA, "sliding_window": 4}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**LLAMA, "head_dim": 6}),
    "bert": (hf.BertModel, hf.BertConfig, TEXT),
    "bert_classifier": (hf.BertForSequenceClassification, hf.BertConfig, {**TEXT, "num_labels": 3}),
    "bert_pretraining": (hf.BertForPreTraining, hf.BertConfig, {**TEXT, "hidden_act": "gelu_new"}),
    "vit": (hf.ViTModel, hf.ViTConfig, {**IMAGE, "intermediate_size": 12}),
    "vit_classifier": (
        hf.ViTForImageClassification,
        hf.ViTConfig,
        {**IMAGE, "intermediate_size": 12, "num_labels": 3},
    ),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config, {**IMAGE, "mlp_ratio": 2}),
    "dinov2_swiglu": (
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config,
        {**IMAGE, "use_swiglu_ffn": True, "num_labels": 3},
    ),
    "dinov2_registers": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig,
        {**IMAGE, "num_register_tokens": 3, "mlp_ratio": 2},
    ),
    "dinov2_registers_classifier": (
        hf.Dinov2WithRegistersForImageClassification,
        hf.Dinov2WithRegistersConfig,
        {**IMAGE, "num_register_tokens": 3, "mlp_ratio": 2, "num_labels": 3},
    ),
}
SHARDED = ("qwen3", "vit_classifier")


def run(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Inputs and outputs."""
    kind = model.config.model_type
    if kind in ("vit", "dinov2", "dinov2_with_registers"):
        found = {}
        for size, shape in {"": (8, 8), "_large": (12, 16)}.items():
            images = torch.randn(2, 3, *shape)
            more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
            out = model(images, **more)
            found[f"images{size}"] = images.permute(0, 2, 3, 1)
            if "logits" in out:
                found[f"logits{size}"] = out.logits
            else:
                found[f"hidden{size}"] = out.last_hidden_state
        return found
    tokens = torch.randint(0, 16, (3, 9))
    if kind != "bert":
        return {"tokens": tokens, "logits": model(tokens).logits}
    mask = torch.arange(9)[None] < torch.tensor([[9], [4], [6]])
    types = (torch.arange(9)[None] > 3).expand(3, 9).long()
    inputs = {"attention_mask": mask.long(), "token_type_ids": types}
    found = {"tokens": tokens, "mask": mask, "types": types}
    encoder = getattr(model, "bert", model)
    out = encoder(tokens, **inputs)
    found |= {"hidden": out.last_hidden_state, "pooled": out.pooler_output}
    if hasattr(model, "classifier"):
        found["logits"] = model(tokens, **inputs).logits
    return found


def write_models(folder: Path, names: list[str]) -> None:
    """Writes models with random parameters and what they compute."""
    for seed, (name, (model_class, config_class, settings)) in enumerate(MODELS.items()):
        if names and name not in names:
            continue
        torch.manual_seed(seed)
        model = model_class(config_class(**settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            found = run(model)
        more = {"max_shard_size": "3KB"} if name in SHARDED else {}
        model.save_pretrained(folder / name, **more)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        found = {key: value.contiguous() for key, value in found.items()}
        save_file(found, folder / name / "expected.safetensors")


def write_vectors(model_folder: Path, texts: Path, out: Path) -> None:
    """Sentence vectors of MiniLM: the mean of the last layer over the tokens, of length 1."""
    tokenizer = hf.AutoTokenizer.from_pretrained(model_folder)
    model = hf.AutoModel.from_pretrained(model_folder).eval()
    batch = tokenizer(json.loads(texts.read_text()), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    save_file({"vectors": torch.nn.functional.normalize(mean, dim=1), "tokens": batch["input_ids"]}, out)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "models":
        write_models(Path(arguments[0]), arguments[1:])
    else:
        write_vectors(*map(Path, arguments))
