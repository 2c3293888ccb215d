"""A decoder fitted again by least squares, and judged on tokens on which it was not fitted.

On a CUDA device the normal equations come from dense products, in double precision, a chunk of tokens at a time: fast there, and
slow elsewhere. On the CPU they come from sparse ones.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

RIDGE = 1e-6  # of a feature's mean energy: refitted directions of features that hardly fire stay finite
EXACT = 16_384  # features, up to which the decoder is solved for directly
TOLERANCE = 1e-6  # of the residual of the normal equations, above that
STEPS = 1000  # of conjugate gradients at most
ROWS = 4096  # tokens whose codes are dense at a time


def refitted(
    features: Int[Tensor, "token k"],
    values: Float[Tensor, "token k"],
    count: int,
    x: Float[Tensor, "token d_in"],
    judged: Bool[Tensor, "token"],
) -> Float[Tensor, "judged d_in"]:
    """What codes over `count` features predict of the judged tokens, by directions and an offset fitted on the others.

    Codes are those of `matching_pursuit`, and where they lie is where this is computed; all else, and what is given, lies on the
    CPU. Up to `EXACT` features the normal equations are solved by a Cholesky factor: one matrix of d_sae^2 float64 (2.1 GB at
    16,384) beside the sparse one, or two on a CUDA device. Above, by conjugate gradients (Hestenes & Stiefel 1952,
    doi:10.6028/jres.049.044) to a residual of `TOLERANCE`, or at most `STEPS` of them: a few matrices [d_sae, d_in], but many
    minutes for each set.
    """
    if values.device.type != "cpu" and count <= EXACT:
        return _by_dense_products(features, values, count, x, judged)
    codes = sparse.hstack([_matrix(features, values, count), np.ones((len(x), 1))], format="csr", dtype=np.float64)
    fits = ~judged.numpy()
    fitted, target = codes[fits], x.numpy()[fits]  # in double precision, since squares lose half the digits
    directions = _by_cholesky(fitted, target) if count <= EXACT else _by_conjugate_gradients(fitted, target)
    return torch.from_numpy(codes[~fits] @ directions)


def _matrix(features: Int[Tensor, "token k"], values: Float[Tensor, "token k"], count: int) -> sparse.csr_array:
    """Codes as a sparse matrix, in which what a token takes of a feature at several steps is one number."""
    features, values = features.cpu().numpy(), values.cpu().numpy()
    taken = values > 0
    return sparse.coo_array((values[taken], (taken.nonzero()[0], features[taken])), shape=(len(values), count)).tocsr()


def _by_cholesky(
    codes: Float[sparse.csr_array, "token feature"], x: Float[np.ndarray, "token d_in"]
) -> Float[np.ndarray, "feature d_in"]:
    squares = (codes.T @ codes).toarray(order="F")
    squares[np.diag_indices_from(squares)] += _ridge(squares.trace(), len(squares))
    return cho_solve(cho_factor(squares, overwrite_a=True), codes.T @ x)


def _by_conjugate_gradients(
    codes: Float[sparse.csr_array, "token feature"], x: Float[np.ndarray, "token d_in"]
) -> Float[np.ndarray, "feature d_in"]:
    """The same directions from products with codes alone. All columns of x are one system, each direction scaled by its energy."""
    energy = np.asarray(codes.multiply(codes).sum(0)).ravel()
    ridge = _ridge(energy.sum(), len(energy))
    shape, by_feature, scale = (codes.shape[1], x.shape[1]), codes.T.tocsr(), (energy + ridge)[:, None]

    def operator(function) -> LinearOperator:
        return LinearOperator((np.prod(shape),) * 2, lambda flat: function(flat.reshape(shape)).ravel(), dtype=np.float64)

    solution, _ = cg(
        operator(lambda directions: by_feature @ (codes @ directions) + ridge * directions),
        (by_feature @ x).ravel(),
        rtol=TOLERANCE,
        maxiter=STEPS,
        M=operator(lambda directions: directions / scale),
    )
    return solution.reshape(shape)


def _by_dense_products(
    features: Int[Tensor, "token k"],
    values: Float[Tensor, "token k"],
    count: int,
    x: Float[Tensor, "token d_in"],
    judged: Bool[Tensor, "token"],
) -> Float[Tensor, "judged d_in"]:
    device = values.device
    squares = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=device)
    onto = torch.zeros(count + 1, x.shape[1], dtype=torch.float64, device=device)
    fitted, judging = ((~judged).nonzero()[:, 0], judged.nonzero()[:, 0])

    def dense(rows: Int[Tensor, "row"]) -> Float[Tensor, "row feature"]:
        """Codes of some tokens, with a last column of ones for the offset."""
        here = rows.to(device)
        codes = F.pad(torch.zeros(len(rows), count, dtype=torch.float64, device=device), (0, 1), value=1.0)
        return codes.scatter_add_(1, features[here], values[here].double())

    for rows in fitted.split(ROWS):
        codes = dense(rows)
        squares.addmm_(codes.T, codes)
        onto.addmm_(codes.T, x[rows].to(device, torch.float64))
    squares.diagonal().add_(_ridge(float(squares.trace()), count + 1))
    directions = torch.cholesky_solve(onto, torch.linalg.cholesky(squares))
    return torch.cat([(dense(rows) @ directions).cpu() for rows in judging.split(ROWS)])


def _ridge(energy: float, count: int) -> float:
    """From the energy of all features together."""
    return RIDGE * max(energy / count, 1e-12)
