# %% [markdown] compute rules
# ## An interval over seeds
#
# A pair statistic has a value for each pair of S seeds. A seed takes part in many pairs, so the pairs are not independent. Write `jackknife(values)` for a
# matrix [seed, seed] whose diagonal is `nan`. It gives the mean over all pairs and the ends of its 95 % interval: leave out each seed in turn, take the mean over
# the pairs of the others, and let e be the root of (S - 1) / S times the sum of the squared distances of these S means from their mean. The ends lie t e away from
# the mean over all pairs, t being the 97.5 % quantile of Student's law with S - 1 degrees of freedom.


# %% solution
def jackknife(values):
    ### BEGIN SOLUTION
    S = len(values)
    means = []
    for seed in range(S):
        others = np.delete(np.delete(values, seed, 0), seed, 1)
        means.append(np.nanmean(others))
    error = np.sqrt((S - 1) / S * np.square(np.array(means) - np.mean(means)).sum())
    value, reach = np.nanmean(values), stats.t.ppf(0.975, S - 1) * error
    return value, value - reach, value + reach
    ### END SOLUTION


# %% test 2
values = np.full((4, 4), 0.3)
np.fill_diagonal(values, np.nan)
assert np.allclose(jackknife(values), 0.3)
### BEGIN HIDDEN TESTS
for seeds in (4, 7):
    values = np.random.default_rng(seeds).random((seeds, seeds))
    np.fill_diagonal(values, np.nan)
    expected = statistics.over_pairs(values)
    assert np.allclose(jackknife(values), (expected.value, expected.low, expected.high))
### END HIDDEN TESTS


# %% wrong
def jackknife(values):
    pairs = values[~np.isnan(values)]
    reach = stats.t.ppf(0.975, len(pairs) - 1) * pairs.std(ddof=1) / len(pairs) ** 0.5
    return pairs.mean(), pairs.mean() - reach, pairs.mean() + reach


# %% wrong
def jackknife(values):
    S = len(values)
    means = [np.nanmean(np.delete(np.delete(values, seed, 0), seed, 1)) for seed in range(S)]
    reach = stats.t.ppf(0.975, S - 1) * np.std(means, ddof=1) / S**0.5
    return np.nanmean(values), np.nanmean(values) - reach, np.nanmean(values) + reach


# %% wrong
def jackknife(values):
    S = len(values)
    means = [np.nanmean(np.delete(values, seed, 0)) for seed in range(S)]
    reach = stats.t.ppf(0.975, S - 1) * np.sqrt((S - 1) / S * np.square(np.array(means) - np.mean(means)).sum())
    return np.nanmean(values), np.nanmean(values) - reach, np.nanmean(values) + reach
