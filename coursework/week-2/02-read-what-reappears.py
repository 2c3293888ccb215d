# %% [markdown] read function
# ## Which share of the energy reappears?
#
# The figure says how much of the features of an SAE reappears in another seed, if each counts as one, by its energy, or by what its removal costs; of the model and
# of its surrogate. Set `energy_more` to how much larger the share is by energy than by number in the model: a difference between -1 and 1, right within 0.03.

# %% given
figures.reappearing(book.table("reappearing"), "How much reappears in another seed")

# %% solution
### BEGIN SOLUTION
shares = book.table("reappearing").query("kind == 'real'").set_index("weight")["share"]
energy_more = shares["energy"] - shares["features"]
### END SOLUTION

# %% test 1
assert -1 <= energy_more <= 1
### BEGIN HIDDEN TESTS
read = book.table("reappearing").query("kind == 'real'").set_index("weight")["share"]
assert abs(energy_more - (read["energy"] - read["features"])) < 0.03
### END HIDDEN TESTS

# %% wrong
energy_more = 1.0

# %% wrong
rows = book.table("reappearing").query("kind == 'real'").set_index("weight")["share"]
energy_more = rows["features"] - rows["energy"]

# %% wrong
rows = book.table("reappearing").query("kind == 'real'").set_index("weight")["share"]
energy_more = rows["energy"]
