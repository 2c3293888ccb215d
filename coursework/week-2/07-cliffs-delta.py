# %% [markdown] compute triggers
# ## Cliff's delta
#
# Do unstable features fire less often? Write `cliffs_delta(a, b)`: the chance that a value of a is larger than one of b, less the chance that it is smaller. It
# lies between -1 and 1, and ties count for neither side.


# %% solution
def cliffs_delta(a, b):
    ### BEGIN SOLUTION
    return np.sign(np.subtract.outer(a, b)).mean()
    ### END SOLUTION


# %% test 1
assert np.isclose(cliffs_delta(np.array([3, 4]), np.array([1, 2])), 1)
assert np.isclose(cliffs_delta(np.array([1, 2]), np.array([1, 2])), 0)
### BEGIN HIDDEN TESTS
one, other = np.random.default_rng(0).integers(0, 5, 30), np.random.default_rng(1).integers(1, 6, 20)
pairs = [(a > b) - (a < b) for a in one.tolist() for b in other.tolist()]
assert np.isclose(cliffs_delta(one, other), np.mean(pairs))
### END HIDDEN TESTS


# %% wrong
def cliffs_delta(a, b):
    return (np.subtract.outer(a, b) > 0).mean()


# %% wrong
def cliffs_delta(a, b):
    return 2 * (np.subtract.outer(a, b) >= 0).mean() - 1


# %% wrong
def cliffs_delta(a, b):
    return np.sign(np.subtract.outer(b, a)).mean()
