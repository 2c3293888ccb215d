"""How well the average of a token's group predicts feature activations: the sums behind it, as a numba kernel.

One pass over the firings; as products of sparse matrices they were written down several times, at twice the time.
"""

import numpy as np
from jaxtyping import Float, Int
from numba import njit
from scipy import sparse

Sums = Float[np.ndarray, "feature"]


def group_sums(
    activations: sparse.csr_array, group: Int[np.ndarray, "token"], fitted: np.ndarray
) -> tuple[Sums, Sums, Sums, Sums, Sums, int]:
    """Per feature of `activations` [token, feature]: its sum over `fitted` tokens, that and its squares over the judged ones, which
    are others whose group has a fitted token; then, predicted to be the average of its group over fitted tokens, the sum of the
    product of activation and prediction and that of squared predictions over judged tokens; and how many these are.

    Raises `ValueError` for lengths that differ: the kernel looks at no bounds.
    """
    if not len(group) == len(fitted) == activations.shape[0]:
        raise ValueError(f"group and fitted: {len(group)} and {len(fitted)} tokens, but activations of {activations.shape[0]}")
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=group[order[:1]] - 1, append=group[order[-1:]] + 1))
    return _group_sums(order, starts, activations.indptr, activations.indices, activations.data, fitted, activations.shape[1])


@njit(nogil=True, cache=True)
def _group_sums(order, starts, indptr, indices, data, fitted, features):
    """`order` has the tokens of a group in a row, from each of `starts` on."""
    of_fitted, total, squares = np.zeros(features), np.zeros(features), np.zeros(features)
    crossed, predicted, judged = np.zeros(features), np.zeros(features), 0
    here, there = np.zeros(features), np.zeros(features)  # of one group
    touched, seen_in = np.empty(features, np.int64), np.full(features, -1)
    for group in range(len(starts) - 1):
        tokens = order[starts[group] : starts[group + 1]]
        known = 0
        for token in tokens:
            known += fitted[token]
        if known == 0:
            continue
        judged += len(tokens) - known
        count = 0
        for token in tokens:
            for place in range(indptr[token], indptr[token + 1]):
                feature, value = indices[place], np.float64(data[place])
                if seen_in[feature] != group:
                    touched[count], seen_in[feature] = feature, group
                    count += 1
                if fitted[token]:
                    here[feature] += value
                else:
                    there[feature] += value
                    squares[feature] += value * value
        for feature in touched[:count]:
            average = here[feature] / known
            of_fitted[feature] += here[feature]
            total[feature] += there[feature]
            crossed[feature] += average * there[feature]
            predicted[feature] += (len(tokens) - known) * average * average
            here[feature], there[feature] = 0, 0
    return of_fitted, total, squares, crossed, predicted, judged
