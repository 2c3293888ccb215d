# %% [markdown] compute stability
# ## How sure is one stability?
#
# A feature that comes back in m of n other seeds has the stability m / n. Write `interval(m, n)`, the ends of the exact 95 % interval (Clopper and Pearson
# 1934): the probabilities at which m or more, and m or fewer, successes of n have a chance of 2.5 %. At m = 0 the low end is 0, and at m = n the high one is 1.


# %% solution
def interval(m, n):
    ### BEGIN SOLUTION
    low = stats.beta.ppf(0.025, m, n - m + 1) if m > 0 else 0.0
    high = stats.beta.ppf(0.975, m + 1, n - m) if m < n else 1.0
    return low, high
    ### END SOLUTION


# %% test 1
assert np.allclose(interval(0, 10), (0, 1 - 0.025 ** (1 / 10)))
### BEGIN HIDDEN TESTS
assert np.allclose(interval(10, 10), (0.025 ** (1 / 10), 1))
for m, n in ((3, 10), (1, 4), (9, 20)):
    low, high = interval(m, n)
    assert np.isclose(stats.binom.sf(m - 1, n, low), 0.025, atol=1e-6)
    assert np.isclose(stats.binom.cdf(m, n, high), 0.025, atol=1e-6)
### END HIDDEN TESTS


# %% wrong
def interval(m, n):
    p, reach = m / n, 1.96 * (m / n * (1 - m / n) / n) ** 0.5
    return p - reach, p + reach


# %% wrong
def interval(m, n):
    low = stats.beta.ppf(0.05, m, n - m + 1) if m > 0 else 0.0
    high = stats.beta.ppf(0.95, m + 1, n - m) if m < n else 1.0
    return low, high


# %% wrong
def interval(m, n):
    return stats.beta.ppf(0.025, m + 1, n - m + 1), stats.beta.ppf(0.975, m + 1, n - m + 1)
