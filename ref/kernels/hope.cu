// CUDA twins of ref/hope.py: Horner on the nodes for the transfer function, the all-pass ladder
// for the causal kernel.
//
// REAL is float or double, the precision outside; the sampling is always launched in double.
// Memory O(D L), nothing of size (D, L, n). Threads share nothing and there are no atomics: every
// run gives the same bits, and the tests compile this file as C++. Arrays are C-contiguous; d is a
// channel of D, j a node of J, i a Markov parameter of n, t a time of L.

typedef long long Index;

struct alignas(2 * sizeof(REAL)) Complex {
    REAL re, im;
};

__device__ Index thread() { return (Index)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ Complex add(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }

__device__ Complex scale(REAL a, Complex b) { return {a * b.re, a * b.im}; }

__device__ Complex mul(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

__device__ Complex conj_mul(Complex a, Complex b) {  // conj(a) b
    return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}

// (4) without the angle: 1/w' = exp(-i theta') with tan(theta'/2) = s/c, where
// s = sin(theta/2), c = dt cos(theta/2).
__device__ Complex inverse_node(REAL c, REAL s) {
    REAL r = 1 / (c * c + s * s);
    return {(c * c - s * s) * r, -2 * s * c * r};
}

// Sampling. h (D, n), dt (D,); cosine and sine (J,) of theta/2.

// (1) by Horner's rule: g = v (h_0 + v (h_1 + ...)), v = 1/w'. One thread a channel and node.
// -> g (D, J)
extern "C" __global__ void sample_forward(Index D, Index J, Index n, const Complex *h,
                                          const REAL *dt, const REAL *cosine, const REAL *sine,
                                          Complex *g) {
    if (thread() >= D * J) return;
    Index d = thread() / J, j = thread() % J;
    Complex v = inverse_node(dt[d] * cosine[j], sine[j]), sum = {0, 0};
    for (Index i = n - 1; i >= 0; i--) sum = mul(v, add(h[d * n + i], sum));
    g[d * J + j] = sum;
}

const int NODES = 8;  // side by side in registers: loops over k are unrolled, no array is in memory

// dh_i = sum_j conj(v_j^(i+1)) dg_j; dlog_dt = sum_j Im(conj(dg_j) slope_j) dtheta'_j/dlog_dt with
// slope_j = sum_i (i+1) h_i v_j^(i+1), so far as the thread's chunk of nodes goes. One thread a
// channel and chunk. dg (D, J) -> dh_part (n, D, chunks), dlog_dt_part (D, chunks)
extern "C" __global__ void sample_backward(Index D, Index J, Index n, Index chunk,
                                           const Complex *dg, const Complex *h, const REAL *dt,
                                           const REAL *cosine, const REAL *sine,
                                           Complex *dh_part, double *dlog_dt_part) {
    Index chunks = (J + chunk - 1) / chunk;
    if (thread() >= D * chunks) return;
    Index d = thread() / chunks, first = thread() % chunks * chunk;
    Index last = first + chunk < J ? first + chunk : J;
    double total = 0;
    for (Index j0 = first; j0 < last; j0 += NODES) {
        Complex v[NODES], power[NODES], g[NODES], slope[NODES];
#pragma unroll
        for (int k = 0; k < NODES; k++) {
            Index j = j0 + k < last ? j0 + k : last - 1;
            v[k] = inverse_node(dt[d] * cosine[j], sine[j]);
            g[k] = j0 + k < last ? dg[d * J + j] : Complex{0, 0};
            power[k] = {1, 0};
            slope[k] = {0, 0};
        }
        for (Index i = 0; i < n; i++) {
            Complex *part = dh_part + (i * D * chunks + thread());
            Complex weighted = scale(i + 1, h[d * n + i]);
            Complex sum = {0, 0};
            if (j0 > first) sum = *part;
#pragma unroll
            for (int k = 0; k < NODES; k++) {
                power[k] = mul(power[k], v[k]);
                sum = add(sum, conj_mul(power[k], g[k]));
                slope[k] = add(slope[k], mul(weighted, power[k]));
            }
            *part = sum;
        }
#pragma unroll
        for (int k = 0; k < NODES; k++) {
            Index j = j0 + k < last ? j0 + k : last - 1;
            REAL c = dt[d] * cosine[j], s = sine[j];
            total += conj_mul(g[k], slope[k]).im * (-2 * s * c / (s * s + c * c));
        }
    }
    dlog_dt_part[thread()] = total;
}

// The sums over the chunks, in order. One thread an output, i = n standing for dlog_dt.
// -> dh (D, n), dlog_dt (D,)
extern "C" __global__ void sample_backward_sum(Index D, Index n, Index chunks,
                                               const Complex *dh_part, const double *dlog_dt_part,
                                               Complex *dh, REAL *dlog_dt) {
    if (thread() >= D * (n + 1)) return;
    Index d = thread() / (n + 1), i = thread() % (n + 1);
    double re = 0, im = 0;
    for (Index k = 0; k < chunks; k++) {
        if (i < n) {
            re += dh_part[(i * D + d) * chunks + k].re;
            im += dh_part[(i * D + d) * chunks + k].im;
        } else {
            re += dlog_dt_part[d * chunks + k];
        }
    }
    if (i < n) {
        dh[d * n + i] = {(REAL)re, (REAL)im};
    } else {
        dlog_dt[d] = re;
    }
}

// The ladder, in double whatever REAL is. Some steps of time stand in registers and pass through
// all n sections, whose states (n, D) wait in memory: that is one load and store for STEPS steps.
// h (D, n) real, pole (D,), states zeros.

const int STEPS = 16;

// k_t = sum_i h_i q_t^(i+1), the answer to an impulse, each section by (6): q_t = s_(t-1) - a p_t,
// s_t = a q_t + p_t. One thread a channel. -> k (D, L)
extern "C" __global__ void ladder_forward(Index D, Index L, Index n, const REAL *h,
                                          const double *pole, double *states, REAL *k) {
    Index d = thread();
    if (d >= D) return;
    double a = pole[d];
    for (Index t0 = 0; t0 < L; t0 += STEPS) {
        double q[STEPS], y[STEPS];
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            q[t] = t0 + t == 0;
            y[t] = 0;
        }
        for (Index i = 0; i < n; i++) {
            double s = states[i * D + d], h_i = h[d * n + i];
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                double p = q[t];
                q[t] = s - a * p;
                s = a * q[t] + p;
                y[t] += h_i * q[t];
            }
            states[i * D + d] = s;
        }
#pragma unroll
        for (int t = 0; t < STEPS; t++)
            if (t0 + t < L) k[d * L + t0 + t] = y[t];
    }
}

