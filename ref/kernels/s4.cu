// CUDA twins of ref/s4.py: the Cauchy sums of conjugate pairs, in real numbers.
//
//     v/(2is - ca) + conj(v)/(2is - c conj(a)) = (4is beta - 2c alpha) / q,
//     alpha = Re(v conj(a)), beta = Re v, q = c^2 |a|^2 - 4s^2 - 4isc Re a
//
// so that one complex reciprocal u = 1/q serves all sums of a mode and node. Double precision
// whatever the precision outside (the macro REAL is not used). Memory O(S D (J + n chunks)),
// nothing of size (D, n, J). Threads share nothing and there are no atomics: every run gives the
// same bits, and the tests compile this file as C++. Arrays are C-contiguous; k is a sum of S, d a
// channel of D, i a mode of n, j a node of J.

typedef long long Index;

struct alignas(16) Complex {
    double re, im;
};

__device__ Index thread() { return (Index)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ Complex add(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }

__device__ Complex scale(double a, Complex b) { return {a * b.re, a * b.im}; }

__device__ double dot(Complex a, Complex b) {  // Re(conj(a) b)
    return a.re * b.re + a.im * b.im;
}

__device__ Complex reciprocal(double c, double s, Complex a) {  // 1/q
    double x = c * c * dot(a, a) - 4 * s * s, y = -4 * s * c * a.re;
    double r = 1 / (x * x + y * y);
    return {x * r, -y * r};
}

const int SUMS = 6;  // side by side in registers: loops over k are unrolled

// (8): R = 4is sum_i beta u - 2c sum_i alpha u. One thread a channel and node.
// v (S, D, n), a (D, n), cosine and sine (J,) -> R (S, D, J)
extern "C" __global__ void cauchy_forward(Index S, Index D, Index n, Index J, const Complex *v,
                                          const Complex *a, const double *cosine,
                                          const double *sine, Complex *R) {
    if (thread() >= D * J) return;
    Index d = thread() / J, j = thread() % J;
    double c = cosine[j], s = sine[j];
    for (Index k0 = 0; k0 < S; k0 += SUMS) {
        Complex P[SUMS] = {}, Q[SUMS] = {};  // sum_i alpha u, sum_i beta u
        for (Index i = 0; i < n; i++) {
            Complex pole = a[d * n + i], u = reciprocal(c, s, pole);
#pragma unroll
            for (int k = 0; k < SUMS; k++)
                if (k0 + k < S) {
                    Complex own = v[((k0 + k) * D + d) * n + i];
                    P[k] = add(P[k], scale(dot(own, pole), u));
                    Q[k] = add(Q[k], scale(own.re, u));
                }
        }
#pragma unroll
        for (int k = 0; k < SUMS; k++)
            if (k0 + k < S)
                R[((k0 + k) * D + d) * J + j] = {-2 * c * P[k].re - 4 * s * Q[k].im,
                                                 -2 * c * P[k].im + 4 * s * Q[k].re};
    }
}

// The gradients of alpha and beta (S each), of |a|^2 and of Re a, so far as the thread's chunk of
// nodes goes; that of q is -conj(u^2) du. One thread a chunk, channel and mode.
// dR (S, D, J) -> parts (chunks, 2S+2, D, n)
extern "C" __global__ void cauchy_backward(Index S, Index D, Index n, Index J, Index chunk,
                                           const Complex *dR, const Complex *v, const Complex *a,
                                           const double *cosine, const double *sine,
                                           double *parts) {
    Index chunks = (J + chunk - 1) / chunk, size = D * n;
    if (thread() >= chunks * size) return;
    Index first = thread() / size * chunk, at = thread() % size, d = at / n;
    Index last = first + chunk < J ? first + chunk : J;
    double *part = parts + (thread() / size * (2 * S + 2) * size + at);
    Complex pole = a[at];
    double dmodulus = 0, dreal = 0;
    for (Index k0 = 0; k0 < S; k0 += SUMS) {
        double alpha[SUMS] = {}, beta[SUMS] = {}, dalpha[SUMS] = {}, dbeta[SUMS] = {};
#pragma unroll
        for (int k = 0; k < SUMS; k++)
            if (k0 + k < S) {
                Complex own = v[(k0 + k) * size + at];
                alpha[k] = dot(own, pole);
                beta[k] = own.re;
            }
        for (Index j = first; j < last; j++) {
            double c = cosine[j], s = sine[j];
            Complex u = reciprocal(c, s, pole), du = {0, 0};
#pragma unroll
            for (int k = 0; k < SUMS; k++)
                if (k0 + k < S) {
                    Complex g = dR[((k0 + k) * D + d) * J + j];
                    Complex dP = scale(-2 * c, g), dQ = {4 * s * g.im, -4 * s * g.re};
                    dalpha[k] += dot(u, dP);
                    dbeta[k] += dot(u, dQ);
                    du = add(du, add(scale(alpha[k], dP), scale(beta[k], dQ)));
                }
            Complex square = {u.re * u.re - u.im * u.im, 2 * u.re * u.im};
            dmodulus -= c * c * dot(square, du);
            dreal += 4 * s * c * (square.re * du.im - square.im * du.re);
        }
#pragma unroll
        for (int k = 0; k < SUMS; k++)
            if (k0 + k < S) {
                part[(k0 + k) * size] = dalpha[k];
                part[(S + k0 + k) * size] = dbeta[k];
            }
    }
    part[2 * S * size] = dmodulus;
    part[(2 * S + 1) * size] = dreal;
}

// The sums over the chunks, in order. One thread an output. parts (chunks, size) -> sums (size,)
extern "C" __global__ void cauchy_backward_sum(Index size, Index chunks, const double *parts,
                                               double *sums) {
    if (thread() >= size) return;
    double sum = 0;
    for (Index k = 0; k < chunks; k++) sum += parts[k * size + thread()];
    sums[thread()] = sum;
}
