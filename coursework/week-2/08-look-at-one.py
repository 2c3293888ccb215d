# %% [markdown] read explorer
# ## Look at one
#
# Open *Look at the features* in the book of `quick`. The list of the first SAE is sorted by how often features come back, and then by how often they fire. Open the
# first one. Set `token` to the token on which it fires most strongly.

# %% given
from sae_stability.experiments import examples

# %% solution
### BEGIN SOLUTION
live = book.table("features").query("kind == 'real' and alive")
first = live[live["seed"] == book.cell.seed_list[0]].sort_values(["matches", "frequency"], ascending=False).iloc[0]
window = examples.seen(book.main, 0).query("feature == @first.feature and rank == 1").iloc[0]
token = window["tokens"][window["peak"] - window["first"]]
### END SOLUTION

# %% test 1
assert isinstance(token, str)
### BEGIN HIDDEN TESTS
rows = book.table("features").query("kind == 'real' and alive")
best = rows[rows["seed"] == rows["seed"].iloc[0]].nlargest(1, ["matches", "frequency"])["feature"].iloc[0]
shown = examples.seen(book.main, 0)
shown = shown[(shown["feature"] == best) & (shown["rank"] == 1)].iloc[0]
assert token.replace("↵", "\n").strip(" ") == shown["tokens"][shown["peak"] - shown["first"]].strip(" ")
### END HIDDEN TESTS

# %% wrong
token = "feature"

# %% wrong
token = examples.seen(book.main, 0)["tokens"].iloc[0][0]

# %% wrong
token = None
