"""Federated learning, simulated: many clients in one program, on one device or a mesh.

A round samples a cohort, packs the local steps of its clients into lanes (`plan_round`), runs them in one
loop, sums the deltas with one exchange between devices, and steps the server's optimizer (`make_round`).
"""

from odjax.federated.aggregate import Aggregator as Aggregator
from odjax.federated.aggregate import mixed as mixed
from odjax.federated.aggregate import norm_bounded_mean as norm_bounded_mean
from odjax.federated.aggregate import private_sum as private_sum
from odjax.federated.aggregate import secure_sum as secure_sum
from odjax.federated.aggregate import sign_majority as sign_majority
from odjax.federated.aggregate import stacked as stacked
from odjax.federated.aggregate import trimmed_mean as trimmed_mean
from odjax.federated.aggregate import weighted_mean as weighted_mean
from odjax.federated.algorithms import Algorithm as Algorithm
from odjax.federated.algorithms import FederatedState as FederatedState
from odjax.federated.algorithms import fed_avg as fed_avg
from odjax.federated.algorithms import init as init
from odjax.federated.algorithms import make_round as make_round
from odjax.federated.algorithms import scaffold as scaffold
from odjax.federated.clients import Clients as Clients
from odjax.federated.clients import RoundPlan as RoundPlan
from odjax.federated.clients import dirichlet_split as dirichlet_split
from odjax.federated.clients import group_by_client as group_by_client
from odjax.federated.clients import label_shards as label_shards
from odjax.federated.clients import localize as localize
from odjax.federated.clients import plan_round as plan_round
from odjax.federated.dylora import dp_dylora as dp_dylora
from odjax.federated.dylora import draw_rank as draw_rank
from odjax.federated.dylora import fed_dylora as fed_dylora
from odjax.federated.fastest import fastest_lanes as fastest_lanes
from odjax.federated.local import LocalStep as LocalStep
from odjax.federated.local import Shared as Shared
from odjax.federated.local import local_scaffold as local_scaffold
from odjax.federated.local import local_sgd as local_sgd
from odjax.federated.lowrank import chain_round as chain_round
from odjax.federated.lowrank import fed_low_rank as fed_low_rank
from odjax.federated.packing import LanePlan as LanePlan
from odjax.federated.packing import efficiency as efficiency
from odjax.federated.packing import pack_chunks as pack_chunks
from odjax.federated.packing import pack_lanes as pack_lanes
from odjax.federated.population import gather as gather
from odjax.federated.population import population_of as population_of
from odjax.federated.population import scatter as scatter
from odjax.federated.population import split as split
from odjax.federated.server import fed_adam as fed_adam
from odjax.federated.server import fed_avgm as fed_avgm
from odjax.federated.server import server_step as server_step
from odjax.federated.simulate import CohortResult as CohortResult
from odjax.federated.simulate import simulate_cohort as simulate_cohort
from odjax.federated.traffic import Traffic as Traffic
from odjax.federated.traffic import traffic as traffic
