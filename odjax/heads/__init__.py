"""Heads: fixed classifiers, pooling of tokens, moment probing, and statistics of neural collapse.

`FixedHead` is a classifier without trainable weights on a `ClassCode`; `code_cross_entropy` its loss for
vocabularies. Poolings of tokens share one interface (`odjax.heads.pooling`).
"""

from odjax.heads.classifier import Classifier as Classifier
from odjax.heads.codes import ClassCode as ClassCode
from odjax.heads.codes import class_code as class_code
from odjax.heads.codes import etf_matrix as etf_matrix
from odjax.heads.codes import extend_code as extend_code
from odjax.heads.fixed import FixedHead as FixedHead
from odjax.heads.fixed import keep_constant as keep_constant
from odjax.heads.hadamard import hadamard_logits as hadamard_logits
from odjax.heads.hadamard import walsh_hadamard as walsh_hadamard
from odjax.heads.losses import batch_class_lengths as batch_class_lengths
from odjax.heads.losses import dot_regression_loss as dot_regression_loss
from odjax.heads.losses import etf_logits as etf_logits
from odjax.heads.losses import scale_for_probability as scale_for_probability
from odjax.heads.vocab import TokenLosses as TokenLosses
from odjax.heads.vocab import code_cross_entropy as code_cross_entropy
