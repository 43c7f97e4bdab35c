// Vectors of float of the widest kind that the instruction set has, written with the vector extensions of GCC and
// Clang: one source for every instruction set. Each is compiled into its own namespace, ARD_ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "kernels.h"

namespace ard {

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
        if (start == nullptr && count > 0) throw std::bad_alloc();
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

#ifdef __AVX512F__
// GCC 12 widens and narrows these vectors in halves.
static inline vu widened(vh x) { return bits<vu>(_mm512_cvtepu16_epi32(bits<__m256i>(x))); }

static inline vh narrowed(vu x) { return bits<vh>(_mm512_cvtepi32_epi16(bits<__m512i>(x))); }
#else
static inline vu widened(vh x) { return __builtin_convertvector(x, vu); }

static inline vh narrowed(vu x) { return __builtin_convertvector(x, vh); }
#endif

static inline vf load(const bf16* p) {
    vh x;
    std::memcpy(&x, p, sizeof x);
    return bits<vf>(widened(x) << 16);
}

static inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

// To the nearest, ties to even; NaN stays NaN. (The processor's own instruction takes what is below the smallest normal
// number for 0.)
static inline vh rounded(vf x) {
#ifdef __AVX512BF16__
    return bits<vh>(_mm512_cvtneps_pbh(bits<__m512>(x)));
#else
    const vu u = bits<vu>(x);
    const vu up = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return narrowed(x == x ? up : (u >> 16) | 0x40);
#endif
}

static inline void store(bf16* p, vf x) {
    const vh y = rounded(x);
    std::memcpy(p, &y, sizeof y);
}

// The first n < W of a vector; the rest is 0.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
static inline __mmask16 lanes(int n) { return static_cast<__mmask16>((1 << n) - 1); }

static inline vf load(const float* p, int n) { return bits<vf>(_mm512_maskz_loadu_ps(lanes(n), p)); }

static inline vf load(const bf16* p, int n) {
    return bits<vf>(widened(bits<vh>(_mm256_maskz_loadu_epi16(lanes(n), p))) << 16);
}

static inline void store(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, lanes(n), bits<__m512>(x)); }

static inline void store(bf16* p, vf x, int n) { _mm256_mask_storeu_epi16(p, lanes(n), bits<__m256i>(rounded(x))); }
#else
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
#endif

// The first n of a vector, or all of it.
template <class T>
static inline vf get(const T* p, int n) {
    return n == W ? load(p) : load(p, n);
}

template <class T>
static inline void put(T* p, vf x, int n) {
    n == W ? store(p, x) : store(p, x, n);
}

// As it will be read again.
static inline vf as_stored(const float*, vf x) { return x; }

static inline vf as_stored(const bf16*, vf x) { return bits<vf>(widened(rounded(x)) << 16); }

// Past the caches, without reading what is replaced; p starts a vector. `arrived` ends a series of them.
#ifdef __AVX512F__
static inline void stream(float* p, vf x) { _mm512_stream_ps(p, bits<__m512>(x)); }

static inline void stream(bf16* p, vf x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(rounded(x)));
}

static inline void arrived() { _mm_sfence(); }
#else
template <class T>
static inline void stream(T* p, vf x) { store(p, x); }

static inline void arrived() {}
#endif

// Into the second-level cache: into the first one fewer loads can be on their way. p may point behind everything.
template <class T>
static inline void fetch(const T* p) { __builtin_prefetch(p, 0, 2); }

// f(first, how many) over the vectors of a row.
template <class F>
static inline void columns(std::int64_t width, const F& f) {
    std::int64_t i = 0;
    for (; i + W <= width; i += W) f(i, W);
    if (i < width) f(i, static_cast<int>(width - i));
}

// Element j of the result is element Index::of(j) of a followed by b.
template <class Index, class V, std::size_t... j>
static inline V shuffled(V a, V b, std::index_sequence<j...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Index::of(j)...);
#else
    return __builtin_shuffle(a, b, vi{Index::of(j)...});
#endif
}

template <class Index, class V>
static inline V shuffled(V a, V b) {
    return shuffled<Index>(a, b, std::make_index_sequence<W>());
}

