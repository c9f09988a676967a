"""Differential privacy: sampling, clipping, noise and accounting behind one plan object.

`privacy_plan` calibrates the noise to a budget and gives the cohort sampler, the clip and the noise that its
epsilon is about. Its accountants need `pip install 'odjax[privacy]'`; importing this package does not.
"""

from odjax.privacy.accounting import epsilon_of as epsilon_of
from odjax.privacy.budget import calibrate as calibrate
from odjax.privacy.budget import rounds_within as rounds_within
from odjax.privacy.clipping import Clip as Clip
from odjax.privacy.dp_sgd import PerExample as PerExample
from odjax.privacy.dp_sgd import private_gradient as private_gradient
from odjax.privacy.forecast import PrivacyForecast as PrivacyForecast
from odjax.privacy.noise import PrivatizerState as PrivatizerState
from odjax.privacy.noise import gaussian_noise as gaussian_noise
from odjax.privacy.noise import privatizer as privatizer
from odjax.privacy.plan import Guarantee as Guarantee
from odjax.privacy.plan import PrivacyPlan as PrivacyPlan
from odjax.privacy.plan import privacy_plan as privacy_plan
from odjax.privacy.sampling import Sample as Sample
from odjax.privacy.sampling import fixed_sample as fixed_sample
from odjax.privacy.sampling import poisson_capacity as poisson_capacity
from odjax.privacy.sampling import poisson_sample as poisson_sample
