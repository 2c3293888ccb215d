# %% [markdown] compute across
# ## Many cells
#
# A claim is tested in many cells, each with a p-value. Write `holm(p, level)`: which of them may be called significant, such that the chance of even one mistake
# is at most `level` (Holm 1979). The smallest of n is compared with level / n, the next with level / (n - 1), and so on, up to the first that fails. It gives
# an array of booleans in the order of p.


# %% solution
def holm(p, level):
    ### BEGIN SOLUTION
    found = np.zeros(len(p), dtype=bool)
    for rank, cell in enumerate(np.argsort(p, kind="stable")):
        if p[cell] > level / (len(p) - rank):
            break
        found[cell] = True
    return found
    ### END SOLUTION


# %% test 1
assert np.asarray(holm(np.array([0.04, 0.001, 0.02]), 0.05)).tolist() == [True, True, True]
assert np.asarray(holm(np.array([0.04, 0.03, 0.06]), 0.05)).tolist() == [False, False, False]
### BEGIN HIDDEN TESTS
assert np.asarray(holm(np.array([0.2, 0.011, 0.03, 0.012]), 0.05)).tolist() == [False, True, False, True]
assert np.asarray(holm(np.array([0.012, 0.03, 0.03, 0.03]), 0.05)).tolist() == [True, False, False, False]
assert np.asarray(holm(np.array([0.049, 0.02]), 0.05)).tolist() == [True, True]
### END HIDDEN TESTS


# %% wrong
def holm(p, level):
    return p <= level / len(p)


# %% wrong
def holm(p, level):
    order = np.argsort(p)
    found = np.zeros(len(p), dtype=bool)
    passed = np.flatnonzero(p[order] <= level * np.arange(1, len(p) + 1) / len(p))
    found[order[: passed.max() + 1 if len(passed) else 0]] = True
    return found


# %% wrong
def holm(p, level):
    return p <= level
