"""Continual learning: training on as data and tasks keep coming."""

from odjax.continual.shrink_perturb import shrink_perturb as shrink_perturb
