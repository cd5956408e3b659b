"""What the state-space models share: HiPPO-LegS, kernels in one and in two directions, Hankel
singular values, complex parameters as pairs of real numbers."""

import numpy as np

from ref import Error, nn
from ref.backend import array_module, item


def as_pairs(z):
    """Complex (...) -> real (..., 2)"""
    return array_module(z).stack([z.real, z.imag], axis=-1)


def as_complex(pairs):
    """Real (..., 2) -> complex (...)"""
    return pairs[..., 0] + 1j * pairs[..., 1]


def legs_nplr(N):
    """HiPPO-LegS as normal plus low rank, on the host in float64.   -> W, P, B, V

    The matrix (N, N), A[i, j] = -sqrt(2i+1) sqrt(2j+1) for i > j and -(i+1) on the diagonal, is
    V (diag(W) - P P^*) V^*, its input sqrt(2i+1) is V B. Of each conjugate pair the half with
    Im W < 0: W, P, B (N/2,), V (N, N/2), Re W = -1/2. An eigenvector's phase is free: here its
    first component is real and positive.   S4, appendix C.1
    """
    i = np.arange(N, dtype="float64")
    B = np.sqrt(2 * i + 1)
    A = -np.tril(B[:, None] * B[None, :], -1) - np.diag(i + 1)
    P = np.sqrt(i + 0.5)
    skew = A + P[:, None] * P[None, :] + 0.5 * np.eye(N)
    imaginary, V = np.linalg.eigh(-1j * skew)
    W, V = -0.5 + 1j * imaginary[: N // 2], V[:, : N // 2]
    V = V * (np.abs(V[0]) / V[0])
    return W, V.conj().T @ P, V.conj().T @ B, V


# Convolution with a kernel of one direction or of two


def convolution_forward(x, k):
    """x (B, L, D), k (1, D, K) causal, or (2, D, K), K >= L -> y (B, L, D)

    y_t = Σ_{s<=t} k0_{t-s} x_s + Σ_{s>t} k1_{s-t-1} x_s: the published code's second direction
    begins one step ahead, at x_{t+1}.
    """
    if len(k) == 1:
        y, conv = nn.fft_conv_forward(x, k[0])
    else:
        y, conv = nn.fft_conv_forward(x, two_sided(k[:, :, : x.shape[1]]), "two-sided")
    return y, (k.shape, conv)


def convolution_backward(dy, cache):
    """dy (B, L, D) -> dx, dk"""
    shape, conv = cache
    dx, dk = nn.fft_conv_backward(dy, conv)
    if shape[0] == 1:
        return dx, dk[None]
    L, both = dy.shape[1], array_module(dy).zeros(shape, dtype=dy.dtype)
    both[0, :, :L], both[1, :, : L - 1] = dk[:, L - 1 :], dk[:, : L - 1][:, ::-1]
    return dx, both


def two_sided(k):
    """k (2, D, L) -> (D, 2L-1), lag 0 at index L-1"""
    return array_module(k).concatenate([k[1, :, :-1][:, ::-1], k[0]], axis=1)


def length_of(x, L):
    """L, or if it is None the length of x (B, L, D).   Error: both are"""
    if L is None and x is None:
        raise Error("give L, the length of the sequence, or x (B, L, D).")
    return x.shape[1] if L is None else L


def toeplitz(k, D):
    """The map x -> convolution(x, k) + D x as a matrix.   k (1 or 2, D, L), D (D,) -> (D, L, L)"""
    xp, L = array_module(k), k.shape[2]
    t = xp.arange(L)
    lag = t[:, None] - t[None, :]
    M = xp.where(lag >= 0, k[0][:, lag % L], 0)
    if len(k) == 2:
        M = M + xp.where(lag < 0, k[1][:, (-lag - 1) % L], 0)
    return M + D[:, None, None] * xp.eye(L, dtype=D.dtype)


# Hankel singular values


def hankel_singular_values(A, B, C):
    """Of x' = A x + B u, y = 2 Re C x (half of the conjugate pairs), or of y = C x (all of them),
    descending.   A (D, n) diagonal or (D, n, n), stable; B, C (D, n) -> (D, n), float64 inside

    Of the infinite Hankel matrix C A^(i+j) B. Its factors, observability and controllability, are
    thinned by QR while their lengths double (square-root Smith method): accurate to rounding of the
    largest value, where the eigenvalues of the Gramians' product would lose half of the digits.
    """
    xp = array_module(A)
    A = A.astype("complex128")
    if A.ndim == 2:
        A = A[:, :, None] * xp.eye(A.shape[1])
    controllability = _thinned(A, B.astype("complex128")[:, :, None])
    adjoint = A.conj().transpose(0, 2, 1)
    observability = _thinned(adjoint, C.astype("complex128").conj()[:, :, None])
    hankel = observability.conj().transpose(0, 2, 1) @ controllability
    values = xp.linalg.svd(hankel, compute_uv=False)
    n = A.shape[1]
    return xp.concatenate([values, xp.zeros((len(A), n - values.shape[1]))], axis=1)


def finite_hankel_values(k):
    """Of the Hankel matrix of a kernel's taps after the first, H_ij = k_{1+i+j}, zero beyond its
    end.   k (D, L) -> (D, max(1, L-1)), descending"""
    xp, n = array_module(k), k.shape[1] - 1
    if n < 1:
        return xp.zeros((len(k), 1), dtype="float64")
    i = xp.arange(n)
    k = xp.concatenate([k[:, 1:].astype("float64"), xp.zeros((len(k), n), dtype="float64")], axis=1)
    return xp.linalg.svd(k[:, i[:, None] + i[None, :]], compute_uv=False)


def _thinned(A, Z):
    """A square factor of [Z, A Z, A² Z, ...] times its adjoint.   A (D, n, n), Z (D, n, m)"""
    xp, n = array_module(A), A.shape[1]
    for _ in range(64):  # 2^64 steps: more than any sampling period needs
        Z = xp.concatenate([Z, A @ Z], axis=2)
        if Z.shape[2] > n:
            Z = xp.linalg.qr(Z.conj().transpose(0, 2, 1), mode="r").conj().transpose(0, 2, 1)
        if item(xp.abs(A).max()) < 1e-17:
            break
        A = A @ A
    return Z


def with_conjugates(x):
    """(..., n) -> (..., 2n), each followed, in a second half, by the conjugates"""
    return array_module(x).concatenate([x, x.conj()], axis=-1)
