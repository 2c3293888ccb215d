# %% [markdown] compute subspaces
# ## Effective rank
#
# How many dimensions does a set of directions fill? Write `effective_rank(rows)` for an array [feature, d_in]: bring each row to length 1, take the singular values
# as shares of their sum, and give the exponential of the entropy of these shares (Roy and Vetterli 2007).


# %% solution
def effective_rank(rows):
    ### BEGIN SOLUTION
    values = np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False)
    shares = values[values > 1e-12] / values.sum()
    return np.exp(-(shares * np.log(shares)).sum())
    ### END SOLUTION


# %% test 1
assert np.isclose(effective_rank(np.eye(5)), 5)
assert np.isclose(effective_rank(np.ones((4, 3))), 1)
### BEGIN HIDDEN TESTS
rows = np.random.default_rng(0).normal(size=(20, 6)) * [1, 1, 2, 3, 5, 8]
rows[3] *= 100
assert np.isclose(effective_rank(rows), entropy_rank(torch.from_numpy(rows)))
### END HIDDEN TESTS


# %% wrong
def effective_rank(rows):
    values = np.square(np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False))
    shares = values[values > 1e-12] / values.sum()
    return np.exp(-(shares * np.log(shares)).sum())


# %% wrong
def effective_rank(rows):
    values = np.linalg.svd(rows, compute_uv=False)
    shares = values[values > 1e-12] / values.sum()
    return np.exp(-(shares * np.log(shares)).sum())


# %% wrong
def effective_rank(rows):
    return np.linalg.matrix_rank(rows)
