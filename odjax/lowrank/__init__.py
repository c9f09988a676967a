"""Low-rank adaptation: chains of random low-rank updates as an optimizer of ordinary parameters."""

from odjax.lowrank.gradient import RacLoraState as RacLoraState
from odjax.lowrank.gradient import average_over as average_over
from odjax.lowrank.gradient import rac_lora as rac_lora
from odjax.lowrank.matrices import DimensionNumbers as DimensionNumbers
from odjax.lowrank.matrices import MatrixView as MatrixView
from odjax.lowrank.matrices import from_matrices as from_matrices
from odjax.lowrank.matrices import to_matrices as to_matrices
from odjax.lowrank.matrices import view_of as view_of
from odjax.lowrank.sketches import LAWS as LAWS
from odjax.lowrank.sketches import Bernoulli as Bernoulli
from odjax.lowrank.sketches import lift as lift
from odjax.lowrank.sketches import project as project
from odjax.lowrank.sketches import sketch as sketch
