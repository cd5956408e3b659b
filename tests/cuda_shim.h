// CUDA C as C++: a launch is a loop over the grid, one thread after the other. For kernels whose
// threads do not wait for each other.

#include <cmath>
#include <type_traits>
#include <utility>

#ifdef __APPLE__
#define sincos __sincos
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dimension {
    unsigned x = 1, y = 1, z = 1;
};
static thread_local Dimension gridDim, blockDim, blockIdx, threadIdx;

// A parameter's type as NumPy writes it: q long long; f, d, F, D a pointer to float, double or a
// pair of them; ? anything else.
template <typename T>
char type_code() {
    using Value = std::remove_const_t<std::remove_pointer_t<T>>;
    if (!std::is_pointer_v<T>) return std::is_same_v<T, long long> ? 'q' : '?';
    if (std::is_same_v<Value, float>) return 'f';
    if (std::is_same_v<Value, double>) return 'd';
    return !std::is_class_v<Value> ? '?' : sizeof(Value) == 8 ? 'F' : 'D';
}

template <typename... A, std::size_t... I>
void run(void (*kernel)(A...), int blocks, int threads, bool reverse, void **arguments,
         std::index_sequence<I...>) {
    gridDim.x = blocks, blockDim.x = threads;
    for (int n = 0; n < blocks * threads; n++) {
        int at = reverse ? blocks * threads - 1 - n : n;
        blockIdx.x = at / threads, threadIdx.x = at % threads;
        kernel(*(A *)arguments[I]...);
    }
}

template <typename... A>
void launch(void (*kernel)(A...), int blocks, int threads, bool reverse, void **arguments) {
    run(kernel, blocks, threads, reverse, arguments, std::index_sequence_for<A...>{});
}

template <typename... A>
void signature(void (*)(A...), char *codes) {
    ((*codes++ = type_code<A>()), ...);
    *codes = 0;
}

#define EXPORT(kernel)                                                                       \
    extern "C" void launch_##kernel(int blocks, int threads, bool reverse, void **arguments) { \
        launch(kernel, blocks, threads, reverse, arguments);                                 \
    }                                                                                        \
    extern "C" void signature_##kernel(char *codes) { signature(kernel, codes); }
