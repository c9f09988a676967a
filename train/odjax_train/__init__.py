"""The odjax application: experiments, the sharded and resumable run, reports and the command line.

Names are loaded when they are first used, so that `odjax --help` does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odjax_train.collapse import neural_collapse as neural_collapse
    from odjax_train.errors import UserError as UserError
    from odjax_train.experiment import Data as Data
    from odjax_train.experiment import Experiment as Experiment
    from odjax_train.experiment import Sample as Sample
    from odjax_train.federated import ByClient as ByClient
    from odjax_train.federated import Federated as Federated
    from odjax_train.mesh import MeshShape as MeshShape
    from odjax_train.tasks import Task as Task
    from odjax_train.tasks import classification as classification
    from odjax_train.tasks import language_model as language_model
    from odjax_train.tasks import moderation as moderation
    from odjax_train.tasks import translation as translation

_HOME = {
    "neural_collapse": "collapse",
    "UserError": "errors",
    "Data": "experiment",
    "ByClient": "federated",
    "Experiment": "experiment",
    "Federated": "federated",
    "Sample": "experiment",
    "MeshShape": "mesh",
    "Task": "tasks",
    "classification": "tasks",
    "language_model": "tasks",
    "moderation": "tasks",
    "translation": "tasks",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'odjax_train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"odjax_train.{_HOME[name]}"), name)
