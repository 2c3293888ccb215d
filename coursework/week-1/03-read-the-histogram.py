# %% [markdown] read stability
# ## Read the histogram
#
# The figure shows in how many other seeds the features of the study `quick` come back. A feature is *unstable* if it comes back in at most a tenth of them,
# here in none. Which share of the live features is unstable? Set `unstable_share` to a number between 0 and 1, right within 0.03.

# %% given
live = book.table("features").query("kind == 'real' and alive")
figures.against_nulls(live, "In how many other seeds features come back")

# %% solution
### BEGIN SOLUTION
unstable_share = (live["band"] == "unstable").mean()
### END SOLUTION

# %% test 1
assert 0 <= unstable_share <= 1
### BEGIN HIDDEN TESTS
counted = book.table("features").query("kind == 'real' and alive")["band"].value_counts(normalize=True)
assert abs(unstable_share - counted["unstable"]) < 0.03
### END HIDDEN TESTS

# %% wrong
unstable_share = 100 * (live["band"] == "unstable").mean()

# %% wrong
unstable_share = 1 - (live["band"] == "unstable").mean()

# %% wrong
unstable_share = 0.5 * (live["band"] == "unstable").mean()
