"""Federated runs: the section of an experiment, its data by client, its rounds and what it costs."""

from odjax_train.federated.data import ByClient as ByClient
from odjax_train.federated.data import Split as Split
from odjax_train.federated.data import by_dirichlet as by_dirichlet
from odjax_train.federated.data import by_label_shards as by_label_shards
from odjax_train.federated.data import evenly as evenly
from odjax_train.federated.data import in_order as in_order
from odjax_train.federated.section import Federated as Federated
from odjax_train.federated.step import ClientLoss as ClientLoss
from odjax_train.federated.step import merging as merging
