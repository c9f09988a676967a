"""Heads: fixed classifiers, pooling of tokens, moment probing, and statistics of neural collapse.

`FixedHead` is a classifier without trainable weights on a `ClassCode`; `code_cross_entropy` its loss for
vocabularies. Poolings of tokens share one interface (`odjax.heads.pooling`).
"""

from odjax.heads.classifier import Classifier as Classifier
from odjax.heads.codes import ClassCode as ClassCode
from odjax.heads.codes import class_code as class_code
from odjax.heads.codes import etf_matrix as etf_matrix
from odjax.heads.codes import extend_code as extend_code
from odjax.heads.collapse import collapse_gram as collapse_gram
from odjax.heads.collapse import collapse_metrics as collapse_metrics
from odjax.heads.fixed import FixedHead as FixedHead
from odjax.heads.fixed import keep_constant as keep_constant
from odjax.heads.ggem import GGeM as GGeM
from odjax.heads.ggem import ggem_pool as ggem_pool
from odjax.heads.hadamard import hadamard_logits as hadamard_logits
from odjax.heads.hadamard import walsh_hadamard as walsh_hadamard
from odjax.heads.losses import batch_class_lengths as batch_class_lengths
from odjax.heads.losses import dot_regression_loss as dot_regression_loss
from odjax.heads.losses import etf_logits as etf_logits
from odjax.heads.losses import scale_for_probability as scale_for_probability
from odjax.heads.margins import hull_distances as hull_distances
from odjax.heads.margins import margin_metrics as margin_metrics
from odjax.heads.margins import one_vs_rest_margins as one_vs_rest_margins
from odjax.heads.moment_probing import MHC3 as MHC3
from odjax.heads.moment_probing import MomentProbe as MomentProbe
from odjax.heads.moment_probing import feature_size as feature_size
from odjax.heads.pooling import TokenPool as TokenPool
from odjax.heads.pooling import max_pool as max_pool
from odjax.heads.pooling import mean_pool as mean_pool
from odjax.heads.pooling import token_pooling as token_pooling
from odjax.heads.recalibration import PSRP as PSRP
from odjax.heads.recalibration import recalibrate as recalibrate
from odjax.heads.recalibration import recalibrate_output as recalibrate_output
from odjax.heads.second_moments import column_normalize as column_normalize
from odjax.heads.second_moments import cross_moments as cross_moments
from odjax.heads.second_moments import head_pairs as head_pairs
from odjax.heads.vocab import TokenLosses as TokenLosses
from odjax.heads.vocab import code_cross_entropy as code_cross_entropy
