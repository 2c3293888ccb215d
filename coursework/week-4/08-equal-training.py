# %% [markdown] compute real
# ## As long in training
#
# Features that have fired a few times are hardly trained. With another width or sparsity, the same number of tokens is another length of training for a feature.
# An SAE of SmolLM2 has 4,608 features, of which 32 are active on each token. Set `needed` to how many tokens it has to read before its features have fired as
# often, on average, as those of an SAE of `quick`. Right within one in a hundred.

# %% given
recipe = book.cell.recipe
{"tokens": recipe.tokens, "passes": recipe.passes, "k": book.cell.k, "d_sae": recipe.d_sae}

# %% solution
### BEGIN SOLUTION
firings = recipe.tokens * recipe.passes * book.cell.k / recipe.d_sae
needed = firings * 4608 / 32
### END SOLUTION

# %% test 1
assert needed > 0
### BEGIN HIDDEN TESTS
of_quick = book.cell.tokens * book.cell.passes * book.cell.k / book.cell.d_sae
assert abs(needed * 32 / 4608 / of_quick - 1) < 0.01
### END HIDDEN TESTS

# %% wrong
needed = recipe.tokens * recipe.passes

# %% wrong
needed = recipe.tokens * recipe.passes * 4608 / recipe.d_sae

# %% wrong
needed = recipe.tokens * recipe.passes * book.cell.k / recipe.d_sae * 4608

# %% wrong
needed = recipe.tokens * recipe.passes * book.cell.k / recipe.d_sae * 32 / 4608
