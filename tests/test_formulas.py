import re
from typing import get_args

import pytest

from sae_stability import places
from sae_stability.book import formulas
from sae_stability.study import Variants


@pytest.mark.parametrize("variant", get_args(Variants))
def test_every_variant_is_introduced_with_its_paper(variant):
    references = (places.root() / "book" / "references.bib").read_text(encoding="utf-8")
    formula = formulas.FORMULAS[variant]
    assert formula.name.lower() == variant
    assert f"{{{formula.citation}," in references


@pytest.mark.parametrize("variant", get_args(Variants))
def test_equations_go_from_pre_activations_to_the_reconstruction(variant):
    lines = formulas.equations(variant).split("\\\\\n")
    assert [line.split()[0] for line in (lines[0], lines[-2], lines[-1])] == ["u", "z", "\\hat"]
    assert all(line.count("&=") == 1 and line.count("{") == line.count("}") for line in lines)
    assert len(re.findall(r"\w+", max(lines, key=len))) < 16  # what a phone has room for
