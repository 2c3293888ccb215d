# %% [markdown] compute activity
# ## Do two features fire on the same tokens?
#
# Two features may point the same way and fire on other tokens. Write `jaccard(a, b)` for their activations on the same tokens: of the tokens on which either
# fires (an activation above 0), the share on which both do. Where neither ever fires it is `nan`.


# %% solution
def jaccard(a, b):
    ### BEGIN SOLUTION
    either = ((a > 0) | (b > 0)).sum()
    return ((a > 0) & (b > 0)).sum() / either if either else np.nan
    ### END SOLUTION


# %% test 1
assert np.isclose(jaccard(np.array([0, 1, 2, 0.5]), np.array([0, 3, 0, 0.1])), 2 / 3)
### BEGIN HIDDEN TESTS
assert np.isclose(jaccard(np.array([0.0, 0, 2, 0]), np.array([0.0, 0, 0.1, 0])), 1)
assert np.isclose(jaccard(np.array([1.0, 0]), np.array([0, 1.0])), 0)
assert np.isnan(jaccard(np.zeros(3), np.zeros(3)))
one, other = np.random.default_rng(0).normal(size=(2, 500))
assert np.isclose(jaccard(one, other), jaccard(other, one))
assert np.isclose(jaccard(one, other), ((one > 0) & (other > 0)).sum() / ((one > 0) | (other > 0)).sum())
### END HIDDEN TESTS


# %% wrong
def jaccard(a, b):
    return ((a > 0) & (b > 0)).sum() / max((a > 0).sum(), 1)


# %% wrong
def jaccard(a, b):
    return ((a > 0) == (b > 0)).mean()


# %% wrong
def jaccard(a, b):
    return np.minimum(a, b).sum() / np.maximum(a, b).sum() if (a + b).any() else np.nan
