# %% [markdown] compute asked
# ## One to one
#
# Some papers pair the features of two SAEs one to one. Write `mcc(A, B)` for directions of length 1, two arrays [feature, d_in] of the same size: the largest mean
# cosine that a pairing of all features has, in which each feature is used once.


# %% solution
def mcc(A, B):
    ### BEGIN SOLUTION
    from scipy.optimize import linear_sum_assignment

    cosines = A @ B.T
    return cosines[linear_sum_assignment(cosines, maximize=True)].mean()
    ### END SOLUTION


# %% test 1
assert np.isclose(mcc(np.eye(4), np.eye(4)[[2, 0, 3, 1]]), 1)
### BEGIN HIDDEN TESTS
rng = np.random.default_rng(0)
for _ in range(8):
    A, B = rng.normal(size=(2, 5, 3))
    A, B = A / np.linalg.norm(A, axis=1, keepdims=True), B / np.linalg.norm(B, axis=1, keepdims=True)
    best = max((A * B[list(order)]).sum(1).mean() for order in permutations(range(5)))
    assert np.isclose(mcc(A, B), best)
### END HIDDEN TESTS


# %% wrong
def mcc(A, B):
    return (A @ B.T).max(1).mean()


# %% wrong
def mcc(A, B):
    cosines, total = A @ B.T, 0.0
    for row in range(len(A)):
        best = cosines[row].argmax()
        total += cosines[row, best]
        cosines[:, best] = -np.inf
    return total / len(A)


# %% wrong
def mcc(A, B):
    return (A * B).sum(1).mean()
