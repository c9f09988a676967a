"""Exchange with other programs: safetensors files, names of PyTorch models, PEFT adapters."""
