// CUDA twins of the recurrence of ref/longhorn.py, whose equations are cited; update="diagonal".
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
// (B, L, E), kappa (B, L), and k_t, q_t as tiles (B, chunks, N, STEPS), called key and query.
//
// The decay of (4) is 1 - delta k_n^2 = shrink + delta others_n, where shrink = 1/(1 + beta kappa)
// and others_n = sum over m != n of k_m^2, a tile too: so its digits stay where it is next to 0.
// Steps beyond L have k, q, delta = 0 and shrink = 1, and leave a state as it is. A kappa that
// overflows makes NaN.

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
__device__ Steps column(const REAL *x, Index E, Index rest, REAL beyond = 0) {
    Steps steps;
#pragma unroll
    for (int t = 0; t < STEPS; t++) steps.at[t] = t < rest ? x[t * E] : beyond;
    return steps;
}

__device__ void put_column(Steps steps, REAL *x, Index E, Index rest) {
#pragma unroll
    for (int t = 0; t < STEPS; t++)
        if (t < rest) x[t * E] = steps.at[t];
}

__device__ Steps tile(const REAL *tiles, Index i) { return ((const Steps *)tiles)[i]; }

__device__ Steps decays_of(Steps shrink, Steps step, Steps others) {
#pragma unroll
    for (int t = 0; t < STEPS; t++) shrink.at[t] += step.at[t] * others.at[t];
    return shrink;
}

// (2). One thread a step and channel. beta (B, L, E) -> delta, shrink (B, L, E)
extern "C" __global__ void step_sizes(Index B, Index L, Index E, const REAL *beta,
                                      const REAL *kappa, REAL *delta, REAL *shrink) {
    if (thread() >= B * L * E) return;
    shrink[thread()] = 1 / (1 + beta[thread()] * kappa[thread() / E]);
    delta[thread()] = beta[thread()] * shrink[thread()];
}

// (4) through the first parts, from zero, to the states after each; the last part is not needed.
// One thread a channel and part. -> states, decays (parts - 1, B, N, E), each a part's product
extern "C" __global__ void state_ends(Index B, Index L, Index E, Index N, Index span,
                                      const REAL *x, const REAL *delta, const REAL *shrink,
                                      const REAL *key, const REAL *others, REAL *states,
                                      REAL *decays) {
    Part part = part_of(B, L, E, span, 0);
    Index chunks = chunks_of(L), size = B * N * E;
    if (part.first + span >= chunks) return;
    for (Index chunk = part.first; chunk < part.last; chunk++) {
        Index row = (part.b * L + chunk * STEPS) * E + part.e, rest = L - chunk * STEPS;
        Steps step = column(delta + row, E, rest), shrunk = column(shrink + row, E, rest, 1);
        Steps u = column(x + row, E, rest);
#pragma unroll
        for (int t = 0; t < STEPS; t++) u.at[t] *= step.at[t];
        for (Index n = 0; n < N; n++) {
            Index i = (part.b * chunks + chunk) * N + n, at = (part.b * N + n) * E + part.e;
            Steps k = tile(key, i), decay = decays_of(shrunk, step, tile(others, i));
            REAL *end = states + part.last * size + at;
            REAL *product = decays + part.first / span * size + at;
            REAL S = chunk > part.first ? *end : 0, all = chunk > part.first ? *product : 1;
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                S = decay.at[t] * S + u.at[t] * k.at[t];
                all *= decay.at[t];
            }
            *end = S;
            *product = all;
        }
    }
}