// dh_i = sum_t dk_t q_t^(i+1); da = sum_t dk_t w_t, w = (z^-2 - 1)/(1 - a z^-1)^2 r with
// r = sum_i (i+1) h_i q^(i). One thread a channel. dk (D, L) -> dh (n, D) added to zeros, da (D,)
extern "C" __global__ void ladder_backward(Index D, Index L, Index n, const REAL *dk,
                                           const REAL *h, const double *pole, double *states,
                                           double *dh, double *da) {
    Index d = thread();
    if (d >= D) return;
    double a = pole[d], total = 0;
    double w1 = 0, w2 = 0, r1 = 0, r2 = 0;  // w and r one and two steps ago
    for (Index t0 = 0; t0 < L; t0 += STEPS) {
        double q[STEPS], r[STEPS], g[STEPS];
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            q[t] = t0 + t == 0;
            r[t] = 0;
            g[t] = t0 + t < L ? dk[d * L + t0 + t] : 0;
        }
        for (Index i = 0; i < n; i++) {
            double s = states[i * D + d], sum = dh[i * D + d];
            double weighted = (i + 1) * (double)h[d * n + i];
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                double p = q[t];
                r[t] += weighted * p;
                q[t] = s - a * p;
                s = a * q[t] + p;
                sum += g[t] * q[t];
            }
            states[i * D + d] = s;
            dh[i * D + d] = sum;
        }
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            double w = 2 * a * w1 - a * a * w2 - r[t] + r2;
            total += g[t] * w;
            w2 = w1;
            w1 = w;
            r2 = r1;
            r1 = r[t];
        }
    }
    da[d] = total;
}
