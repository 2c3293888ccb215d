# %% [markdown]
# # Week 1: do features come back?
#
# A sparse autoencoder (SAE) writes an activation as a sum of a few *features*. Train it again with another seed, and compare. Each exercise says what your
# function takes and gives. Replace the line `raise NotImplementedError()`; the cell below tells whether you are on the way, and the
# grade rests on more cases of the same kind.

# %% given
import numpy as np
import torch
from scipy import stats

from sae_stability.book import page
from sae_stability.figures import stability as figures
from sae_stability.matching import stability as reappearance

book = page.open_study("quick")  # computed when it is first asked for, in some minutes
