# %% [markdown] compute synthetic
# ## How often does a random axis come back?
#
# In a block of r dimensions each seed draws M directions at random. Write `returns(r, M, tau)`: the chance that the nearest of the M directions of another seed has
# a cosine of at least tau with a given one. For r dimensions the squared cosine of two random directions follows a Beta(1/2, (r - 1)/2) law, and half of
# the cosines are negative.


# %% solution
def returns(r, M, tau):
    ### BEGIN SOLUTION
    one = stats.beta.sf(tau**2, 0.5, (r - 1) / 2) / 2
    return 1 - (1 - one) ** M
    ### END SOLUTION


# %% test 2
assert np.isclose(returns(2, 1, 0.5), 1 / 3)  # an angle of at most 60 degrees to either side
### BEGIN HIDDEN TESTS
for r, M, tau in ((2, 4, 0.7), (8, 16, 0.7), (16, 32, 0.5), (3, 1, 0.9)):
    assert np.isclose(returns(r, M, tau), expected_stability(r, M, tau))
### END HIDDEN TESTS


# %% wrong
def returns(r, M, tau):
    return 1 - (1 - stats.beta.sf(tau**2, 0.5, (r - 1) / 2)) ** M


# %% wrong
def returns(r, M, tau):
    return M * stats.beta.sf(tau**2, 0.5, (r - 1) / 2) / 2


# %% wrong
def returns(r, M, tau):
    return 1 - (1 - stats.beta.sf(tau, 0.5, (r - 1) / 2) / 2) ** M
