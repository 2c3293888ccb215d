"""Do features reappear under another seed? Feature stability (PAPER, claim C1), and what it is compared with.

`reappearance.py` holds the definition; `pairs.py` compares two dictionaries, a chunk at a time; `criteria.py` has other ways to
call two features the same, `assignment.py` pairs them one to one, `families.py` groups them over all seeds, and `banding.py`
compares bands in tables.
"""

from sae_stability.matching.assignment import Assignment, assign, mcc
from sae_stability.matching.banding import Banding
from sae_stability.matching.criteria import CRITERIA, by_every_criterion, calibrate, mean_at, mean_mcc
from sae_stability.matching.families import Families, families
from sae_stability.matching.pairs import nearest_within
from sae_stability.matching.reappearance import BANDS, STABLE, UNSTABLE, Stability, at_equal_frequency, band_of, reappear, stability

__all__ = [
    "BANDS",
    "CRITERIA",
    "STABLE",
    "UNSTABLE",
    "Assignment",
    "Banding",
    "Families",
    "Stability",
    "assign",
    "at_equal_frequency",
    "band_of",
    "by_every_criterion",
    "calibrate",
    "families",
    "mcc",
    "mean_at",
    "mean_mcc",
    "nearest_within",
    "reappear",
    "stability",
]
