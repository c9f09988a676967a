"""The odjax application: experiments, the sharded and resumable run, reports and the command line."""

from odjax_train.errors import UserError as UserError
from odjax_train.experiment import Data as Data
from odjax_train.experiment import Experiment as Experiment
from odjax_train.experiment import Sample as Sample
from odjax_train.mesh import MeshShape as MeshShape
from odjax_train.tasks import Task as Task
from odjax_train.tasks import classification as classification
from odjax_train.tasks import language_model as language_model
from odjax_train.tasks import translation as translation
