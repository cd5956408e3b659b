"""Learning to teach, mode "hypergrad": what ref.hvp needs of the student's loss in ref.l2t.

    l = mean_b [(1 - w_b) CE_b + w_b R_b],  w_b = w_φ(F_b),  F_b constant       the loss         (1)
    ∂l/∂w_b = (R_b - CE_b) / B                                                                   (2)
    C v = Σ_b ∂w_b/∂φ c_b / B,  c_b = ∂(R_b - CE_b) along the student's tangent v                (3)
    H v: of (1) with the weights as they are                                                     (4)

From (2), in which φ is not: the mixed product is the student's tangent, no second derivative of the
loss network, and then its ordinary backward. Batch normalisation couples the w_b: it is still one
backward, with c / B.

Constant features are those of the batch at the θ that l is taken at. A stencil of E that computes
them anew at each θ sees their movement as well, which (3) and (4) leave out: for a comparison the
features stay what they are in one roll-out.

Here with the linear student z = x W; x (B, S, D), y (B, S), features F (B, S, 5), θ: W (D, V).
Equations: spec/l2t.md, section 6.4.
"""

from ref import l2t
from ref.backend import array_module


def student_loss_tangent(dlogits, cache):
    """dlogits (B, S, V), a direction -> the derivatives of ∂l/∂logits (B, S, V) and of ∂l/∂w (B,)
    along it; cache is that of l2t.student_loss_forward.   From ∂p = p (∂z - <p, ∂z>)"""
    logits, logp, hit, w, share, _, _, cfg = cache
    (B, S, V), p = logits.shape, array_module(logits).exp(logp)
    strength = 2 * cfg.reg_strength / (S * V)
    moved = p * dlogits
    dp = moved - p * moved.sum(axis=2, keepdims=True)
    of_logits = share[:, None, None] / S * dp + w[:, None, None] * strength * dlogits
    of_w = strength * (logits * dlogits).sum(axis=2).sum(axis=1)
    if cfg.loss_form == "convex":
        of_w = of_w - ((p - hit) * dlogits).sum(axis=2).sum(axis=1) / S
    return of_logits / B, of_w / B


def linear_gradients(theta, phi, batch, cfg):
    """batch (x, y, F) -> l, ∂l/∂θ, ∂l/∂φ: (1), (2)"""
    x, loss, cache, weights = _forward(theta, phi, batch, cfg)
    dlogits, dw = l2t.student_loss_backward(1.0, cache)
    return loss, {"W": _transposed(x, dlogits)}, l2t.dln_backward(dw, weights)[1]


def linear_products(theta, phi, batch, cfg, v):
    """v like θ -> H v, C v: (3), (4)"""
    x, _, cache, weights = _forward(theta, phi, batch, cfg)
    of_logits, of_w = student_loss_tangent(x @ v["W"], cache)
    return {"W": _transposed(x, of_logits)}, l2t.dln_backward(of_w, weights)[1]


def _forward(theta, phi, batch, cfg):
    """-> x, l, its cache, that of the loss network"""
    x, y, F = batch
    w, weights = l2t.dln_forward(phi, F, cfg)
    loss, _, cache = l2t.student_loss_forward(x @ theta["W"], y, w, cfg)
    return x, loss, cache, weights


def _transposed(x, dz):
    """xᵀ dz over batch and positions"""
    return x.reshape(-1, x.shape[2]).T @ dz.reshape(-1, dz.shape[2])
