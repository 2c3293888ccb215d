# %% [markdown] design function
# ## Find a fair control
#
# Unstable features may fire rarely, and rare features cost little. A control is a stable feature for each unstable one, each used once, that fires about as
# often. Write `control(unstable, stable)` for two arrays of firing frequencies, the second at least as long. It gives, for each unstable feature, the position of
# its control, such that the sum of the distances |log f - log g| is as small as it can be.


# %% solution
def control(unstable, stable):
    ### BEGIN SOLUTION
    distance = np.abs(np.log(unstable)[:, None] - np.log(stable)[None])
    return linear_sum_assignment(distance)[1]
    ### END SOLUTION


# %% test 2
chosen = np.asarray(control(np.array([0.1, 0.01]), np.array([0.5, 0.011, 0.09])))
assert chosen.tolist() == [2, 1]
### BEGIN HIDDEN TESTS
assert np.asarray(control(np.array([0.01]), np.array([0.001, 0.03]))).tolist() == [1]
rng = np.random.default_rng(0)
for size in (5, 20):
    one, other = np.exp(rng.normal(-4, 1, size)), np.exp(rng.normal(-3, 1.5, 3 * size))
    chosen = np.asarray(control(one, other))
    assert len(set(chosen.tolist())) == size
    distance = np.abs(np.log(one)[:, None] - np.log(other)[None])
    rows, columns = linear_sum_assignment(distance)
    assert distance[np.arange(size), chosen].sum() <= distance[rows, columns].sum() + 1e-9
### END HIDDEN TESTS


# %% wrong
def control(unstable, stable):
    return np.abs(np.log(unstable)[:, None] - np.log(stable)[None]).argmin(1)


# %% wrong
def control(unstable, stable):
    left, chosen = list(range(len(stable))), []
    for frequency in unstable:
        best = min(left, key=lambda one: abs(np.log(stable[one]) - np.log(frequency)))
        chosen.append(best)
        left.remove(best)
    return np.array(chosen)


# %% wrong
def control(unstable, stable):
    return linear_sum_assignment(np.abs(unstable[:, None] - stable[None]))[1]
