// CUDA twins of the recurrence of ref/mamba.py, whose equations are cited.
//
// Time goes in chunks of STEPS steps, that stand in registers and pass through all N states. The
// states wait in memory: states (chunks + 1, B, N, E) are those before each chunk and the last,
// grads their gradients. A thread takes one channel through a part of time, span chunks. Several
// parts run side by side in three launches: each from zero (*_ends), the ends carried from part to
// part (carry), each again from where it truly starts. Nothing is ever divided by a decay.
//
// REAL is float or double. Memory O(B L E + B E N L/STEPS), nothing of size (B, L, E, N). Threads
// share nothing and there are no atomics: every run gives the same bits, and the tests compile this
// file as C++. Arrays are C-contiguous, neighbouring threads neighbouring channels: x, delta, y
// (B, L, E), A (N, E), and B_t, C_t as tiles (B, chunks, N, STEPS), called in and out. Steps beyond
// L are zeros, and such a step leaves a state as it is.

typedef long long Index;

const int STEPS = 16;  // in registers: loops over t are unrolled

struct alignas(16) Steps {
    REAL at[STEPS];
};

__device__ Index thread() { return (Index)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ Index chunks_of(Index L) { return (L + STEPS - 1) / STEPS; }

struct Part {  // of time, of one channel
    Index b, e, first, last;
};

__device__ Part part_of(Index B, Index L, Index E, Index span, Index skipped) {
    Index first = (thread() / (B * E) + skipped) * span, last = first + span;
    return {thread() / E % B, thread() % E, first, last < chunks_of(L) ? last : chunks_of(L)};
}

// x at a chunk's steps, from where it points to, in rows of E of which `rest` are left
__device__ Steps column(const REAL *x, Index E, Index rest) {
    Steps steps;
#pragma unroll
    for (int t = 0; t < STEPS; t++) steps.at[t] = t < rest ? x[t * E] : 0;
    return steps;
}

__device__ void put_column(Steps steps, REAL *x, Index E, Index rest) {
#pragma unroll
    for (int t = 0; t < STEPS; t++)
        if (t < rest) x[t * E] = steps.at[t];
}

__device__ Steps tile(const REAL *tiles, Index i) { return ((const Steps *)tiles)[i]; }

// (3) through the first parts, from zero, to the states after each; the last part is not needed.
// One thread a channel and part. -> states, totals (parts - 1, B, E) = sum of delta
extern "C" __global__ void state_ends(Index B, Index L, Index E, Index N, Index span,
                                      const REAL *x, const REAL *delta, const REAL *A,
                                      const REAL *in, REAL *states, double *totals) {
    Part part = part_of(B, L, E, span, 0);
    Index chunks = chunks_of(L), size = B * N * E;
    if (part.first + span >= chunks) return;
    double total = 0;
    for (Index chunk = part.first; chunk < part.last; chunk++) {
        Index row = (part.b * L + chunk * STEPS) * E + part.e, rest = L - chunk * STEPS;
        Steps step = column(delta + row, E, rest), u = column(x + row, E, rest);
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            total += step.at[t];
            u.at[t] *= step.at[t];
        }
        for (Index n = 0; n < N; n++) {
            Steps in_n = tile(in, (part.b * chunks + chunk) * N + n);
            REAL *end = states + part.last * size + (part.b * N + n) * E + part.e;
            REAL h = chunk > part.first ? *end : 0, rate = A[n * E + part.e];
#pragma unroll
            for (int t = 0; t < STEPS; t++) h = exp(step.at[t] * rate) * h + u.at[t] * in_n.at[t];
            *end = h;
        }
    }
    totals[thread()] = total;
}

