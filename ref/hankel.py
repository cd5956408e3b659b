"""Reduction of a long convolution to a few states: Hankel singular values, Kung's realisation.

    H_ij = h_{1+i+j} ≈ U Σ V^T                                      r triples                    (1)
    A = U^T S U, or (SU)^+ of the shifted U;  h_{1+j} ≈ U_0 A^j Σ V_0^T                          (2)
    h_{1+j} = Re Σ_k a_k λ_k^j, λ the eigenvalues of A, of each conjugate pair one               (3)

H is `triangle`, (n-1, n-1) and zero beyond lag n-1, or `rectangle`, of floor(n/2) rows, that needs
no such zeros. Of the triangle A is the compression of the shift S by one row: this is balanced
truncation of the truncated kernel (Kung 1978; Al-Saggaf and Franklin 1987), stable, and its
transfer function is off by at most 2 Σ_{k>r} σ_k. Of the rectangle A is least squares: closer on
the horizon, but that bound is no theorem, and poles may leave the circle. From either H, no system
of r states has a transfer function closer than σ_{r+1}.

Given the poles, the residues are fitted again by least squares over the horizon, unless
refit=False. Measured on sums of exponentials with a power-law tail, this divides |k - t| by 1.01 to
2.6, and for a rectangle with states enough for all digits by 50. The system is then no longer the
balanced one of the bound, and its tail beyond the horizon may be worse: 3.5 times in sup-norm.

So the bound is proven for the triangle with refit=False, where A can be diagonalised. For a delay
or any filter of few taps it cannot, for a polynomial hardly: then `realise` takes poles close to
those of A, and however small the bound, errors of delays and boxes are about 1e-8 at the fewest
states, 1e-10 at some more, in float32 1e-3 and 1e-5; of j^3, j < 64, 3e-5 and 6e-3. With residues
fitted again, no error is larger than that of no states. `error` and `sup_error` are always of the
system that is returned.

SVDs run on the arrays' device, poles and residues on the host. A large H is never formed: its
triples come from Golub, Kahan and Lanczos's bidiagonalisation, batched over the channels, with
products by FFT. Every vector is kept orthogonal to all others, so all triples are good to rounding
of σ_1; SciPy's svds, of the product H^T H, would keep half of the digits of the small ones.
"""

import math

import numpy as np
import threadpoolctl

from ref import Error
from ref.backend import (
    array_module,
    complex_dtype,
    eig,
    fast_length,
    irfft,
    item,
    rfft,
    to_device,
    to_host,
)

DENSE = 1 << 17  # elements of H up to which its SVD is that of the dense matrix
LINEAR = 64  # ranks up to this one are tried one after another
LANCZOS_BYTES = 1 << 28  # of the basis of as many channels as go at once
RANK = 32  # without rank or tol
MOST = 256  # with tol and without rank
CONDITION = 1e7  # of eigenvectors that are trusted
INSIDE = 1 - 2.0**-50  # the largest |λ|


