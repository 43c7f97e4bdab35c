// Matrix products of tiles in a thread's memory.
//
// A factor is made of 32-bit words: floats, or pairs of bfloat16 that are neighbours along the summed dimension where
// the processor multiplies those. Both go through the same code.
#pragma once

#include "simd.h"

namespace ard {
namespace ARD_ISA {

// Asks for rows of some tensors before they are needed, a few at a time while products are computed: rows are a token
// apart, which a processor does not foresee.
struct Ahead {
    const char* next[8];
    std::int64_t stride[8], bytes, rows = 0;  // bytes: of a row
    int tensors = 0, pace;                    // pace: rows at a time, so that 64 are asked for during a tile's products
    void step() {
        for (int n = 0; n < pace && rows > 0; n++, rows--)
            for (int i = 0; i < tensors; i++) {
                for (std::int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(next[i] + j, 0, 2);
                next[i] += stride[i];
            }
    }
};

// Half a vector: head dim 72 takes 4 and a half, which a processor that computes vectors in halves does in less time
// than 5.
typedef float hf __attribute__((vector_size(W * 2)));

struct Single {
    typedef float word;
    struct Session {};                 // held while a thread computes
    static constexpr int K = 1;        // summed elements of a word
    static constexpr int GROUP = 48;   // rows at a time in the forward: whole vectors, and rows_at_once of most widths
    template <class V>
    static inline V add_product(V c, const float* a, V b) { return c + *a * b; }
};

#ifdef __AVX512BF16__
struct Pair {
    typedef std::uint32_t word;
    struct Session {};
    static constexpr int K = 2;
    static constexpr int GROUP = 48;
    static inline vf add_product(vf c, const std::uint32_t* a, vf b) {
        return bits<vf>(
            _mm512_dpbf16_ps(bits<__m512>(c), bits<__m512bh>(_mm512_set1_epi32(*a)), bits<__m512bh>(b)));
    }
    static inline hf add_product(hf c, const std::uint32_t* a, hf b) {
        return bits<hf>(
            _mm256_dpbf16_ps(bits<__m256>(c), bits<__m256bh>(_mm256_set1_epi32(*a)), bits<__m256bh>(b)));
    }
};

constexpr int HALVES = 2 * W;  // bfloat16 numbers in a vector

// The first n, at most HALVES, and zeros.
static inline __m512i halves(const bf16* p, std::int64_t n) {
    if (n >= HALVES) return _mm512_loadu_si512(p);
    return n > 0 ? _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p) : __m512i{};
}

// Rounded by the processor, which takes numbers below the smallest normal for 0.
static inline __m512i halves(vf low, vf high) {
    return bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(high), bits<__m512>(low)));
}

// Number i of one beside number i of the other, for 16 numbers of each, from `first` on.
template <int first>
static inline __m512i paired(__m512i one, __m512i other) {
    alignas(64) static constexpr struct Index {
        std::uint16_t at[HALVES];
        constexpr Index() : at() {
            for (int i = 0; i < W; i++) at[2 * i] = first + i, at[2 * i + 1] = HALVES + first + i;
        }
    } index;
    return _mm512_permutex2var_epi16(one, _mm512_load_si512(index.at), other);
}

// Number i of its first half beside number i of its second.
static inline __m512i paired(__m512i both) { return paired<0>(both, _mm512_alignr_epi64(both, both, 4)); }
#endif

