# %% [markdown] design stability
# ## Design a null
#
# SAEs that are trained on data without features may come back too, because data have strong directions. Write `surrogate(x, rng)`: from activations x [token,
# d_in] and a random generator it draws as many *new* activations with the same mean and covariance, and nothing else in common with them: each is normal,
# and independent of x but for these moments.


# %% solution
def surrogate(x, rng):
    ### BEGIN SOLUTION
    return rng.multivariate_normal(x.mean(0), np.cov(x.T), size=len(x))
    ### END SOLUTION


# %% test 2
rng = np.random.default_rng(0)
mixed = np.exp(rng.normal(size=(40_000, 3))) @ np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.0, 0.0, 2.0]]) + [5, 0, -5]
drawn = surrogate(mixed, np.random.default_rng(1))
assert drawn.shape == mixed.shape
assert np.allclose(drawn.mean(0), mixed.mean(0), atol=0.15)
### BEGIN HIDDEN TESTS
assert np.allclose(np.cov(drawn.T), np.cov(mixed.T), rtol=0.1, atol=0.5)
assert (np.abs(stats.kurtosis(drawn)) < 0.2).all()
assert np.isin(drawn[:, 0], mixed[:, 0]).mean() < 0.01
assert not np.array_equal(drawn, surrogate(mixed, np.random.default_rng(2)))
### END HIDDEN TESTS


# %% wrong
def surrogate(x, rng):
    return rng.permutation(x)


# %% wrong
def surrogate(x, rng):
    return rng.normal(x.mean(0), x.std(0), size=x.shape)


# %% wrong
def surrogate(x, rng):
    return np.stack([rng.permutation(column) for column in x.T], axis=1)
