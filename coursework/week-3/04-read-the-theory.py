# %% [markdown] read subspaces
# ## Read the theory
#
# The table says how often a random direction of a block of r dimensions comes back at a cosine of 0.7, if each seed has twice as many directions as dimensions. From
# which r on is such a feature *unstable*, with a stability of at most 0.1? Set `smallest_rank`.

# %% given
{r: round(expected_stability(r, 2 * r), 3) for r in range(2, 41, 2)}

# %% solution
### BEGIN SOLUTION
smallest_rank = next(r for r in range(2, 41, 2) if expected_stability(r, 2 * r) <= 0.1)
### END SOLUTION

# %% test 1
assert 2 <= smallest_rank <= 40
### BEGIN HIDDEN TESTS
assert expected_stability(smallest_rank, 2 * smallest_rank) <= 0.1 < expected_stability(smallest_rank - 2, 2 * (smallest_rank - 2))
### END HIDDEN TESTS

# %% wrong
smallest_rank = 2

# %% wrong
smallest_rank = 40

# %% wrong
smallest_rank = next(r for r in range(2, 41, 2) if expected_stability(r, 2 * r) <= 0.5)
