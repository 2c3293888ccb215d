"""What sets of features span, and whether the sets of another seed span the same (C7).

`geometry.py` has ranks, overlaps and angles; `written.py` what a set of features adds to the reconstruction of a text; `sets.py`
which sets are compared; `pairs.py` compares those of two seeds; `rows.py` looks at decoder rows alone, as the paper asks;
`copies.py` asks whether unstable features are noisy copies of a common one, `groups.py` whether groups of them come back.
"""

from sae_stability.subspaces.copies import copies
from sae_stability.subspaces.geometry import effective_rank, strongest_axes
from sae_stability.subspaces.pairs import AXES, WRITTEN, Compared, Key, compare, ranks, rule_rank
from sae_stability.subspaces.rows import compare_rows
from sae_stability.subspaces.sets import SEEDS, of_bands, of_null
from sae_stability.subspaces.written import Written, parts_of

__all__ = [
    "AXES", "SEEDS", "WRITTEN", "Compared", "Key", "Written", "compare", "compare_rows", "copies", "effective_rank", "of_bands",
    "of_null", "parts_of", "ranks", "rule_rank", "strongest_axes",
]  # fmt: skip
