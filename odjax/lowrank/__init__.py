"""Low-rank adaptation, two ways: adapters of a model, and an optimizer of its ordinary parameters.

`rac_lora` is a gradient transform: a chain of random low-rank updates of a tree of parameters. `adapt` gives
a model with trained factors beside its frozen weights, `merge` puts them into the weights, `switched` turns
them off, `Guard` makes a moderator of them that shares the model's weights.
"""

from odjax.core.matrices import DimensionNumbers as DimensionNumbers
from odjax.core.matrices import MatrixView as MatrixView
from odjax.core.matrices import from_matrices as from_matrices
from odjax.core.matrices import to_matrices as to_matrices
from odjax.core.matrices import view_of as view_of
from odjax.lowrank.adapt import Adapted as Adapted
from odjax.lowrank.adapt import adapt as adapt
from odjax.lowrank.adapt import switched as switched
from odjax.lowrank.chain import jagged_cosine as jagged_cosine
from odjax.lowrank.chain import next_block as next_block
from odjax.lowrank.chain import prune_moments as prune_moments
from odjax.lowrank.chain import restart as restart
from odjax.lowrank.gradient import RacLoraState as RacLoraState
from odjax.lowrank.gradient import average_over as average_over
from odjax.lowrank.gradient import rac_lora as rac_lora
from odjax.lowrank.guard import GUARD as GUARD
from odjax.lowrank.guard import Guard as Guard
from odjax.lowrank.guard import GuardHead as GuardHead
from odjax.lowrank.guard import Verdict as Verdict
from odjax.lowrank.guard import last_token as last_token
from odjax.lowrank.guard_loss import PositiveWeights as PositiveWeights
from odjax.lowrank.guard_loss import guard_loss as guard_loss
from odjax.lowrank.guard_loss import positive_weights as positive_weights
from odjax.lowrank.merge import init_factors as init_factors
from odjax.lowrank.merge import merge as merge
from odjax.lowrank.merge import start_from as start_from
from odjax.lowrank.merge import unmerge as unmerge
from odjax.lowrank.methods import ADDED as ADDED
from odjax.lowrank.methods import FACTORS as FACTORS
from odjax.lowrank.methods import LowRank as LowRank
from odjax.lowrank.nested import at_rank as at_rank
from odjax.lowrank.nested import model_at as model_at
from odjax.lowrank.nested import slice_rank as slice_rank
from odjax.lowrank.nested import unslice as unslice
from odjax.lowrank.parameters import ParameterAdapter as ParameterAdapter
from odjax.lowrank.parameters import parameter_adapter as parameter_adapter
from odjax.lowrank.sketches import LAWS as LAWS
from odjax.lowrank.sketches import Bernoulli as Bernoulli
from odjax.lowrank.sketches import lift as lift
from odjax.lowrank.sketches import project as project
from odjax.lowrank.sketches import sketch as sketch
