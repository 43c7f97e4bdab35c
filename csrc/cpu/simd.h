// Vectors of float of the widest kind that the instruction set has, written with the vector extensions of GCC and
// Clang: one source for every instruction set. Each is compiled into its own namespace, ARD_ISA.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace ard {

struct bf16 {
    std::uint16_t bits;
};

namespace ARD_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
constexpr bool WIDE_FILE = true;  // 32 vector registers, else 16
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr bool WIDE_FILE = false;
#else
constexpr int W = 4;
constexpr bool WIDE_FILE = false;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef std::uint32_t vu __attribute__((vector_size(W * 4)));
typedef std::int32_t vi __attribute__((vector_size(W * 4)));
typedef std::uint16_t vh __attribute__((vector_size(W * 2)));

template <class To, class From>
static inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// Memory for `count` numbers. (Standard containers of standard types are compiled once for all instruction sets: the
// linker may keep the one for the newest.)
template <class T>
struct Array {
    T* const start;
    explicit Array(std::int64_t count) : start(static_cast<T*>(std::malloc(count * sizeof(T)))) {
        if (start == nullptr && count > 0) std::abort();
    }
    ~Array() { std::free(start); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
};

static inline vf all(float x) { return vf{} + x; }

static inline vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

static inline vf load(const bf16* p) {
    vh x;
    std::memcpy(&x, p, sizeof x);
    return bits<vf>(__builtin_convertvector(x, vu) << 16);
}

static inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

// To the nearest, ties to even; NaN stays NaN.
static inline vh rounded(vf x) {
    const vu u = bits<vu>(x);
    const vu up = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? up : (u >> 16) | 0x40, vh);
}

static inline void store(bf16* p, vf x) {
    const vh y = rounded(x);
    std::memcpy(p, &y, sizeof y);
}

// The first n of a vector; the rest is 0.
template <class T>
static inline vf load(const T* p, int n) {
    T full[W] = {};
    std::memcpy(full, p, n * sizeof(T));
    return load(full);
}

template <class T>
static inline void store(T* p, vf x, int n) {
    T full[W];
    store(full, x);
    std::memcpy(p, full, n * sizeof(T));
}

// Element j of the result is element index(j) of a followed by b.
template <class V, class Index>
static inline V shuffled(V a, V b, const Index& index) {
    vi chosen;
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) chosen[j] = index(j);
    return __builtin_shuffle(a, b, chosen);
}

// In halves, pairwise: log2(W) steps.
static inline float sum(vf x) {
#pragma GCC unroll 4
    for (int s = W / 2; s > 0; s /= 2) x += shuffled(x, x, [s](int j) { return j ^ s; });
    return x[0];
}

static inline vf larger(vf a, vf b) { return a > b ? a : b; }

// NaN may be passed over.
static inline float largest(vf x) {
#pragma GCC unroll 4
    for (int s = W / 2; s > 0; s /= 2) x = larger(x, shuffled(x, x, [s](int j) { return j ^ s; }));
    return x[0];
}

// (W, W) transposed in place: the two blocks off the diagonal change places, at every size.
static inline void transpose(vu* rows) {
#pragma GCC unroll 4
    for (int s = 1; s < W; s *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (!(i & s)) {
                const vu a = rows[i], b = rows[i + s];
                rows[i] = shuffled(a, b, [s](int j) { return j & s ? W + j - s : j; });
                rows[i + s] = shuffled(a, b, [s](int j) { return j & s ? W + j : j + s; });
            }
}

// 2^x for x < 127, relative error below 2e-7 (Taylor's polynomial of degree 6 on [-1/2, 1/2]); 0 where the result is
// below the smallest normal number; NaN stays NaN.
static inline vf exp2(vf x) {
    const vf low = all(-127.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = (low > x ? low : x) + magic;
    const vf n = shifted - magic, f = (low > x ? low : x) - n;
    vf y = all(1.5403530393381609e-4f);
    y = y * f + 1.3333558146428443e-3f;
    y = y * f + 9.6181291076284772e-3f;
    y = y * f + 5.5504108664821580e-2f;
    y = y * f + 2.4022650695910071e-1f;
    y = y * f + 6.9314718055994531e-1f;
    y = y * f + 1.0f;
    return y * bits<vf>((bits<vi>(shifted) - bits<vi>(magic) + 127) << 23);
}

}  // namespace ARD_ISA
}  // namespace ard