template <int s>
struct Exchange {
    static constexpr int of(int j) { return j ^ s; }
};

// In halves, pairwise: log2(W) steps.
template <int s = W / 2>
static inline float sum(vf x) {
    x += shuffled<Exchange<s>>(x, x);
    if constexpr (s > 1) return sum<s / 2>(x);
    return x[0];
}

static inline vf larger(vf a, vf b) { return a > b ? a : b; }

template <int s>
struct Upper {
    static constexpr int of(int j) { return j & s ? W + j - s : j; }
};

template <int s>
struct Lower {
    static constexpr int of(int j) { return j & s ? W + j : j + s; }
};

// Lane r of the result is rows[r] reduced by f, of W rows, which are overwritten.
template <int s = 1, class F>
static inline vf reduced(vf* rows, F f) {
#pragma GCC unroll 8
    for (int i = 0; i < W / s / 2; i++) {
        const vf a = rows[2 * i], b = rows[2 * i + 1];
        rows[i] = f(shuffled<Upper<s>>(a, b), shuffled<Lower<s>>(a, b));
    }
    if constexpr (2 * s < W) return reduced<2 * s>(rows, f);
    return rows[0];
}

// NaN may be passed over.
static inline vf largest_of_each(vf* rows) {
    return reduced(rows, [](vf a, vf b) { return larger(a, b); });
}

static inline vf sum_of_each(vf* rows) {
    return reduced(rows, [](vf a, vf b) { return a + b; });
}

// (W, W) transposed in place: the two blocks off the diagonal change places, at every size.
template <int s = 1>
static inline void transpose(vu* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & s)) {
            const vu a = rows[i], b = rows[i + s];
            rows[i] = shuffled<Upper<s>>(a, b);
            rows[i + s] = shuffled<Lower<s>>(a, b);
        }
    if constexpr (2 * s < W) transpose<2 * s>(rows);
}

// 2^x for x < 127, relative error below 2e-7 (the polynomial of degree 5 through 1 whose largest relative error on
// [-1/2, 1/2] is least, 9.2e-8); 0 where the result is below the smallest normal number, or as good; NaN stays NaN.
static inline vf exp2(vf x) {
#ifdef __AVX512F__
    // Zen 5 lets vreduceps wait for what its target register held before: a difference takes its place.
    const __m512 above = _mm512_max_ps(_mm512_set1_ps(-200.0f), bits<__m512>(x));  // 2^-200 is 0
    const __m512 n = _mm512_roundscale_ps(above, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf f = bits<vf>(above) - bits<vf>(n);
#else
    const vf low = all(-127.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = (low > x ? low : x) + magic;
    const vf n = shifted - magic, f = (low > x ? low : x) - n;
#endif
    vf y = all(1.3264726899305072e-3f);
    y = y * f + 9.6715126605979480e-3f;
    y = y * f + 5.5507337442432510e-2f;
    y = y * f + 2.4022242084918513e-1f;
    y = y * f + 6.9314697759847250e-1f;
    y = y * f + 1.0f;
#ifdef __AVX512F__
    return bits<vf>(_mm512_scalef_ps(bits<__m512>(y), n));
#else
    return y * bits<vf>((bits<vu>(shifted) - bits<vu>(magic) + 127) << 23);
#endif
}

// Logarithm to the base of 2 for x >= the smallest normal number, absolute error below 1e-7 beside the result's own
// rounding (atanh's series around the nearest power of 2); of 0 something below -126; infinity and NaN stay.
static inline vf log2(vf x) {
    const vu top = (bits<vu>(x) - 0x3f3504f3u) & ~0x7fffffu;  // of x / sqrt(1/2): the power of 2, as bits
    const vf m = bits<vf>(bits<vu>(x) - top), t = (m - 1.0f) / (m + 1.0f), u = t * t;
    vf y = all(3.2059890e-1f);
    y = y * u + 4.1219858e-1f;
    y = y * u + 5.7707802e-1f;
    y = y * u + 9.6179669e-1f;
    y = y * u + 2.8853901f;
    y = y * t + __builtin_convertvector(bits<vi>(top) >> 23, vf);
    return x < all(INFINITY) ? y : x;
}

}  // namespace ARD_ISA
}  // namespace ard