// (7) back through the last parts, from zero, to the gradients before each; the first part is not
// needed. One thread a channel and part. -> grads, totals (parts - 1, B, E) = sum of delta
extern "C" __global__ void grad_ends(Index B, Index L, Index E, Index N, Index span,
                                     const REAL *dy, const REAL *delta, const REAL *A,
                                     const REAL *out, REAL *grads, double *totals) {
    Part part = part_of(B, L, E, span, 1);
    Index chunks = chunks_of(L), size = B * N * E;
    if (part.first >= chunks) return;
    double total = 0;
    for (Index chunk = part.last - 1; chunk >= part.first; chunk--) {
        Index row = (part.b * L + chunk * STEPS) * E + part.e, rest = L - chunk * STEPS;
        Steps step = column(delta + row, E, rest), d = column(dy + row, E, rest);
#pragma unroll
        for (int t = 0; t < STEPS; t++) total += step.at[t];
        for (Index n = 0; n < N; n++) {
            Steps out_n = tile(out, (part.b * chunks + chunk) * N + n);
            REAL *start = grads + part.first * size + (part.b * N + n) * E + part.e;
            REAL g = chunk < part.last - 1 ? *start : 0, rate = A[n * E + part.e];
#pragma unroll
            for (int t = STEPS - 1; t >= 0; t--)
                g = (g + d.at[t] * out_n.at[t]) * exp(step.at[t] * rate);
            *start = g;
        }
    }
    totals[thread()] = total;
}

// Makes those ends true ones, part after part or, backward, part before part: a part's decay is
// exp(A sum delta) both ways. One thread a channel and state. totals (parts - 1, B, E), ends
// (chunks + 1, B, N, E) -> ends
extern "C" __global__ void carry(Index B, Index L, Index E, Index N, Index span, Index backward,
                                 const REAL *A, const double *totals, REAL *ends) {
    Index size = B * N * E, e = thread() % E, n = thread() / E % N, b = thread() / (E * N);
    Index chunks = chunks_of(L), parts = (chunks + span - 1) / span;
    if (thread() >= size) return;
    REAL end = ends[(backward ? chunks : 0) * size + thread()];
    for (Index k = 0; k < parts - 1; k++) {
        Index done = backward ? parts - 2 - k : k;  // the row of totals
        Index chunk = (done + 1) * span;            // between two parts
        REAL decay = exp(totals[(done * B + b) * E + e] * A[n * E + e]);
        end = ends[chunk * size + thread()] + decay * end;
        ends[chunk * size + thread()] = end;
    }
}

// (3), (4). One thread a channel and part. D (E,), states before each part -> states before the
// other chunks and the last, y
extern "C" __global__ void scan_forward(Index B, Index L, Index E, Index N, Index span,
                                        const REAL *x, const REAL *delta, const REAL *A,
                                        const REAL *in, const REAL *out, const REAL *D,
                                        REAL *states, REAL *y) {
    Part part = part_of(B, L, E, span, 0);
    Index chunks = chunks_of(L), size = B * N * E;
    if (part.first >= chunks) return;
    for (Index chunk = part.first; chunk < part.last; chunk++) {
        Index row = (part.b * L + chunk * STEPS) * E + part.e, rest = L - chunk * STEPS;
        Steps step = column(delta + row, E, rest), u = column(x + row, E, rest), sum;
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            sum.at[t] = D[part.e] * u.at[t];
            u.at[t] *= step.at[t];
        }
        for (Index n = 0; n < N; n++) {
            Index i = (part.b * chunks + chunk) * N + n;
            Steps in_n = tile(in, i), out_n = tile(out, i);
            REAL *state = states + chunk * size + (part.b * N + n) * E + part.e;
            REAL h = *state, rate = A[n * E + part.e];
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                h = exp(step.at[t] * rate) * h + u.at[t] * in_n.at[t];
                sum.at[t] += h * out_n.at[t];
            }
            if (chunk + 1 < part.last || part.last == chunks) state[size] = h;
        }
        put_column(sum, y + row, E, rest);
    }
}

