"""Exchange with other programs: safetensors files, names of PyTorch models, PEFT adapters."""

from odjax.io.huggingface import load_bert as load_bert
from odjax.io.huggingface import load_llama as load_llama
from odjax.io.huggingface import load_vit as load_vit
from odjax.io.model_names import BERT as BERT
from odjax.io.model_names import BERT_CLASSIFIER as BERT_CLASSIFIER
from odjax.io.model_names import DINOV2 as DINOV2
from odjax.io.model_names import RESNET as RESNET
from odjax.io.model_names import VIT as VIT
from odjax.io.model_names import VIT_CLASSIFIER as VIT_CLASSIFIER
from odjax.io.names import names_of as names_of
from odjax.io.path_map import LLAMA as LLAMA
from odjax.io.path_map import Pair as Pair
from odjax.io.path_map import PathMap as PathMap
from odjax.io.path_map import to_params as to_params
from odjax.io.path_map import to_tensors as to_tensors
from odjax.io.path_map import under as under
from odjax.io.peft import export_peft as export_peft
from odjax.io.peft import import_peft as import_peft
from odjax.io.peft import load_peft as load_peft
from odjax.io.peft import save_peft as save_peft
from odjax.io.resnet import load_resnet as load_resnet
from odjax.io.safetensors import load_safetensors as load_safetensors
from odjax.io.safetensors import load_shards as load_shards
from odjax.io.safetensors import safetensors_metadata as safetensors_metadata
from odjax.io.safetensors import save_safetensors as save_safetensors
from odjax.io.torch_checkpoint import load_torch_checkpoint as load_torch_checkpoint
