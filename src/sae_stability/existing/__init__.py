"""The stability of SAEs that already exist, in files of any library or in memory (`sae-stability stability`).

comparison  what SAEs have in common
site        on what their features fire
report      all of it in a file that other tools read
"""

from sae_stability.existing.comparison import ENOUGH, Comparison, centred, compare
from sae_stability.existing.report import report
from sae_stability.existing.site import Firings, Site

__all__ = ["ENOUGH", "Comparison", "Firings", "Site", "centred", "compare", "report"]
