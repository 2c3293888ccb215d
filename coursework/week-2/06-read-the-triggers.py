# %% [markdown] read triggers
# ## Read the triggers
#
# Each live feature of `quick` has a *trigger*: what tells when it fires. The table says which share of the features of each band has which. Set `most_common` to the
# name of the trigger that most unstable features have.

# %% given
triggers = book.table("triggers")
triggers.groupby("band")["trigger"].value_counts(normalize=True).unstack(0).round(3)

# %% solution
### BEGIN SOLUTION
most_common = triggers.loc[triggers["band"] == "unstable", "trigger"].value_counts().idxmax()
### END SOLUTION

# %% test 1
assert most_common in set(triggers["trigger"])
### BEGIN HIDDEN TESTS
assert most_common == book.table("triggers").query("band == 'unstable'")["trigger"].mode()[0]
### END HIDDEN TESTS

# %% wrong
most_common = "unstable"

# %% wrong
most_common = triggers.loc[triggers["band"] == "unstable", "trigger"].value_counts().idxmin()

# %% wrong
most_common = triggers.loc[triggers["band"] == "unstable", "trigger"].value_counts().index[1]