// (7) without dB, dC. One thread a channel and part. Gradients after each part -> grads after the
// other chunks and the first, dx, ddelta, and of each part dA (parts, B, N, E), dD (parts, B, E)
extern "C" __global__ void scan_backward(Index B, Index L, Index E, Index N, Index span,
                                         const REAL *dy, const REAL *x, const REAL *delta,
                                         const REAL *A, const REAL *in, const REAL *out,
                                         const REAL *D, const REAL *states, REAL *grads, REAL *dx,
                                         REAL *ddelta, double *dA, double *dD) {
    Part part = part_of(B, L, E, span, 0);
    Index chunks = chunks_of(L), size = B * N * E;
    if (part.first >= chunks) return;
    double through_skip = 0;
    for (Index chunk = part.last - 1; chunk >= part.first; chunk--) {
        Index row = (part.b * L + chunk * STEPS) * E + part.e, rest = L - chunk * STEPS;
        Steps step = column(delta + row, E, rest), d = column(dy + row, E, rest);
        Steps u = column(x + row, E, rest), through_input = {}, through_decay = {};
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            through_skip += d.at[t] * u.at[t];
            u.at[t] *= step.at[t];
        }
        for (Index n = 0; n < N; n++) {
            Index i = (part.b * chunks + chunk) * N + n, at = (part.b * N + n) * E + part.e;
            Steps in_n = tile(in, i), out_n = tile(out, i), before, decay;
            REAL h = states[chunk * size + at], rate = A[n * E + part.e];
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                before.at[t] = h;
                decay.at[t] = exp(step.at[t] * rate);
                h = decay.at[t] * h + u.at[t] * in_n.at[t];
            }
            REAL g = grads[(chunk + 1) * size + at], slope = 0;
#pragma unroll
            for (int t = STEPS - 1; t >= 0; t--) {
                g += d.at[t] * out_n.at[t];
                through_input.at[t] += g * in_n.at[t];
                g *= decay.at[t];  // first, so that a decay of 0 meets no infinite product
                REAL w = g * before.at[t];
                through_decay.at[t] += w * rate;
                slope += w * step.at[t];
            }
            if (chunk > part.first || chunk == 0) grads[chunk * size + at] = g;
            double *own = dA + part.first / span * size + at;
            *own = slope + (chunk < part.last - 1 ? *own : 0);
        }
        Steps own = column(x + row, E, rest);
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            through_decay.at[t] += own.at[t] * through_input.at[t];
            through_input.at[t] = step.at[t] * through_input.at[t] + D[part.e] * d.at[t];
        }
        put_column(through_decay, ddelta + row, E, rest);
        put_column(through_input, dx + row, E, rest);
    }
    dD[thread()] = through_skip;
}

// (7), dB and dC as far as a block of channels goes: every chunk alone, between its states and its
// gradients. One thread a block, chunk and state. -> dB, dC (blocks, B, chunks, N, STEPS)
extern "C" __global__ void scan_backward_shared(Index B, Index L, Index E, Index N, Index block,
                                                const REAL *dy, const REAL *x, const REAL *delta,
                                                const REAL *A, const REAL *in, const REAL *out,
                                                const REAL *states, const REAL *grads, REAL *dB,
                                                REAL *dC) {
    Index chunks = chunks_of(L), size = B * N * E, tiles = B * chunks * N, i = thread() % tiles;
    Index n = i % N, chunk = i / N % chunks, b = i / (N * chunks), first = thread() / tiles * block;
    if (first >= E) return;
    Index last = first + block < E ? first + block : E, rest = L - chunk * STEPS;
    Steps in_n = tile(in, i), out_n = tile(out, i), d_in = {}, d_out = {};
    for (Index e = first; e < last; e++) {
        Index row = (b * L + chunk * STEPS) * E + e, at = chunk * size + (b * N + n) * E + e;
        Steps step = column(delta + row, E, rest), d = column(dy + row, E, rest);
        Steps u = column(x + row, E, rest), decay;
        REAL h = states[at], g = grads[at + size], rate = A[n * E + e];
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            u.at[t] *= step.at[t];
            decay.at[t] = exp(step.at[t] * rate);
            h = decay.at[t] * h + u.at[t] * in_n.at[t];
            d_out.at[t] += d.at[t] * h;
        }
#pragma unroll
        for (int t = STEPS - 1; t >= 0; t--) {
            g += d.at[t] * out_n.at[t];
            d_in.at[t] += g * u.at[t];
            g *= decay.at[t];
        }
    }
    ((Steps *)dB)[thread()] = d_in;
    ((Steps *)dC)[thread()] = d_out;
}
