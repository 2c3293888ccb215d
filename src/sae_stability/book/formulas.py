"""The variants as readers meet them: what each computes, what keeps it sparse, and the paper that it is from."""

from typing import NamedTuple


class Formula(NamedTuple):
    """How a chapter introduces a variant. `u` are pre-activations, `z` codes, and `x` the activation."""

    name: str
    idea: str
    """Goes on from the name: which features fire, and what is paid for them."""
    codes: tuple[str, ...]
    """LaTeX of the lines between pre-activations and reconstruction; short, since a phone does not break them."""
    citation: str
    """Its key in `references.bib`."""


FORMULAS = {
    "relu": Formula(
        "ReLU",
        r"lets each feature fire whose pre-activation $u$ is positive. Training adds to the squared error a penalty on "
        r"the codes, each weighted by the length of its feature's direction, $\lambda \sum_i z_i \lVert d_i \rVert$; "
        r"the lengths are moved into the codes in the end",
        (r"z &= \mathrm{ReLU}(u)",),
        "conerly2024update",
    ),
    "gated": Formula(
        "Gated",
        r"decides along one path which features fire, where the pre-activation $u$ is positive, and along another how "
        r"strongly. Training adds to the squared error the penalty $\lambda \lVert \mathrm{ReLU}(u) \rVert_1$, and the "
        r"error of what the gate alone reconstructs",
        (
            r"v &= e^{r} \odot W_\mathrm{enc}(x - b_\mathrm{dec}) + b_\mathrm{mag}",
            r"z &= 1[u > 0] \odot \mathrm{ReLU}(v)",
        ),
        "rajamanoharan2024gated",
    ),
    "jumprelu": Formula(
        "JumpReLU",
        r"lets each feature fire whose pre-activation $u$ exceeds the feature's own threshold $\theta$, which is "
        r"learned. Training adds to the squared error the penalty $\lambda \lVert z \rVert_0$, a weight for each "
        r"feature that fires",
        (r"z &= u \odot 1[u > \theta]",),
        "rajamanoharan2024jumprelu",
    ),
    "topk": Formula(
        "TopK",
        r"keeps the $k$ largest pre-activations $u$ of each token",
        (r"z &= \mathrm{TopK}\big(\mathrm{ReLU}(u)\big)",),
        "gao2024scaling",
    ),
    "batchtopk": Formula(
        "BatchTopK",
        r"keeps the largest pre-activations $u$ of a batch, $k$ a token on average. At inference a token can't depend "
        r"on its batch, and features fire above one threshold that lets as many through",
        (r"z &= \mathrm{BatchTopK}\big(\mathrm{ReLU}(u)\big)",),
        "bussmann2024batchtopk",
    ),
    "matryoshka": Formula(
        "Matryoshka",
        r"keeps the largest pre-activations $u$ of a batch, $k$ a token on average, and nests dictionaries: training "
        r"adds up the squared errors of what the first features reconstruct alone, from a small share of them to all. "
        r"At inference features fire above one threshold that lets as many through",
        (r"z &= \mathrm{BatchTopK}\big(\mathrm{ReLU}(u)\big)",),
        "bussmann2025matryoshka",
    ),
}


def equations(variant: str) -> str:
    """What an SAE of a variant computes, as the body of an aligned equation."""
    lines = [
        r"u &= W_\mathrm{enc}(x - b_\mathrm{dec}) + b_\mathrm{enc}",
        *FORMULAS[variant].codes,
        r"\hat x &= W_\mathrm{dec}\, z + b_\mathrm{dec}",
    ]
    return ", \\\\\n".join(lines) + "."
