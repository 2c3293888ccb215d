# %% [markdown] design setup
# ## Write a variant
#
# A variant of SAE is given by its loss, in dense tensors. In `saes/reference.py` a TopK SAE keeps the k largest pre-activations of a token, if they are positive. Write
# `AbsTopK`, which keeps the k pre-activations that are largest *in absolute value*, with their sign, so that a direction can be used both ways.
# `forward(sae, x, training)` gives `Forward(z, x_hat, loss)`; `pre_activations(sae, x)` and `squared_error(x, x_hat)` are there.


# %% solution
class AbsTopK(DenseTopK):
    def forward(self, sae, x, training):
        ### BEGIN SOLUTION
        pre = pre_activations(sae, x)
        kept = pre.abs().topk(self.k, dim=1).indices
        z = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept))
        x_hat = z @ sae.W_dec + sae.b_dec
        return Forward(z, x_hat, squared_error(x, x_hat))
        ### END SOLUTION


# %% test 3
x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
method = AbsTopK(2)
sae = method.initialise(6, 12, torch.Generator().manual_seed(1))
z, x_hat, loss = method.forward(sae, x, training=True)
assert ((z != 0).sum(1) == 2).all()
### BEGIN HIDDEN TESTS
pre = pre_activations(sae, x)
for row in range(len(x)):
    kept = pre[row].abs().argsort(descending=True)[:2]
    assert set(z[row].nonzero().flatten().tolist()) == set(kept.tolist())
    assert torch.allclose(z[row, kept], pre[row, kept])
assert (z < 0).any()
assert torch.allclose(x_hat, z @ sae.W_dec + sae.b_dec)
assert torch.isclose(loss, (x - x_hat).square().sum(1).mean())
leaves = type(sae)(*(tensor.clone().requires_grad_() for tensor in sae))
method.forward(leaves, x, training=True).loss.backward()
assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in leaves)
### END HIDDEN TESTS


# %% wrong
class AbsTopK(DenseTopK):
    pass


# %% wrong
class AbsTopK(DenseTopK):
    def forward(self, sae, x, training):
        pre = pre_activations(sae, x).abs()
        kept = pre.topk(self.k, dim=1).indices
        z = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept))
        x_hat = z @ sae.W_dec + sae.b_dec
        return Forward(z, x_hat, squared_error(x, x_hat))


# %% wrong
class AbsTopK(DenseTopK):
    def forward(self, sae, x, training):
        pre = pre_activations(sae, x).detach()
        kept = pre.abs().topk(self.k, dim=1).indices
        z = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept))
        x_hat = z @ sae.W_dec + sae.b_dec
        return Forward(z, x_hat, squared_error(x, x_hat))
