# %% [markdown] compute sharing
# ## How many features do n seeds know?
#
# Features of S seeds are grouped in families with at most one member a seed; `sizes` says how many members each has. Choose n of the S seeds at random. Write
# `unique(sizes, S, n)`: how many families do they meet, on average over all choices?


# %% solution
def unique(sizes, S, n):
    ### BEGIN SOLUTION
    from math import comb

    return sum(1 - comb(S - m, n) / comb(S, n) for m in sizes)
    ### END SOLUTION


# %% test 2
assert np.isclose(unique([4, 4, 1], 4, 1), 2.25)
assert np.isclose(unique([4, 4, 1], 4, 4), 3)
### BEGIN HIDDEN TESTS
from itertools import combinations

members = [{0}, {1, 2}, {0, 3, 4}, {0, 1, 2, 3, 4}, {2, 4}]
for n in range(1, 6):
    choices = list(combinations(range(5), n))
    expected = np.mean([sum(bool(set(chosen) & of) for of in members) for chosen in choices])
    assert np.isclose(unique([len(of) for of in members], 5, n), expected)
### END HIDDEN TESTS


# %% wrong
def unique(sizes, S, n):
    return sum(1 - (1 - m / S) ** n for m in sizes)


# %% wrong
def unique(sizes, S, n):
    return len(sizes) * n / S


# %% wrong
def unique(sizes, S, n):
    return sum(m >= n for m in sizes)
