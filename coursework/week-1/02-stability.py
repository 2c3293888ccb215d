# %% [markdown] compute stability
# ## Stability
#
# Feature i of seed s *comes back* in seed t if its largest cosine with a feature of t reaches the threshold. Write `stability(W, threshold)` for decoder
# directions of length 1, an array [seed, feature, d_in]. It gives, for each feature of each seed, in which share of the *other* seeds it comes back: an
# array [seed, feature].


# %% solution
def stability(W, threshold):
    ### BEGIN SOLUTION
    seeds = len(W)
    back = np.zeros(W.shape[:2])
    for s in range(seeds):
        for t in range(seeds):
            if s != t:
                back[s] += (W[s] @ W[t].T).max(1) >= threshold
    return back / (seeds - 1)
    ### END SOLUTION


# %% test 2
rng = np.random.default_rng(0)
W = rng.normal(size=(3, 6, 8))
W /= np.linalg.norm(W, axis=2, keepdims=True)
same = np.stack([W[0], W[0][::-1], W[0][rng.permutation(6)]])
assert np.allclose(stability(same, 0.999), 1)
### BEGIN HIDDEN TESTS
W = np.concatenate([W, same, -same[:1]])
for threshold in (0.3, 0.5, 0.7):
    expected = reappearance(torch.from_numpy(W), threshold).probability.numpy()
    assert np.allclose(stability(W, threshold), expected)
### END HIDDEN TESTS


# %% wrong
def stability(W, threshold):
    return np.mean([[(one @ other.T).max(1) >= threshold for other in W] for one in W], axis=1)


# %% wrong
def stability(W, threshold):
    others = [[t for t in range(len(W)) if t != s] for s in range(len(W))]
    return np.stack([np.mean([np.abs(W[s] @ W[t].T).max(1) >= threshold for t in others[s]], axis=0) for s in range(len(W))])


# %% wrong
def stability(W, threshold):
    others = [[t for t in range(len(W)) if t != s] for s in range(len(W))]
    return np.stack([np.mean([(W[s] * W[t]).sum(1) >= threshold for t in others[s]], axis=0) for s in range(len(W))])
