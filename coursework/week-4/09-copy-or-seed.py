# %% [markdown] design own
# ## Another seed, or a copy?
#
# Somebody sends you two SAEs "of two seeds", all of whose features come back. Before you believe it, find out whether the second is the first one again, stored
# in another order and at other lengths. Write `is_copy(A, B)` for decoders, two arrays [feature, d_in]: whether each feature of one is a feature of the other at
# another positive length, to rounding. SAEs that are merely alike are no copies, and a feature that points the other way is another feature.


# %% solution
def is_copy(A, B):
    ### BEGIN SOLUTION
    if len(A) != len(B):
        return False
    A, B = (W / np.linalg.norm(W, axis=1, keepdims=True) for W in (A, B))
    cosines = A @ B.T
    return bool(min(cosines.max(0).min(), cosines.max(1).min()) > 1 - 1e-6)
    ### END SOLUTION


# %% test 2
assert is_copy(np.eye(3), np.eye(3))
### BEGIN HIDDEN TESTS
rng = np.random.default_rng(0)
for _ in range(4):
    A = rng.normal(size=(12, 6))
    B = A[rng.permutation(12)] * rng.uniform(0.2, 5, size=(12, 1))
    assert is_copy(A, B)
    assert is_copy(A.astype(np.float32), B)
    assert not is_copy(A, -B)
    assert not is_copy(A, rng.normal(size=(12, 6)))
    assert not is_copy(A, B + 0.1 * rng.normal(size=(12, 6)))
    one_new = np.vstack([B[:-1], rng.normal(size=6)])
    assert not is_copy(A, one_new)
    assert not is_copy(A, np.vstack([A[:-1], A[0]]))
    assert not is_copy(np.vstack([A[:-1], A[0]]), A)
### END HIDDEN TESTS


# %% wrong
def is_copy(A, B):
    return A.shape == B.shape and np.allclose(A, B, atol=1e-5)


# %% wrong
def is_copy(A, B):
    A, B = (W / np.linalg.norm(W, axis=1, keepdims=True) for W in (A, B))
    return bool(np.abs(A @ B.T).max(1).min() > 1 - 1e-6)


# %% wrong
def is_copy(A, B):
    A, B = (W / np.linalg.norm(W, axis=1, keepdims=True) for W in (A, B))
    return bool((A @ B.T).max(1).mean() > 0.9)


# %% wrong
def is_copy(A, B):
    A, B = (W / np.linalg.norm(W, axis=1, keepdims=True) for W in (A, B))
    return bool((A @ B.T).max(1).min() > 1 - 1e-6)
