# %% [markdown]
# # Week 4: inference, studies and variants
#
# When may one say that a claim holds, in one model and in many? And how would you build an SAE of your own?

# %% given
from itertools import permutations

import numpy as np
import torch
from scipy import stats

from sae_stability import statistics
from sae_stability.book import page
from sae_stability.saes.reference import DenseTopK, Forward, pre_activations, squared_error

book = page.open_study("quick")