// (7) back through the last parts, from zero, to the gradients before each; the first part is not
// needed. One thread a channel and part. -> grads, decays (parts - 1, B, N, E)
extern "C" __global__ void grad_ends(Index B, Index L, Index E, Index N, Index span,
                                     const REAL *dy, const REAL *delta, const REAL *shrink,
                                     const REAL *others, const REAL *query, REAL *grads,
                                     REAL *decays) {
    Part part = part_of(B, L, E, span, 1);
    Index chunks = chunks_of(L), size = B * N * E;
    if (part.first >= chunks) return;
    for (Index chunk = part.last - 1; chunk >= part.first; chunk--) {
        Index row = (part.b * L + chunk * STEPS) * E + part.e, rest = L - chunk * STEPS;
        Steps step = column(delta + row, E, rest), shrunk = column(shrink + row, E, rest, 1);
        Steps d = column(dy + row, E, rest);
        for (Index n = 0; n < N; n++) {
            Index i = (part.b * chunks + chunk) * N + n, at = (part.b * N + n) * E + part.e;
            Steps q = tile(query, i), decay = decays_of(shrunk, step, tile(others, i));
            REAL *start = grads + part.first * size + at;
            REAL *product = decays + (part.first / span - 1) * size + at;
            bool started = chunk < part.last - 1;
            REAL g = started ? *start : 0, all = started ? *product : 1;
#pragma unroll
            for (int t = STEPS - 1; t >= 0; t--) {
                g = (g + d.at[t] * q.at[t]) * decay.at[t];
                all *= decay.at[t];
            }
            *start = g;
            *product = all;
        }
    }
}

// Makes those ends true ones, part after part or, backward, part before part. One thread a channel
// and state. decays (parts - 1, B, N, E), ends (chunks + 1, B, N, E) -> ends
extern "C" __global__ void carry(Index B, Index L, Index E, Index N, Index span, Index backward,
                                 const REAL *decays, REAL *ends) {
    Index size = B * N * E, chunks = chunks_of(L), parts = (chunks + span - 1) / span;
    if (thread() >= size) return;
    REAL end = ends[(backward ? chunks : 0) * size + thread()];
    for (Index k = 0; k < parts - 1; k++) {
        Index done = backward ? parts - 2 - k : k;  // the row of decays
        Index chunk = (done + 1) * span;            // between two parts
        end = ends[chunk * size + thread()] + decays[done * size + thread()] * end;
        ends[chunk * size + thread()] = end;
    }
}

// (4), (5). One thread a channel and part. D (E,), states before each part -> states before the
// other chunks and the last, y
extern "C" __global__ void scan_forward(Index B, Index L, Index E, Index N, Index span,
                                        const REAL *x, const REAL *delta, const REAL *shrink,
                                        const REAL *key, const REAL *others, const REAL *query,
                                        const REAL *D, REAL *states, REAL *y) {
    Part part = part_of(B, L, E, span, 0);
    Index chunks = chunks_of(L), size = B * N * E;
    if (part.first >= chunks) return;
    for (Index chunk = part.first; chunk < part.last; chunk++) {
        Index row = (part.b * L + chunk * STEPS) * E + part.e, rest = L - chunk * STEPS;
        Steps step = column(delta + row, E, rest), shrunk = column(shrink + row, E, rest, 1);
        Steps u = column(x + row, E, rest), sum;
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            sum.at[t] = D[part.e] * u.at[t];
            u.at[t] *= step.at[t];
        }
        for (Index n = 0; n < N; n++) {
            Index i = (part.b * chunks + chunk) * N + n;
            Steps k = tile(key, i), q = tile(query, i);
            Steps decay = decays_of(shrunk, step, tile(others, i));
            REAL *state = states + chunk * size + (part.b * N + n) * E + part.e, S = *state;
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                S = decay.at[t] * S + u.at[t] * k.at[t];
                sum.at[t] += S * q.at[t];
            }
            if (chunk + 1 < part.last || part.last == chunks) state[size] = S;
        }
        put_column(sum, y + row, E, rest);
    }
}

