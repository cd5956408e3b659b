// CUDA twins of ref/s4d.py: the product with the Vandermonde matrix exp(z l) by running powers.
//
// Double precision whatever the precision outside (the macro REAL is not used). Memory
// O(D (L + n chunks)), nothing of size (D, n, L). Threads share nothing and there are no atomics:
// every run gives the same bits, and the tests compile this file as C++. Arrays are C-contiguous; j
// is a direction of d, i a channel of D, m a mode of n, l a tap of L; a row is a direction and
// channel.

typedef long long Index;

struct alignas(16) Complex {
    double re, im;
};

__device__ Index thread() { return (Index)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ Complex add(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }

__device__ Complex scale(double a, Complex b) { return {a * b.re, a * b.im}; }

__device__ Complex mul(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

__device__ Complex power(Complex z, Index l) {  // exp(z l)
    double s, c;
    sincos(z.im * l, &s, &c);
    return scale(exp(z.re * l), {c, s});
}

const int RUN = 16;  // taps of one thread, in registers: loops over t are unrolled

// (3): k_l = sum_m 2 Re c_m exp(z_m l). One thread a row and run: the taps run, run + runs, ..., so
// that neighbouring threads write neighbouring taps. step (D, n) = exp(z runs) leads from one to
// the next. c (d, D, n), z (D, n) -> k (d, D, L)
extern "C" __global__ void vandermonde_forward(Index d, Index D, Index n, Index L, Index runs,
                                               const Complex *c, const Complex *z,
                                               const Complex *step, double *k) {
    if (thread() >= d * D * runs) return;
    Index row = thread() / runs, run = thread() % runs, i = row % D;
    double sums[RUN] = {};
    for (Index m = 0; m < n; m++) {
        Complex w = step[i * n + m];
        Complex term = scale(2, mul(c[row * n + m], power(z[i * n + m], run)));
#pragma unroll
        for (int t = 0; t < RUN; t++) {
            sums[t] += term.re;
            term = mul(term, w);
        }
    }
#pragma unroll
    for (int t = 0; t < RUN; t++)
        if (run + t * runs < L) k[row * L + run + t * runs] = sums[t];
}

// sum_l dk_l exp(z l) and sum_l l dk_l exp(z l), so far as the thread's chunk of taps goes, of which
// dc and dz are made. step (D, n) = exp(z). One thread a chunk, row and mode.
// dk (d, D, L) -> parts (chunks, 2, d, D, n)
extern "C" __global__ void vandermonde_backward(Index d, Index D, Index n, Index L, Index chunk,
                                                const double *dk, const Complex *z,
                                                const Complex *step, Complex *parts) {
    Index chunks = (L + chunk - 1) / chunk, size = d * D * n;
    if (thread() >= chunks * size) return;
    Index first = thread() / size * chunk, at = thread() % size, row = at / n;
    Index last = first + chunk < L ? first + chunk : L, mode = at % (D * n);
    Complex w = step[mode], p = power(z[mode], first), zeroth = {0, 0}, slope = {0, 0};
    for (Index l = first; l < last; l++) {
        Complex term = scale(dk[row * L + l], p);
        zeroth = add(zeroth, term);
        slope = add(slope, scale(l, term));
        p = mul(p, w);
    }
    Complex *part = parts + thread() / size * 2 * size;
    part[at] = zeroth;
    part[size + at] = slope;
}

// The sums over the chunks, in order. One thread an output. parts (chunks, size) -> sums (size,)
extern "C" __global__ void vandermonde_backward_sum(Index size, Index chunks, const Complex *parts,
                                                    Complex *sums) {
    if (thread() >= size) return;
    Complex sum = {0, 0};
    for (Index k = 0; k < chunks; k++) sum = add(sum, parts[k * size + thread()]);
    sums[thread()] = sum;
}
