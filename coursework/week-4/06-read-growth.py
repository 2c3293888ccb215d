# %% [markdown] read scale
# ## Has the training ended?
#
# The table says how large mean stability is as training goes, in the model and in its surrogate. Would longer training move it? Set `gain` to how much larger it is at
# the end than at the snapshot before it, in the model: right within 0.005.

# %% given
growth = book.table("growth")
growth.pivot(index="tokens", columns="kind", values="mean_stability").round(3)

# %% solution
### BEGIN SOLUTION
of_model = growth[growth["kind"] == "real"].sort_values("tokens")["mean_stability"]
gain = of_model.iloc[-1] - of_model.iloc[-2]
### END SOLUTION

# %% test 1
assert -1 <= gain <= 1
### BEGIN HIDDEN TESTS
read = book.table("growth").query("kind == 'real'").set_index("tokens")["mean_stability"].sort_index()
assert abs(gain - (read.iloc[-1] - read.iloc[-2])) < 0.005
### END HIDDEN TESTS

# %% wrong
gain = growth.loc[growth["kind"] == "real", "mean_stability"].max()

# %% wrong
gain = 0.5

# %% wrong
rows = growth[growth["kind"] == "real"].sort_values("tokens")["mean_stability"]
gain = rows.iloc[-1] / rows.iloc[-2]
