"""Codes of held-out text: encoded once for all experiments of a cell, and what each seed's own encoder gives."""

import numpy as np

from sae_stability.evaluation import sparse_codes
from sae_stability.experiments import codes, ensembles, texts
from sae_stability.pipeline import Plan


def test_each_ensemble_is_encoded_once_and_its_codes_are_those_of_each_seed(quick):
    results = Plan(quick.study).results(quick.cell)
    by_kind = {kind: codes.encoded(results, kind) for kind in ("real", "surrogate")}
    for kind, found in by_kind.items():
        assert codes.encoded(results.reading(frozenset({"evaluation_tokens"})), kind) is found
        ensemble = ensembles.ensemble(results, kind)
        held_out = texts.activations(results, "evaluation", kind).first(codes.CODE_TOKENS)
        assert len(found.matrices()) == len(ensemble.seeds)
        for position, matrix in enumerate(found.matrices()):
            (alone,) = sparse_codes(ensemble.of(position), held_out)
            assert (abs(matrix - alone) > 1e-5).nnz == 0
    assert not np.array_equal(by_kind["real"].matrix(0).data, by_kind["surrogate"].matrix(0).data)
