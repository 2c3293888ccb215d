# %% [markdown] compute subspaces
# ## Overlap of two subspaces
#
# Write `overlap(A, B)` for two sets of r linearly independent directions each, arrays [d_in, r] with the directions as columns: the mean squared cosine of the
# principal angles between the subspaces that they span. It is 1 for the same subspace, whichever directions span it.


# %% solution
def overlap(A, B):
    ### BEGIN SOLUTION
    one, other = np.linalg.qr(A)[0], np.linalg.qr(B)[0]
    return np.square(one.T @ other).sum() / A.shape[1]
    ### END SOLUTION


# %% test 2
rng = np.random.default_rng(0)
A = rng.normal(size=(8, 3))
assert np.isclose(overlap(A, A @ rng.normal(size=(3, 3))), 1)
assert np.isclose(overlap(np.eye(6)[:, :3], np.eye(6)[:, 3:]), 0)
### BEGIN HIDDEN TESTS
for _ in range(5):
    A, B = rng.normal(size=(2, 8, 3)) * [1, 5, 0.1]
    angles = np.radians(principal_angles(np.linalg.qr(A)[0], np.linalg.qr(B)[0]))
    assert np.isclose(overlap(A, B), np.square(np.cos(angles)).mean())
### END HIDDEN TESTS


# %% wrong
def overlap(A, B):
    A, B = A / np.linalg.norm(A, axis=0), B / np.linalg.norm(B, axis=0)
    return np.square(A.T @ B).sum() / A.shape[1]


# %% wrong
def overlap(A, B):
    return np.linalg.svd(np.linalg.qr(A)[0].T @ np.linalg.qr(B)[0], compute_uv=False).mean()


# %% wrong
def overlap(A, B):
    return np.square(np.linalg.qr(A)[0].T @ np.linalg.qr(B)[0]).max(1).mean()
