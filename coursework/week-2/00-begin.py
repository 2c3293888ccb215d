# %% [markdown]
# # Week 2: what do features do?
#
# Features that come back are said to carry the signal. To see that, take features away and look what is lost; and ask what a feature fires on.

# %% given
import numpy as np
from scipy.optimize import linear_sum_assignment

from sae_stability.book import page
from sae_stability.figures import function as figures

book = page.open_study("quick")
