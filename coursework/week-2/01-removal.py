# %% [markdown] compute function
# ## Take a set away
#
# Codes z [token, feature] and directions W [feature, d_in] give the reconstruction z W + b of activations x. Write `removal(x, z, W, b, members)`: by how much
# the squared error, summed over all tokens, grows if all features of the set are set to zero together. `members` is an array of feature numbers.


# %% solution
def removal(x, z, W, b, members):
    ### BEGIN SOLUTION
    kept = z.copy()
    kept[:, members] = 0
    return np.square(x - b - kept @ W).sum() - np.square(x - b - z @ W).sum()
    ### END SOLUTION


# %% test 2
rng = np.random.default_rng(0)
z, W, b = np.maximum(rng.normal(size=(30, 5)), 0), rng.normal(size=(5, 3)), rng.normal(size=3)
x = z @ W + b
assert np.isclose(removal(x, z, W, b, np.array([], dtype=int)), 0)
assert np.isclose(removal(x, z, W, b, np.array([1, 3])), np.square(z[:, [1, 3]] @ W[[1, 3]]).sum())
### BEGIN HIDDEN TESTS
before, x = z.copy(), x + rng.normal(size=x.shape)
for members in ([0], [0, 1], [4, 2, 0]):
    part = z[:, members] @ W[members]
    assert np.isclose(removal(x, z, W, b, np.array(members)), (np.square(part) + 2 * part * (x - b - z @ W)).sum())
assert np.array_equal(z, before), "removal changes the codes that it was given"
### END HIDDEN TESTS


# %% wrong
def removal(x, z, W, b, members):
    return np.square(z[:, members] @ W[members]).sum()


# %% wrong
def removal(x, z, W, b, members):
    whole, lost = x - b - z @ W, 0.0
    for one in members:
        lost += np.square(whole + np.outer(z[:, one], W[one])).sum() - np.square(whole).sum()
    return lost


# %% wrong
def removal(x, z, W, b, members):
    z[:, members] = 0
    return np.square(x - b - z @ W).sum()
