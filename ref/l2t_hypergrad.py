"""Learning to teach, mode "hypergrad": what ref.hvp needs of the student's loss in ref.l2t.

    l = mean_b [(1 - w_b) CE_b + w_b R_b],  w_b = w_φ(F_b),  F_b constant       the loss         (1)
    ∂l/∂w_b = (R_b - CE_b) / B                                                                   (2)
    C v = Σ_b ∂w_b/∂φ c_b / B,  c_b = ∂(R_b - CE_b) along the student's tangent v                (3)
    H v: of (1) with the weights as they are                                                     (4)

From (2), in which φ is not: the mixed product is the student's tangent, no second derivative of the
loss network, and then its ordinary backward. Batch normalisation couples the w_b: it is still one
backward, with c / B. With a weight for each position all of it holds with (b, s) for b.

Constant features are those of the batch at the θ that l is taken at. A stencil of E that computes
them anew at each θ sees their movement as well, which (3) and (4) leave out: for a comparison the
features stay what they are in one roll-out.

Of the regulariser |θ|² the caller adds what passes by the logits: dsquare 2 θ to ∂l/∂θ, dsquare 2 v
to H v.

Here with the linear student z = x W; x (B, S, D), y (B, S), features F (B, S, 5), θ: W (D, V).
Equations: spec/l2t.md, section 6.4.
"""

from ref import l2t
from ref.backend import array_module


def student_loss_tangent(dlogits, cache, dsquare=0.0):
    """dlogits (B, S, V), a direction -> the derivatives of ∂l/∂logits (B, S, V) and of ∂l/∂w (like
    w) along it; cache is that of l2t.student_loss_forward.   dsquare: ∂|θ|² along the direction

    From ∂log p = ∂z - <p, ∂z>, ∂p = p ∂log p and, N being Σ p log p, ∂N = <log p, ∂p>.
    """
    logits, y, summary, each, share, _, _, cfg = cache
    (B, S, V), xp = logits.shape, array_module(logits)
    logp = l2t.log_probabilities(logits, summary)
    p = xp.exp(logp)
    moved = (p * dlogits).sum(axis=2)
    dce = moved - xp.take_along_axis(dlogits, y[..., None], axis=2)[..., 0]
    dlogp = dlogits - moved[..., None]
    dp = p * dlogp
    of_logits = share[..., None] * dp
    if cfg.regulariser == "weights":
        dreg = cfg.reg_strength * dsquare + xp.zeros_like(dce)
    elif cfg.regulariser == "entropy":
        dN = (logp * dp).sum(axis=2)
        logp += 1 - summary["size"][..., None]
        curvature = dp * logp - p * dN[..., None]
        of_logits += (each * cfg.reg_strength)[..., None] * curvature
        dreg = cfg.reg_strength * dN
    else:
        strength = 2 * cfg.reg_strength / (V if cfg.regulariser == "logits" else 1)
        of_logits += (each * strength)[..., None] * dlogits
        dreg = strength * (logits * dlogits).sum(axis=2)
    of_w = (dreg - dce if cfg.loss_form == "convex" else dreg) / (B * S)
    return of_logits / (B * S), of_w if cfg.granularity == "token" else of_w.sum(axis=1)


def linear_gradients(theta, phi, batch, cfg):
    """batch (x, y, F) -> l, ∂l/∂θ, ∂l/∂φ: (1), (2)"""
    x, loss, cache, weights = _forward(theta, phi, batch, cfg)
    dlogits, dw, dsquare = l2t.student_loss_backward(1.0, cache)
    dW = _transposed(x, dlogits) + 2 * dsquare * theta["W"]
    return loss, {"W": dW}, l2t.dln_backward(dw, weights)[1]


def linear_products(theta, phi, batch, cfg, v):
    """v like θ -> H v, C v: (3), (4)"""
    x, _, cache, weights = _forward(theta, phi, batch, cfg)
    _, _, dsquare = l2t.student_loss_backward(1.0, cache)
    moved = 2 * (theta["W"] * v["W"]).sum()
    of_logits, of_w = student_loss_tangent(x @ v["W"], cache, moved)
    H = _transposed(x, of_logits) + 2 * dsquare * v["W"]
    return {"W": H}, l2t.dln_backward(of_w, weights)[1]


def _forward(theta, phi, batch, cfg):
    """-> x, l, its cache, that of the loss network"""
    x, y, F = batch
    w, weights = l2t.dln_forward(phi, F, cfg)
    square = (theta["W"] * theta["W"]).sum()
    loss, _, cache = l2t.student_loss_forward(x @ theta["W"], y, w, cfg, square)
    return x, loss, cache, weights


def _transposed(x, dz):
    """xᵀ dz over batch and positions"""
    return x.reshape(-1, x.shape[2]).T @ dz.reshape(-1, dz.shape[2])
