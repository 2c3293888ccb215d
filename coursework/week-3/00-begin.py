# %% [markdown]
# # Week 3: subspaces, worlds and pools
#
# A feature that does not come back may lie in a subspace that does. In a world that we make ourselves the truth is known, and many seeds can be pooled.

# %% given
import numpy as np
import torch
from scipy import stats

from sae_stability.book import page
from sae_stability.figures import subspaces as figures
from sae_stability.matching.theory import expected_stability
from sae_stability.subspaces.geometry import effective_rank as entropy_rank
from sae_stability.subspaces.geometry import principal_angles

book = page.open_study("quick")