// (7) without dk, dq; what dk needs of dkappa = -sum_E ddelta delta^2 is stepped = ddelta delta,
// which does not underflow with large keys. One thread a channel and part. Gradients after each
// part -> grads after the other chunks and the first, dx, dbeta, stepped (B, L, E), and of each
// part dD (parts, B, E)
extern "C" __global__ void scan_backward(Index B, Index L, Index E, Index N, Index span,
                                         const REAL *dy, const REAL *x, const REAL *delta,
                                         const REAL *shrink, const REAL *key, const REAL *others,
                                         const REAL *query, const REAL *D, const REAL *states,
                                         REAL *grads, REAL *dx, REAL *dbeta, REAL *stepped,
                                         double *dD) {
    Part part = part_of(B, L, E, span, 0);
    Index chunks = chunks_of(L), size = B * N * E;
    if (part.first >= chunks) return;
    double through_skip = 0;
    for (Index chunk = part.last - 1; chunk >= part.first; chunk--) {
        Index row = (part.b * L + chunk * STEPS) * E + part.e, rest = L - chunk * STEPS;
        Steps step = column(delta + row, E, rest), shrunk = column(shrink + row, E, rest, 1);
        Steps own = column(x + row, E, rest), d = column(dy + row, E, rest);
        Steps gk = {}, ddelta = {};  // gk = sum_n g k
        for (Index n = 0; n < N; n++) {
            Index i = (part.b * chunks + chunk) * N + n, at = (part.b * N + n) * E + part.e;
            Steps k = tile(key, i), q = tile(query, i), before;
            Steps decay = decays_of(shrunk, step, tile(others, i));
            REAL S = states[chunk * size + at], g = grads[(chunk + 1) * size + at];
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                before.at[t] = S;
                S = decay.at[t] * S + step.at[t] * own.at[t] * k.at[t];
            }
#pragma unroll
            for (int t = STEPS - 1; t >= 0; t--) {
                g += d.at[t] * q.at[t];
                gk.at[t] += g * k.at[t];
                ddelta.at[t] += g * k.at[t] * (own.at[t] - k.at[t] * before.at[t]);
                g *= decay.at[t];
            }
            if (chunk > part.first || chunk == 0) grads[chunk * size + at] = g;
        }
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            through_skip += d.at[t] * own.at[t];
            shrunk.at[t] *= ddelta.at[t] * shrunk.at[t];
            ddelta.at[t] *= step.at[t];
            gk.at[t] = step.at[t] * gk.at[t] + D[part.e] * d.at[t];
        }
        put_column(gk, dx + row, E, rest);
        put_column(shrunk, dbeta + row, E, rest);
        put_column(ddelta, stepped + row, E, rest);
    }
    dD[thread()] = through_skip;
}

// (7), dk and dq as far as a block of channels goes: every chunk alone, between its states and its
// gradients. One thread a block, chunk and state. -> dk, dq (blocks, B, chunks, N, STEPS)
extern "C" __global__ void scan_backward_shared(Index B, Index L, Index E, Index N, Index block,
                                                const REAL *dy, const REAL *x, const REAL *delta,
                                                const REAL *shrink, const REAL *key,
                                                const REAL *others, const REAL *query,
                                                const REAL *stepped, const REAL *states,
                                                const REAL *grads, REAL *dk, REAL *dq) {
    Index chunks = chunks_of(L), size = B * N * E, tiles = B * chunks * N, i = thread() % tiles;
    Index n = i % N, chunk = i / N % chunks, b = i / (N * chunks), first = thread() / tiles * block;
    if (first >= E) return;
    Index last = first + block < E ? first + block : E, rest = L - chunk * STEPS;
    Steps k = tile(key, i), q = tile(query, i), m = tile(others, i), d_key = {}, d_query = {};
    for (Index e = first; e < last; e++) {
        Index row = (b * L + chunk * STEPS) * E + e, at = chunk * size + (b * N + n) * E + e;
        Steps step = column(delta + row, E, rest), shrunk = column(shrink + row, E, rest, 1);
        Steps own = column(x + row, E, rest), d = column(dy + row, E, rest);
        Steps v = column(stepped + row, E, rest), decay = decays_of(shrunk, step, m), before;
        REAL S = states[at], g = grads[at + size];
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            before.at[t] = S;
            S = decay.at[t] * S + step.at[t] * own.at[t] * k.at[t];
            d_query.at[t] += d.at[t] * S;
        }
#pragma unroll
        for (int t = STEPS - 1; t >= 0; t--) {
            g += d.at[t] * q.at[t];
            REAL missing = own.at[t] - 2 * k.at[t] * before.at[t];
            d_key.at[t] += step.at[t] * (g * missing - 2 * k.at[t] * v.at[t]);
            g *= decay.at[t];
        }
    }
    ((Steps *)dk)[thread()] = d_key;
    ((Steps *)dq)[thread()] = d_query;
}
