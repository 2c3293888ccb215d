# %% [markdown] read costs
# ## What does it cost?
#
# A step of training a TopK SAE takes an encoder product of every token with every feature, 2 d_in d_sae operations a token. The rest follows the features that
# fire. Set `operations` to how many operations the encoder products of one SAE of `quick` take over its whole training.

# %% given
recipe = book.cell.recipe
{"d_in": book.facts["d_model"], "d_sae": recipe.d_sae, "tokens": recipe.tokens, "passes": recipe.passes, "batch": recipe.batch}

# %% solution
### BEGIN SOLUTION
operations = 2 * book.facts["d_model"] * recipe.d_sae * recipe.tokens * recipe.passes
### END SOLUTION

# %% test 1
assert operations > 1e6
### BEGIN HIDDEN TESTS
assert np.isclose(
    operations, 2 * book.facts["d_model"] * book.cell.recipe.d_sae * book.cell.recipe.tokens * book.cell.recipe.passes
)
### END HIDDEN TESTS

# %% wrong
operations = book.facts["d_model"] * recipe.d_sae * recipe.tokens * recipe.passes

# %% wrong
operations = 2 * book.facts["d_model"] * recipe.d_sae * recipe.tokens * recipe.batch

# %% wrong
operations = 2 * book.facts["d_model"] * recipe.d_sae
