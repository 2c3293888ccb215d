# %% [markdown] compute triggers
# ## How much does the token tell?
#
# If a feature fires on a word, its activation can be told from the token. Write `explained_by_token(activation, token, fitted)`. On the places where `fitted` is
# true, take the mean activation of each token. On the other places, predict it by that mean, or by the mean of all fitted places if the token was not met. Give
# one less the squared error there, as a share of the squared distance of these activations from *their* mean.


# %% solution
def explained_by_token(activation, token, fitted):
    ### BEGIN SOLUTION
    overall = activation[fitted].mean()
    means = {one: activation[fitted & (token == one)].mean() for one in set(token[fitted].tolist())}
    rest = activation[~fitted]
    guess = np.array([means.get(one, overall) for one in token[~fitted].tolist()])
    return 1 - np.square(rest - guess).sum() / np.square(rest - rest.mean()).sum()
    ### END SOLUTION


# %% test 2
token = np.tile([0, 1, 2, 3], 10)
fitted = np.arange(40) < 20
assert np.isclose(explained_by_token(np.array([0.0, 1, 4, 9])[token], token, fitted), 1)
### BEGIN HIDDEN TESTS
rng = np.random.default_rng(0)
token = rng.integers(0, 5, 400)
activation, fitted = rng.normal(size=400) + 2 * (token == 3), rng.random(400) < 0.5
token[fitted & (token == 4)] = 0  # a token that is not met where the means are taken
rest = activation[~fitted]
guess = np.array(
    [activation[fitted & (token == one)].mean() if (fitted & (token == one)).any() else activation[fitted].mean() for one in token]
)
expected = 1 - np.square(rest - guess[~fitted]).sum() / np.square(rest - rest.mean()).sum()
assert np.isclose(explained_by_token(activation, token, fitted), expected)
noise, many = rng.normal(size=400), np.arange(400) // 2
assert explained_by_token(noise, many, np.arange(400) % 2 == 0) < 0
### END HIDDEN TESTS


# %% wrong
def explained_by_token(activation, token, fitted):
    guess = np.array([activation[token == one].mean() for one in token])[~fitted]
    rest = activation[~fitted]
    return 1 - np.square(rest - guess).sum() / np.square(rest - rest.mean()).sum()


# %% wrong
def explained_by_token(activation, token, fitted):
    means = {one: activation[fitted & (token == one)].mean() for one in set(token[fitted].tolist())}
    rest = activation[~fitted]
    guess = np.array([means.get(one, 0.0) for one in token[~fitted].tolist()])
    return 1 - np.square(rest - guess).sum() / np.square(rest - rest.mean()).sum()


# %% wrong
def explained_by_token(activation, token, fitted):
    overall = activation[fitted].mean()
    means = {one: activation[fitted & (token == one)].mean() for one in set(token[fitted].tolist())}
    guess = np.array([means.get(one, overall) for one in token[~fitted].tolist()])
    return max(0.0, np.corrcoef(activation[~fitted], guess)[0, 1] ** 2) if guess.std() else 0.0