// c (rows, NV vectors, the last one a half if HALF) = or += a b: a (rows, depth) with any strides, b (depth, as many)
// with rows `ldb` apart.
template <class M, int MR, int NV, bool HALF>
static inline void product_tile(
    float* c, std::int64_t ldc, const typename M::word* a, std::int64_t row_a, std::int64_t depth_a,
    const typename M::word* b, std::int64_t ldb, std::int64_t depth, bool add) {
    constexpr int WHOLE = NV - HALF;
    vf sums[MR][NV];
    hf ends[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
        for (int i = 0; i < WHOLE; i++) sums[m][i] = add ? load(c + m * ldc + i * W) : vf{};
        ends[m] = hf{};
        if (HALF && add) std::memcpy(&ends[m], c + m * ldc + WHOLE * W, sizeof(hf));
    }
    for (std::int64_t k = 0; k < depth; k++) {
        vf row[NV];
        hf end{};
#pragma GCC unroll 16
        for (int i = 0; i < WHOLE; i++) std::memcpy(&row[i], b + k * ldb + i * W, sizeof(vf));
        if (HALF) std::memcpy(&end, b + k * ldb + WHOLE * W, sizeof(hf));
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
            const auto* const factor = a + m * row_a + k * depth_a;
#pragma GCC unroll 16
            for (int i = 0; i < WHOLE; i++) sums[m][i] = M::add_product(sums[m][i], factor, row[i]);
            if (HALF) ends[m] = M::add_product(ends[m], factor, end);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
        for (int i = 0; i < WHOLE; i++) store(c + m * ldc + i * W, sums[m][i]);
        if (HALF) std::memcpy(c + m * ldc + WHOLE * W, &ends[m], sizeof(hf));
    }
}

// Rows worked on at once, so that their sums, a row of b and a broadcast fit the registers, and enough sums are under
// way to hide an addition's latency.
constexpr int rows_at_once(int vectors) {
    return WIDE_FILE ? (vectors == 1 ? 12 : vectors == 2 ? 12 : vectors == 3 ? 8 : vectors == 4 ? 6 : 5)
                     : (vectors == 1 ? 8 : 4);
}

constexpr int MOST_VECTORS = WIDE_FILE ? 5 : 3;

template <class M, int NV, bool HALF>
static void product_rows(
    float* c, std::int64_t ldc, const typename M::word* a, std::int64_t row_a, std::int64_t depth_a,
    const typename M::word* b, std::int64_t ldb, std::int64_t depth, std::int64_t rows, bool add, Ahead& ahead) {
    constexpr int MR = rows_at_once(NV);
    std::int64_t m = 0;
    for (; m + MR <= rows; m += MR) {
        ahead.step();
        product_tile<M, MR, NV, HALF>(c + m * ldc, ldc, a + m * row_a, row_a, depth_a, b, ldb, depth, add);
    }
    for (; MR > 4 && m + 4 <= rows; m += 4)
        product_tile<M, 4, NV, HALF>(c + m * ldc, ldc, a + m * row_a, row_a, depth_a, b, ldb, depth, add);
    for (; m + 2 <= rows; m += 2)
        product_tile<M, 2, NV, HALF>(c + m * ldc, ldc, a + m * row_a, row_a, depth_a, b, ldb, depth, add);
    if (m < rows)
        product_tile<M, 1, NV, HALF>(c + m * ldc, ldc, a + m * row_a, row_a, depth_a, b, ldb, depth, add);
}

template <class M, bool HALF, class... Arguments>
static inline void product_of(std::int64_t vectors, Arguments&&... rest) {
    switch (vectors) {
        case 1: product_rows<M, 1, HALF>(rest...); break;
        case 2: product_rows<M, 2, HALF>(rest...); break;
        case 3: product_rows<M, 3, HALF>(rest...); break;
#if defined(__AVX512F__)
        case 4: product_rows<M, 4, HALF>(rest...); break;
        case 5: product_rows<M, 5, HALF>(rest...); break;
#endif
    }
}

// c (rows, width) = or += a b. Up to the next whole vector c may be written, and b must be there.
template <class M>
static void product(
    float* c, std::int64_t ldc, const typename M::word* a, std::int64_t row_a, std::int64_t depth_a,
    const typename M::word* b, std::int64_t ldb, std::int64_t depth, std::int64_t rows, std::int64_t width,
    bool add, Ahead& ahead) {
    std::int64_t vectors = (width + W - 1) / W;
    const bool half = W == 16 && vectors * W - width >= W / 2;
    // In parts of about the same width.
    for (std::int64_t parts = (vectors + MOST_VECTORS - 1) / MOST_VECTORS; parts > 0; parts--) {
        const std::int64_t now = (vectors + parts - 1) / parts;
        if (half && parts == 1) product_of<M, W == 16>(now, c, ldc, a, row_a, depth_a, b, ldb, depth, rows, add, ahead);
        else product_of<M, false>(now, c, ldc, a, row_a, depth_a, b, ldb, depth, rows, add, ahead);
        c += now * W, b += now * W, vectors -= now;
    }
}

