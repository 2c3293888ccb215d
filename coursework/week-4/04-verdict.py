# %% [markdown] design rules
# ## A rule before the number
#
# A rule is written before its number is seen. Write `verdict(low, high, bound, no_effect)` for a 95 % interval of an effect, where larger is stronger and `bound` is
# larger than `no_effect`: "supported" if the whole interval lies above the bound; "opposite" if the whole interval lies below no effect; "weaker" if the whole
# interval lies below the bound, but not below no effect; and "inconclusive" otherwise.


# %% solution
def verdict(low, high, bound, no_effect):
    ### BEGIN SOLUTION
    if low > bound:
        return "supported"
    if high < no_effect:
        return "opposite"
    if high < bound:
        return "weaker"
    return "inconclusive"
    ### END SOLUTION


# %% test 1
assert verdict(0.6, 0.8, 0.5, 0) == "supported"
assert verdict(0.4, 0.8, 0.5, 0) == "inconclusive"
### BEGIN HIDDEN TESTS
assert verdict(0.1, 0.3, 0.5, 0) == "weaker"
assert verdict(-0.1, 0.3, 0.5, 0) == "weaker"
assert verdict(-0.3, -0.1, 0.5, 0) == "opposite"
assert verdict(-0.3, 0.6, 0.5, 0) == "inconclusive"
assert verdict(-0.9, -0.7, -0.01, -1) == "weaker"
### END HIDDEN TESTS


# %% wrong
def verdict(low, high, bound, no_effect):
    middle = (low + high) / 2
    return "supported" if middle > bound else "opposite" if middle < no_effect else "weaker"


# %% wrong
def verdict(low, high, bound, no_effect):
    return "supported" if low > no_effect else "opposite" if high < no_effect else "inconclusive"


# %% wrong
def verdict(low, high, bound, no_effect):
    return "supported" if low > bound else "opposite" if high < 0 else "weaker" if high < bound else "inconclusive"
