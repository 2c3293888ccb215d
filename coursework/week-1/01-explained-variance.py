# %% [markdown] compute setup
# ## Explained variance
#
# Write `explained_variance(x, x_hat)` for activations and their reconstructions, both arrays [token, d_in]: one less the squared error over all tokens, as
# a share of the squared distance of the activations from their mean.


# %% solution
def explained_variance(x, x_hat):
    ### BEGIN SOLUTION
    return 1 - np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum()
    ### END SOLUTION


# %% test 1
x = np.random.default_rng(0).normal(size=(50, 4)) * [1, 2, 3, 4] + 10
assert np.isclose(explained_variance(x, x), 1)
assert np.isclose(explained_variance(x, np.broadcast_to(x.mean(0), x.shape)), 0)
### BEGIN HIDDEN TESTS
noise = np.random.default_rng(1).normal(size=x.shape) * np.linspace(0.1, 2, 50)[:, None]
assert np.isclose(explained_variance(x, x + noise), 1 - np.square(noise).sum() / np.square(x - x.mean(0)).sum())
assert explained_variance(x, x + 100) < 0
### END HIDDEN TESTS


# %% wrong
def explained_variance(x, x_hat):
    return 1 - np.square(x - x_hat).sum() / np.square(x).sum()


# %% wrong
def explained_variance(x, x_hat):
    return np.corrcoef(x.ravel(), x_hat.ravel())[0, 1] ** 2


# %% wrong
def explained_variance(x, x_hat):
    return 1 - (np.square(x - x_hat).sum(1) / np.square(x - x.mean(0)).sum(1)).mean()