// What a word is made of.
template <class Word>
struct ElementOf {
    typedef bf16 type;
};
template <>
struct ElementOf<float> {
    typedef float type;
};
template <class Word>
using Element = typename ElementOf<Word>::type;

// The first n of a vector, or all of it; the rest is 0.
template <class T>
static inline vf some(const T* p, std::int64_t n) {
    return n >= W ? load(p) : n > 0 ? load(p, static_cast<int>(n)) : vf{};
}

// The words at x, of which n elements are there.
template <class T>
static inline vu words_at(const float*, const T* x, std::int64_t n) { return bits<vu>(some(x, n)); }
#ifdef __AVX512BF16__
static inline vu words_at(const std::uint32_t*, const bf16* x, std::int64_t n) { return bits<vu>(halves(x, n)); }
#endif

// x (rows, width) as the left factor, summed over the columns: (rows, ld), zeros after the last; ld in whole vectors.
template <class Word, class T>
static inline void left(
    Word* to, std::int64_t ld, const T* x, std::int64_t stride, std::int64_t rows,
    std::int64_t width) {
    constexpr std::int64_t K = sizeof(Word) / sizeof(Element<Word>);
    for (std::int64_t r = 0; r < rows; r++)
        for (std::int64_t i = 0; i < ld; i += W) {
            const vu words = words_at(to, x + r * stride + i * K, width - i * K);
            std::memcpy(to + r * ld + i, &words, sizeof words);
        }
}

// x (rows, width) as the right factor, summed over the rows: (rows / K, ld), zeros where x ends; of pairs, up to a
// whole number of W.
template <class T>
static inline void right(
    float* to, std::int64_t ld, const T* x, std::int64_t stride, std::int64_t rows,
    std::int64_t width) {
    for (std::int64_t r = 0; r < rows; r++)
        for (std::int64_t i = 0; i < ld; i += W) store(to + r * ld + i, some(x + r * stride + i, width - i));
}

#ifdef __AVX512BF16__
static inline void right(
    std::uint32_t* to, std::int64_t ld, const bf16* x, std::int64_t stride, std::int64_t rows,
    std::int64_t width) {
    for (std::int64_t r = 0; r < rows; r += 2)
        for (std::int64_t i = 0; i < ld; i += HALVES) {
            const bf16* p = x + r * stride + i;
            const __m512i one = halves(p, width - i), other = r + 1 < rows ? halves(p + stride, width - i) : __m512i{};
            _mm512_storeu_si512(to + r / 2 * ld + i, paired<0>(one, other));
            if (i + W < ld) _mm512_storeu_si512(to + r / 2 * ld + i + W, paired<W>(one, other));
        }
    const std::int64_t end = (rows + 1) / 2;
    if (end % W) std::memset(to + end * ld, 0, (W - end % W) * ld * sizeof *to);
}
#endif

// x (rows, width) transposed as the right factor, summed over the columns of x: (words, ld), zeros where x ends; words
// in whole vectors.
template <class Word, class T>
static inline void right_transposed(
    Word* to, std::int64_t ld, std::int64_t words, const T* x, std::int64_t stride, std::int64_t rows,
    std::int64_t width) {
    for (std::int64_t first = 0; first < rows; first += W)
        for (std::int64_t i = 0; i < words; i += W) {
            constexpr std::int64_t K = sizeof(Word) / sizeof(Element<Word>);
            const std::int64_t many = rows - first < W ? rows - first : W;
            const T* p = x + first * stride + i * K;
            vu square[W];
            if (many == W && width - i * K >= W * K) {
#pragma GCC unroll 16
                for (int r = 0; r < W; r++) square[r] = words_at(to, p + r * stride, W * K);
            } else {
                for (int r = 0; r < W; r++) square[r] = r < many ? words_at(to, p + r * stride, width - i * K) : vu{};
            }
            transpose(square);
            for (std::int64_t k = 0; k < W; k++) std::memcpy(to + (i + k) * ld + first, &square[k], sizeof(vu));
        }
}

}  // namespace ARD_ISA
}  // namespace ard
