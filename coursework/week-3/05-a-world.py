# %% [markdown] design synthetic
# ## Make a world that no SAE can take apart
#
# Write `world(d_in, r, tokens, rng)`: activations [token, d_in] that fill a random subspace of r dimensions, in such a way that no direction in it differs from any
# other: turned within the subspace, the law of the activations stays what it is. Give the activations and an orthonormal basis of the subspace, [d_in, r].


# %% solution
def world(d_in, r, tokens, rng):
    ### BEGIN SOLUTION
    basis = np.linalg.qr(rng.normal(size=(d_in, r)))[0]
    return rng.normal(size=(tokens, r)) @ basis.T, basis
    ### END SOLUTION


# %% test 2
x, basis = world(10, 3, 20_000, np.random.default_rng(0))
assert x.shape == (20_000, 10)
assert np.allclose(basis.T @ basis, np.eye(3))
assert np.allclose(x, x @ basis @ basis.T)
### BEGIN HIDDEN TESTS
inside = x @ basis
assert np.allclose(np.cov(inside.T) / np.cov(inside.T)[0, 0], np.eye(3), atol=0.06)
turns = np.random.default_rng(1).normal(size=(3, 200))
moments = [stats.kurtosis(inside @ (turn / np.linalg.norm(turn))) for turn in [*np.eye(3), *turns.T]]
assert np.ptp(moments) < 0.4, "some directions are unlike others"
assert abs(np.mean(inside)) < 0.05
other = world(10, 3, 100, np.random.default_rng(2))[1]
assert np.square(other.T @ basis).sum() < 2.9, "the subspace is always the same"
### END HIDDEN TESTS


# %% wrong
def world(d_in, r, tokens, rng):
    basis = np.linalg.qr(rng.normal(size=(d_in, r)))[0]
    return (rng.normal(size=(tokens, r)) * (rng.random((tokens, r)) < 0.2)) @ basis.T, basis


# %% wrong
def world(d_in, r, tokens, rng):
    basis = np.linalg.qr(rng.normal(size=(d_in, r)))[0]
    return (rng.normal(size=(tokens, r)) * np.arange(1, r + 1)) @ basis.T, basis


# %% wrong
def world(d_in, r, tokens, rng):
    basis = np.eye(d_in)[:, :r]
    return rng.normal(size=(tokens, r)) @ basis.T, basis
