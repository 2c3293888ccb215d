# %% [markdown] compute pooling
# ## One feature out of many
#
# A *star* has a feature and, of each other seed, the feature most like it, if their cosine reaches the threshold. Write `star_mean(W, seed, feature, threshold)` for
# directions W of length 1, [seed, feature, d_in]: the mean of the members' directions, brought to length 1.


# %% solution
def star_mean(W, seed, feature, threshold):
    ### BEGIN SOLUTION
    medoid = W[seed, feature]
    members = [medoid]
    for other in range(len(W)):
        cosines = W[other] @ medoid
        if other != seed and cosines.max() >= threshold:
            members.append(W[other, cosines.argmax()])
    mean = np.mean(members, axis=0)
    return mean / np.linalg.norm(mean)
    ### END SOLUTION


# %% test 2
W = np.array([[[1.0, 0], [0, 1]], [[0.8, 0.6], [-1, 0]]])
assert np.allclose(star_mean(W, 0, 0, 0.7), np.array([3, 1]) / 10**0.5)
assert np.allclose(star_mean(W, 0, 0, 0.9), [1, 0])
### BEGIN HIDDEN TESTS
rng = np.random.default_rng(0)
true = rng.normal(size=(1, 5, 20))
W = true + 0.3 * rng.normal(size=(6, 5, 20))
W = np.stack([one[rng.permutation(5)] for one in W])
W /= np.linalg.norm(W, axis=2, keepdims=True)
for feature in range(5):
    mean = star_mean(W, 2, feature, 0.7)
    assert np.isclose(np.linalg.norm(mean), 1)
    own = true[0, (true[0] @ W[2, feature] / np.linalg.norm(true[0], axis=1)).argmax()]
    assert own @ mean / np.linalg.norm(own) > own @ W[2, feature] / np.linalg.norm(own)
    members = [W[t, (W[t] @ W[2, feature]).argmax()] for t in range(6)]
    expected = np.sum([one for one in members if one @ W[2, feature] >= 0.7], axis=0)
    assert np.allclose(mean, expected / np.linalg.norm(expected))
### END HIDDEN TESTS


# %% wrong
def star_mean(W, seed, feature, threshold):
    medoid = W[seed, feature]
    return np.mean([W[t, (W[t] @ medoid).argmax()] for t in range(len(W)) if (W[t] @ medoid).max() >= threshold], axis=0)


# %% wrong
def star_mean(W, seed, feature, threshold):
    medoid = W[seed, feature]
    mean = np.sum([W[t, (W[t] @ medoid).argmax()] for t in range(len(W))], axis=0)
    return mean / np.linalg.norm(mean)


# %% wrong
def star_mean(W, seed, feature, threshold):
    near = [row for one in W for row in one if row @ W[seed, feature] >= threshold]
    return W[seed, feature] if len(near) < 2 else np.sum(near[1:], axis=0) / np.linalg.norm(np.sum(near[1:], axis=0))
