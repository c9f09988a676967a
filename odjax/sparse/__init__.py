"""Dynamic sparse training: masks that change while a network is trained.

`dst` is the engine around any optimizer; SET, RigL, MEST, GraNet, GMP and static masks are drop and grow
rules on it. Cannistraci-Hebb scores, percolation and topologies of the start are functions of masks alone.
"""

from odjax.sparse.compress import Compressed as Compressed
from odjax.sparse.compress import Series as Series
from odjax.sparse.compress import compress as compress
from odjax.sparse.compress import fits_n_of_m as fits_n_of_m
from odjax.sparse.compress import nm_compress as nm_compress
from odjax.sparse.compress import nm_expand as nm_expand
from odjax.sparse.compress import to_bcsr as to_bcsr
from odjax.sparse.correlation import feature_correlation as feature_correlation
from odjax.sparse.engine import DstState as DstState
from odjax.sparse.engine import dst as dst
from odjax.sparse.init import kaiming as kaiming
from odjax.sparse.init import masked as masked
from odjax.sparse.init import swi as swi
from odjax.sparse.link_prediction import ch_scores as ch_scores
from odjax.sparse.link_prediction import sharded_ch_scores as sharded_ch_scores
from odjax.sparse.mask_trees import apply_masks as apply_masks
from odjax.sparse.masks import NM as NM
from odjax.sparse.masks import Block as Block
from odjax.sparse.masks import Channel as Channel
from odjax.sparse.masks import links as links
from odjax.sparse.masks import pack as pack
from odjax.sparse.masks import unpack as unpack
from odjax.sparse.methods import gmp as gmp
from odjax.sparse.methods import granet as granet
from odjax.sparse.methods import magnitude_masks as magnitude_masks
from odjax.sparse.methods import mest as mest
from odjax.sparse.methods import rigl as rigl
from odjax.sparse.methods import set_ as set_
from odjax.sparse.methods import snip_masks as snip_masks
from odjax.sparse.methods import static as static
from odjax.sparse.methods import ste as ste
from odjax.sparse.path_scores import path_scores as path_scores
from odjax.sparse.percolation import Ends as Ends
from odjax.sparse.percolation import Junction as Junction
from odjax.sparse.percolation import Wiring as Wiring
from odjax.sparse.percolation import live_units as live_units
from odjax.sparse.percolation import percolate as percolate
from odjax.sparse.percolation import restrict_wiring as restrict_wiring
from odjax.sparse.percolation import wiring_of as wiring_of
from odjax.sparse.plans import LeafPlan as LeafPlan
from odjax.sparse.plans import custom as custom
from odjax.sparse.plans import erk as erk
from odjax.sparse.plans import uniform as uniform
from odjax.sparse.removal import keep_count as keep_count
from odjax.sparse.removal import removal_logits as removal_logits
from odjax.sparse.report import degree_histogram as degree_histogram
from odjax.sparse.report import exploration as exploration
from odjax.sparse.report import format_report as format_report
from odjax.sparse.report import observe_links as observe_links
from odjax.sparse.report import overlap as overlap
from odjax.sparse.report import sparsity_report as sparsity_report
from odjax.sparse.topology import brf_mask as brf_mask
from odjax.sparse.topology import bsw_mask as bsw_mask
from odjax.sparse.topology import csti_mask as csti_mask
from odjax.sparse.topology import er_mask as er_mask
from odjax.sparse.topology import plan_masks as plan_masks