def reduce(t, dtype, rank, tol, form, refit):
    """(1) to (3), and d about t_0.   t (C, n) float64 -> lam, b (C, N), d, {name: (C,)} on the host

    rank: states; with tol, the most that may be taken to reach that error in every channel (MOST,
    for a kernel of noise would go on to n/2, where each channel needs the SVD of a dense matrix):
    the least that do up to LINEAR, beyond by bisection, as if the error only fell with the rank.
    dtype: of d; |k - t| / |t| is that of b and d rounded to it.
    """
    (C, n), dtype, host = t.shape, np.dtype(dtype), to_host(t)
    first, last = _ranks(n, rank, tol, form)
    tolerance = np.inf if tol is None else tol
    norm, order, svd = np.sqrt((host * host).sum(axis=1)), list(range(C)), None

    def attempt(r):
        """The fits of all channels with r states, or the first that is over the tolerance"""
        nonlocal svd, order
        if svd is None or r >= svd[1].shape[1]:
            known = min(2 * svd[1].shape[1], last + 8) if svd else 0
            known = min(max(known, r + 8), n - 1 if form == "triangle" else n // 2)
            svd = decompose(t[:, 1:], form, known)
        U, s, V, rest = svd
        if r < last and (_least_error(s[:, r:], n, form) > tolerance * norm).any():
            return None
        fits = {}
        for c in order:
            own, bound = (U[c, :, :r], s[c, :r], V[c, :, :r]), 2 * (s[c, r:].sum() + rest[c])
            fits[c] = realise(host[c], *own, form, bound, dtype, refit)
            if fits[c][-1] > tolerance:
                order = [c, *(other for other in order if other != c)]  # to fail sooner
                return c, fits[c][-1]
        return [fits[c] for c in range(C)]

    with threadpoolctl.threadpool_limits(1, user_api="blas"):  # at these sizes they would wait
        r, fits = _least_rank(attempt, first, last)
    if not isinstance(fits, list):
        raise Error(
            f"a relative error of {tol:g} is not reached with {last} states: channel {fits[0]} "
            f"stays at {fits[1]:.2g}. Allow more states or errors, or use the exact conversion."
        )
    _, s, _, rest = svd
    bounds = {"bound": 2 * (s[:, r:].sum(axis=1) + rest)}
    bounds["lower"] = s[:, r] if r < s.shape[1] else np.zeros(C)
    return _side_by_side(host, fits, form, bounds)


def _least_rank(attempt, first, last):
    """-> r, attempt(r) for the least r that gives a list, or for `last`"""
    for r in range(first, min(last, max(first, LINEAR)) + 1):
        fits = attempt(r)
        if isinstance(fits, list) or r == last:
            return r, fits
    below = r
    while r < last and not isinstance(fits, list):
        below, r = r, min(2 * r, last)
        fits = attempt(r)
    while isinstance(fits, list) and r - below > 1:
        middle = (below + r) // 2
        fewer = attempt(middle)
        if isinstance(fewer, list):
            r, fits = middle, fewer
        else:
            below = middle
    return r, fits


def _ranks(n, rank, tol, form):
    """The first and the last number of states to try.   Error: rank or tol make no sense"""
    most = n // 2 - (form == "rectangle")
    if most < 1:
        raise Error(f"{n} coefficients are too few to reduce; use the exact conversion.")
    if rank is not None and not (is_whole(rank) and 1 <= rank <= most):
        raise Error(f"rank={rank!r}: expected 1 to {most} states for {n} coefficients ({form}).")
    if tol is None:
        return (min(RANK, most),) * 2 if rank is None else (rank, rank)
    if not (isinstance(tol, (int, float, np.number)) and 0 < tol < 1):
        raise Error(f"tol={tol!r}: expected a relative error between 0 and 1.")
    return 1, min(MOST, most) if rank is None else rank


def is_whole(value):
    """An integer, and no bool"""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _least_error(s, n, form):
    """|k - t| of r states is at least this: Σ_{k>r} σ_k² <= |H of (k - t)|², in which no lag stands
    more often than H has rows; of the triangle's zeros a system knows nothing, so 0

    s (C, ...) the σ_k, k > r -> (C,)
    """
    rows = np.inf if form == "triangle" else n // 2
    return (1 - 1e-9) * np.sqrt((s * s).sum(axis=1) / rows)


def _side_by_side(t, fits, form, results):
    """lam, b with zeros where a channel has fewer modes than another, d, results"""
    C, N = len(fits), max(len(lam) for lam, *_ in fits)
    lam, b = np.zeros((C, N), "complex128"), np.zeros((C, N), fits[0][1].dtype)
    for c, (own, weights, *_) in enumerate(fits):
        lam[c, : len(own)], b[c, : len(own)] = own, weights
    d, reflected = (np.array([fit[i] for fit in fits]) for i in (2, 3))
    results = results | {"reflected": reflected}
    results["sup_error"] = np.array(
        [_sup_error(*own, form) for own in zip(t, lam, b, d, strict=True)]
    )
    return lam, b, d, results


def _sup_error(t, lam, b, d, form):
    """The largest |Σ_j (t_j - k_j) exp(-iωj)|, t_j = 0 from n on, of the triangle for all j, of the
    rectangle for j < n, since it says nothing of what follows; at 16n frequencies or more, 4,096 at
    least, and the poles'"""
    n, F = len(t), fast_length(max(16 * len(t), 4096))
    if form == "rectangle":
        k = (b @ powers(lam[None], 1 << (n - 1).bit_length())[0][0, :, :n]).real
        k[0] += d
        return np.abs(rfft(t - k, F, 0)).max()
    w = np.append(2 * np.pi / F * np.arange(F // 2 + 1), np.angle(lam))
    at_poles = np.exp(-1j * w[F // 2 + 1 :, None] * np.arange(n)) @ t
    z = np.exp(-1j * w)[:, None]
    later = b * lam * z / (1 - lam * z) + (b * lam).conj() * z / (1 - lam.conj() * z)
    first = b.real.sum(dtype="float64") + d  # alone, since d may all but cancel b
    return np.abs(np.append(rfft(t, F, 0), at_poles) - first - 0.5 * later.sum(axis=1)).max()


# (1)


def decompose(h, form, k):
    """The first k singular triples of H.   h (C, n-1), lags from 1

    -> U (C, p, k), s (C, k), V (C, q, k), Σ_{i>k} σ_i or a bound of it (C,); on the host
    """
    xp, (C, last) = array_module(h), h.shape
    p, q = (last, last) if form == "triangle" else ((last + 1) // 2, last + 1 - (last + 1) // 2)
    if form == "triangle":
        h = xp.concatenate([h, xp.zeros((C, last - 1), dtype=h.dtype)], axis=1)
    if p * q <= DENSE or k > p // 4:
        i = xp.arange(p)[:, None] + xp.arange(q)
        triples = [_dense_svd(h[c][i], k) for c in range(C)]
        return tuple(np.stack(part) for part in zip(*triples, strict=True))
    at_once = max(1, LANCZOS_BYTES // (8 * (2 * k + 16) * (p + q)))
    parts = [lanczos(h[c : c + at_once], p, q, k) for c in range(0, C, at_once)]
    U, s, V = (np.concatenate(part) for part in zip(*parts, strict=True))
    j = np.arange(p + q - 1)
    often = np.minimum(np.minimum(j + 1, p + q - 1 - j), p)  # elements of H that are h_{1+j}
    squares = (to_host(h) ** 2) @ often  # Σ of all σ², from which that of the others:
    others = np.maximum(squares - (s * s).sum(axis=1), 4 * np.finfo("float64").eps * squares)
    return U, s, V, np.sqrt((p - k) * others)


def _dense_svd(H, k):
    """-> U (p, k), s (k,), V (q, k), the sum of the other σ"""
    U, s, Vh = (to_host(part) for part in array_module(H).linalg.svd(H, full_matrices=False))
    return U[:, :k], s[:k], Vh[:k].T, s[k:].sum()


def lanczos(h, p, q, k):
    """The first k singular triples of H (C, p, q), p <= q, h (C, p+q-1) its anti-diagonals

    Where directions are exhausted, a random one goes on. The basis grows until all residuals are
    below 1e-9 σ_1.   -> U (C, p, k), s (C, k), V (C, q, k), on the host
    """
    xp, C, rng, M = array_module(h), len(h), np.random.default_rng(0), fast_length(p + q - 1)
    spectrum = rfft(h, M, 1)
    tiny = 1e-14 * xp.abs(spectrum).max(axis=1, keepdims=True)

    def product(v, rows):
        w, first = irfft(spectrum * rfft(v[:, ::-1], M, 1), M, 1), v.shape[1] - 1
        return w[:, first : first + rows]

    def direction(w, basis):
        w = _orthogonal(w, basis)
        size = _norm(w)
        ended = size <= tiny
        if not item(ended.any()):
            return w / size, size
        random = to_device(rng.standard_normal(w.shape), xp)
        random = _orthogonal(_orthogonal(random, basis), basis)
        size = xp.where(ended, 0, size)
        return xp.where(ended, random / _norm(random), w / xp.where(ended, 1, size)), size

    K, done = min(2 * k + 16, p - 1), 0
    U, V, B = (xp.zeros((C, *shape), dtype="float64") for shape in ((0, p), (1, q), (0, 1)))
    V[:, 0], _ = direction(to_device(rng.standard_normal((C, q)), xp), V[:, :0])
    while True:
        U, V, B = _enlarged(U, (K, p)), _enlarged(V, (K + 1, q)), _enlarged(B, (K, K + 1))
        for i in range(done, K):
            w = product(V[:, i], p) - (B[:, i - 1, i : i + 1] * U[:, i - 1] if i else 0)
            U[:, i], B[:, i, i : i + 1] = direction(w, U[:, :i])
            w = product(U[:, i], q) - B[:, i, i : i + 1] * V[:, i]
            V[:, i + 1], B[:, i, i + 1 : i + 2] = direction(w, V[:, : i + 1])
        P, s, Qh = xp.linalg.svd(B, full_matrices=False)
        residuals = _norm(_orthogonal(product(V[:, K], p), U)) * xp.abs(Qh[:, :k, K])
        if p - 1 == K or item((residuals <= 1e-9 * s[:, :1]).all()):
            break
        done, K = K, min(K + K // 2, p - 1)
    U, V = U.transpose(0, 2, 1) @ P[:, :, :k], V.transpose(0, 2, 1) @ Qh[:, :k].transpose(0, 2, 1)
    return to_host(U), to_host(s[:, :k]), to_host(V)


def _norm(w):
    return array_module(w).sqrt((w * w).sum(axis=1, keepdims=True))


def _orthogonal(w, basis):
    """w (C, n) less its components along basis (C, K, n)"""
    return w - ((basis @ w[:, :, None]).transpose(0, 2, 1) @ basis)[:, 0]


def _enlarged(x, shape):
    """x (C, ...) in the corner of (C, *shape) zeros"""
    larger = array_module(x).zeros((len(x), *shape), dtype=x.dtype)
    larger[:, : x.shape[1], : x.shape[2]] = x
    return larger


# (2), (3), one channel


def realise(t, U, s, V, form, bound, dtype, refit):
    """The fit of one channel to its r triples; where A is defective, or nearly, the best of several

    A delay's A is nilpotent, that of a polynomial has one pole many times: their eigenvectors are
    nothing to compute with. Those of A + δE, E random, are good to eps/δ, and its system is off by
    about δ, so some δ around √eps are tried; for a rectangle the triangle's stable A too; and, as
    long as the error is above the bound, fewer states, down to none.   -> as fit
    """
    nudge, norm, r = math.sqrt(np.finfo(dtype).eps), math.sqrt(t @ t), len(s) if s[0] > 0 else 0
    ways = [(form, δ * nudge) for δ in (0, 0.01, 1, 100)]
    ways += [("triangle", nudge)] * (form == "rectangle")
    best = none(t, dtype)
    while r:
        for way, δ in ways:
            *own, condition = poles(U[:, :r], s[:r], V[:, :r], way, δ)
            found, sound = fit(t, *own, dtype, refit), δ == 0 and condition < CONDITION
            within = found[-1] * norm <= bound + nudge * norm
            if sound and within and r == len(s) and not refit:
                return found  # of its sup-norm is the bound; in this norm, none may be closer
            best = min(best, found, key=lambda fit: fit[-1])
            if sound:
                break
        if best[-1] * norm <= bound + nudge * norm:
            break
        fewer = int((s > len(U) * np.finfo("float64").eps * s[0]).sum())
        fewer = fewer if fewer < r else r - max(1, r // 8)
        bound, r = bound + 2 * s[fewer:r].sum(), fewer
    return best


def none(t, dtype):
    """What `fit` gives for no states: d = t_0"""
    lam, b, d = np.zeros(1, "complex128"), np.zeros(1, complex_dtype(dtype)), dtype.type(t[0])
    off = np.append(t[1:], d - t[0])
    return lam, b, d, 0, math.sqrt((off @ off) / ((t @ t) or 1.0))


def poles(U, s, V, form, nudge):
    """-> λ inside the circle, a (N,), of each conjugate pair the upper one, how many of all
    were not inside, these are reflected, and the condition of the eigenvectors"""
    A, last = U[:-1].T @ U[1:], U[-1]
    if form == "rectangle" and last @ last < 1 - 1e-12:  # times (U[:-1]^T U[:-1])^-1
        A = A + np.outer(last, last @ A) / (1 - last @ last)
    A = A + nudge * np.random.default_rng(0).standard_normal(A.shape) / math.sqrt(len(A))
    lam, X = eig(A)
    a = (U[0] @ X) * np.linalg.lstsq(X, s * V[0] + 0j, rcond=None)[0]
    size = np.abs(lam)
    lam = np.where(size >= 1, lam / np.maximum(size, 1) ** 2, lam)
    lam = np.where(np.abs(lam) > INSIDE, lam * INSIDE / np.maximum(size, INSIDE), lam)
    upper, weights = lam.imag >= 0, np.where(lam.imag > 0, 2, 1) * a
    return lam[upper], weights[upper], int((size >= 1).sum()), np.linalg.cond(X)


def fit(t, lam, a, reflected, dtype, refit):
    """t_0 = d + Σ_k Re b_k, b = a/λ; refit or a reflected pole: a by least squares over t (n,)

    Poles next to 0 are moved off it, where a/λ would drown in rounding.
    -> λ, b, d, reflected, |k - t| / |t|
    """
    h, size, least = t[1:], np.abs(lam), math.sqrt(np.finfo(dtype).eps)
    unit = np.where(size > 0, lam / np.where(size > 0, size, 1), 1)
    lam = np.where(size < least, least * unit, lam)
    table, _ = powers(lam[None], 1 << (len(h) - 1).bit_length())
    table = table[0, :, : len(h)].T
    if refit or reflected:
        pairs = lam.imag > 0
        columns = np.concatenate([table.real, -table.imag[:, pairs]], axis=1)
        scale = np.sqrt((columns * columns).sum(axis=0))
        each = np.abs(np.append(lam, lam[pairs])) * scale
        # that of b, at lag 0 and at all others, counted as an error like others
        rounding = np.finfo(dtype).eps * np.diag(np.sqrt(1 + 1 / each**2))
        system = np.concatenate([columns / scale, rounding])
        x = np.linalg.lstsq(system, np.append(h, 0 * scale), rcond=None)[0] / scale
        a = x[: len(lam)] + 0j
        a[pairs] += 1j * x[len(lam) :]
    b = (a / lam).astype(complex_dtype(dtype))
    direct = b.real.sum(dtype="float64")
    d = dtype.type(t[0] - direct)
    off = np.append((table @ (lam * b)).real - h, direct + d - t[0])
    return lam, b, d, reflected, math.sqrt((off @ off) / ((t @ t) or 1.0))


def powers(lam, W):
    """λ^0..λ^{W-1} and λ^W, W a power of 2.   lam (C, N) -> (C, N, W), (C, N)"""
    xp = array_module(lam)
    table, jump = xp.ones((*lam.shape, 1), dtype=lam.dtype), lam
    while table.shape[2] < W:
        table = xp.concatenate([table, table * jump[:, :, None]], axis=2)
        jump = jump * jump
    return table, jump
