"""What every chapter imports, and what every chapter finds out of the package: a process that imports this has done both.

Kernels are forked from such a process (`kernels.py`). Where results stand follows from the sources behind them, which are read and
parsed here once.
"""

from contextlib import suppress

import ipykernel.kernelapp  # noqa: F401
import seaborn  # noqa: F401

from sae_stability.book import page  # noqa: F401
from sae_stability.errors import UserError
from sae_stability.loading import load_study
from sae_stability.pipeline import Plan

with suppress(UserError):  # a checkout may lack that study, or its model
    _ = Plan(load_study("embedded")).stages
