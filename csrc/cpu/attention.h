// Attention between blocks, forward and backward, in tiles that stay in the cache: as FlashAttention (arXiv 2205.14135),
// the scores are never in memory. A tile lies within one block of queries and one of keys, so that no pair is masked.
#pragma once

#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "product.h"

namespace ard {
namespace ARD_ISA {

constexpr std::int64_t KEYS = 64;  // of a tile
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

static inline std::int64_t up(std::int64_t x, std::int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Consecutive parts of a thread's memory.
struct Memory {
    char* next;
    template <class T>
    T* take(std::int64_t count) {
        T* p = reinterpret_cast<T*>(next);
        next += up(count * sizeof(T), 64);
        return p;
    }
};

struct Tile {
    std::int64_t block, first, rows;  // first: token of the sample
};

// The tokens of blocks [from, to) in tiles.
static std::vector<Tile> tiles(const Layout& layout, std::int64_t from, std::int64_t to, std::int64_t size) {
    std::vector<Tile> found;
    for (std::int64_t s = from; s < to; s++)
        for (std::int64_t t = layout.starts[s]; t < layout.starts[s + 1]; t += size)
            found.push_back({s, t, layout.starts[s + 1] - t < size ? layout.starts[s + 1] - t : size});
    return found;
}

// The tiles of the queries, counted from the first query.
static std::vector<Tile> query_tiles(const Attention& a, std::int64_t size) {
    if (a.block < 0) return tiles(a.layout, 0, a.layout.blocks, size);
    auto found = tiles(a.layout, a.block, a.block + 1, size);
    for (Tile& tile : found) tile.first -= a.layout.starts[a.block];
    return found;
}

static std::int64_t queries(const Attention& a) {
    return a.block < 0 ? a.layout.total() : a.layout.starts[a.block + 1] - a.layout.starts[a.block];
}

template <class T>
static T* at(const Tensor& x, std::int64_t b, std::int64_t t, std::int64_t h) {
    return static_cast<T*>(x.data) + b * x.batch + t * x.token + h * x.head;
}

template <class T>
static inline void write_row(T* to, const float* row, float factor, std::int64_t width) {
    std::int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, load(row + i) * factor);
    if (i < width) store(to + i, load(row + i) * factor, static_cast<int>(width - i));
}

// A row of weights as the left factor.
static inline void keep_row(float* to, const float* row) { std::memcpy(to, row, KEYS * sizeof(float)); }
#ifdef __AVX512BF16__
// The processor's rounding, which takes numbers below the smallest normal for 0.
static inline __m256i halves(const float* x) { return bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(load(x)))); }

static inline void keep_row(std::uint32_t* to, const float* row) {
    for (int i = 0; i < KEYS; i += W) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), halves(row + i));
}
#endif

// Queries of a unit of the forward: a tile of keys is packed for so many.
constexpr std::int64_t FORWARD_QUERIES = 256;
// Of them, those whose scores are in the nearest cache together.
constexpr std::int64_t GROUP = 24;

template <class M, class T>
static void forward_unit(const Attention& a, const std::vector<Tile>& keys, std::int64_t b, std::int64_t h, const Tile& tile) {
    typedef typename M::word word;
    const std::int64_t words = (a.dim + M::K - 1) / M::K, wide_dim = up(a.dim, W), n = tile.rows;
    Memory memory{static_cast<char*>(scratch(
        4 * (n * words + words * KEYS + KEYS * wide_dim + 2 * GROUP * KEYS + n * wide_dim + (W + 1) * n) + 64 * 8))};
    word *q = memory.take<word>(n * words), *k = memory.take<word>(words * KEYS);
    word *v = memory.take<word>(KEYS / M::K * wide_dim), *kept = memory.take<word>(GROUP * KEYS / M::K);
    float *scores = memory.take<float>(GROUP * KEYS), *out = memory.take<float>(n * wide_dim);
    float *top = memory.take<float>(n), *total = memory.take<float>(n * W);  // totals: one for every lane
    left(q, words, at<const T>(a.q, b, tile.first, h), a.q.token, n, a.dim);
    std::memset(out, 0, n * wide_dim * sizeof(float));
    std::memset(total, 0, n * W * sizeof(float));
    for (std::int64_t r = 0; r < n; r++) top[r] = -INFINITY;
    const float factor = a.scale * LOG2E;
    for (const Tile& key : keys) {
        if (!sees(a.mask, tile.block, key.block)) continue;
        const std::int64_t vectors = (key.rows + W - 1) / W, whole = key.rows / W * W;
        right_transposed(k, KEYS, words, at<const T>(a.k, b, key.first, h), a.k.token, key.rows, a.dim);
        right(v, wide_dim, at<const T>(a.v, b, key.first, h), a.v.token, key.rows, a.dim);
        for (std::int64_t g = 0; g < n; g += GROUP) {
            const std::int64_t rows = n - g < GROUP ? n - g : GROUP;
            product<M>(scores, KEYS, q + g * words, words, 1, k, KEYS, words, rows, vectors, false);
            for (std::int64_t r = 0; r < rows; r++) {
                float* row = scores + r * KEYS;
                vf most = all(-INFINITY);
                for (std::int64_t i = 0; i < vectors * W; i += W) {
                    const vf x = load(row + i) * factor;
                    store(row + i, x);
                    if (i < whole) most = larger(x, most);
                }
                for (std::int64_t i = whole; i < vectors * W; i++) {  // no such keys
                    if (i >= key.rows) row[i] = -INFINITY;
                    if (row[i] > most[0]) most[0] = row[i];
                }
                const float before = top[g + r], highest = largest(most);
                const float now = highest > before ? highest : before;
                const float offset = now == -INFINITY ? 0 : now;
                vf sums{};
                for (std::int64_t i = 0; i < vectors * W; i += W) {
                    const vf p = exp2(load(row + i) - offset);
                    store(row + i, p);
                    sums += p;
                }
                for (std::int64_t i = vectors * W; i < KEYS; i += W) store(row + i, vf{});
                keep_row(kept + r * (KEYS / M::K), row);
                if (now != before) {
                    const vf shrink = exp2(all(before - offset));
                    store(total + (g + r) * W, load(total + (g + r) * W) * shrink);
                    float* o = out + (g + r) * wide_dim;
                    for (std::int64_t i = 0; i < wide_dim; i += W) store(o + i, load(o + i) * shrink);
                    top[g + r] = now;
                }
                store(total + (g + r) * W, load(total + (g + r) * W) + sums);
            }
            product<M>(out + g * wide_dim, wide_dim, kept, KEYS / M::K, 1, v, wide_dim, (key.rows + M::K - 1) / M::K,
                       rows, wide_dim / W, true);
        }
    }
    for (std::int64_t r = 0; r < n; r++) {
        const float weights = sum(load(total + r * W));
        write_row(at<T>(a.out, b, tile.first + r, h), out + r * wide_dim, 1.0f / weights, a.dim);
        a.lse[(b * a.heads + h) * queries(a) + tile.first + r] = top[r] * LN2 + std::log(weights);
    }
}

template <class M, class T>
static void forward_all(const Attention& a, int threads) {
    const auto rows = query_tiles(a, FORWARD_QUERIES), keys = tiles(a.layout, 0, a.layout.blocks, KEYS);
    const std::int64_t many = rows.size(), pairs = a.batch * a.heads;
    // The last blocks see the most keys under the causal mask: they come first.
    parallel(threads, pairs * many, [&](std::int64_t unit) {
        const std::int64_t pair = unit % pairs;
        forward_unit<M, T>(a, keys, pair / a.heads, pair % a.heads, rows[many - 1 - unit / pairs]);
    });
}

// Queries of a tile of the backward.
constexpr std::int64_t QUERIES = 32;

// Weights and their gradients of a tile, (rows, KEYS) float, as the factors of the three products that take them:
// summed over the queries (transposed: row stride 1, depth stride KEYS) and over the keys.
template <class M>
struct Factors;

template <>
struct Factors<Single> {
    float *weights, *gradients;
    float *over_queries, *over_keys;
    static constexpr std::int64_t size = 0;
    void set(float* w, float* g, Memory&) { weights = w, over_queries = over_keys = gradients = g; }
    const float* weights_over_queries() const { return weights; }
    void fill(std::int64_t) {}
};

#ifdef __AVX512BF16__
static inline void pair_rows(std::uint32_t* to, const float* low, const float* high) {
    for (int i = 0; i < KEYS; i += W) {
        __m512i pair = _mm512_cvtepu16_epi32(halves(low + i));
        if (high != nullptr) pair = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(high + i)), 16));
        _mm512_storeu_si512(to + i, pair);
    }
}

template <>
struct Factors<Pair> {
    float *weights, *gradients;
    std::uint32_t *paired_weights, *over_queries, *over_keys;
    static constexpr std::int64_t size = 3 * QUERIES * KEYS / 2;
    void set(float* w, float* g, Memory& memory) {
        weights = w, gradients = g;
        paired_weights = memory.take<std::uint32_t>(QUERIES * KEYS / 2);
        over_queries = memory.take<std::uint32_t>(QUERIES * KEYS / 2);
        over_keys = memory.take<std::uint32_t>(QUERIES * KEYS / 2);
    }
    const std::uint32_t* weights_over_queries() const { return paired_weights; }
    void fill(std::int64_t rows) {
        for (std::int64_t r = 0; r < rows; r += 2) {
            const bool last = r + 1 == rows;
            const float *w = weights + r * KEYS, *g = gradients + r * KEYS;
            pair_rows(paired_weights + r / 2 * KEYS, w, last ? nullptr : w + KEYS);
            pair_rows(over_queries + r / 2 * KEYS, g, last ? nullptr : g + KEYS);
        }
        for (std::int64_t r = 0; r < rows; r++) keep_row(over_keys + r * (KEYS / 2), gradients + r * KEYS);
    }
};
#endif

template <class M, class T>
static void backward_unit(
    const Attention& a, const std::vector<Tile>& rows, const std::vector<Tile>& keys, std::int64_t b, std::int64_t h) {
    typedef typename M::word word;
    const std::int64_t words = (a.dim + M::K - 1) / M::K, wide_dim = up(a.dim, W), many = rows.size();
    const std::int64_t left_size = QUERIES * words, right_size = QUERIES / M::K * wide_dim;
    const std::int64_t key_left = words * KEYS, key_right = KEYS / M::K * wide_dim, wide_keys = KEYS * wide_dim;
    Memory memory{static_cast<char*>(scratch(
        4 * (many * (2 * left_size + 2 * right_size + QUERIES * wide_dim + 2 * QUERIES) + 2 * key_left + key_right +
             2 * wide_keys + 2 * QUERIES * KEYS + Factors<M>::size) + 64 * 20))};
    word *q_left = memory.take<word>(many * left_size), *q_right = memory.take<word>(many * right_size);
    word *do_left = memory.take<word>(many * left_size), *do_right = memory.take<word>(many * right_size);
    float* dq = memory.take<float>(many * QUERIES * wide_dim);
    float *lse = memory.take<float>(many * QUERIES), *delta = memory.take<float>(many * QUERIES);
    word *k_transposed = memory.take<word>(key_left), *v_transposed = memory.take<word>(key_left);
    word* k_right = memory.take<word>(key_right);
    float *dk = memory.take<float>(wide_keys), *dv = memory.take<float>(wide_keys);
    float *weights = memory.take<float>(QUERIES * KEYS), *gradients = memory.take<float>(QUERIES * KEYS);
    Factors<M> factors;
    factors.set(weights, gradients, memory);
    std::memset(dq, 0, many * QUERIES * wide_dim * sizeof(float));
    for (std::int64_t c = 0; c < many; c++) {
        const Tile& tile = rows[c];
        const T *q = at<const T>(a.q, b, tile.first, h), *dout = at<const T>(a.dout, b, tile.first, h);
        left(q_left + c * left_size, words, q, a.q.token, tile.rows, a.dim);
        right(q_right + c * right_size, wide_dim, q, a.q.token, tile.rows, a.dim);
        left(do_left + c * left_size, words, dout, a.dout.token, tile.rows, a.dim);
        right(do_right + c * right_size, wide_dim, dout, a.dout.token, tile.rows, a.dim);
        for (std::int64_t r = 0; r < tile.rows; r++) {
            const T *o = at<const T>(a.out, b, tile.first + r, h), *d = dout + r * a.dout.token;
            vf products{};
            std::int64_t i = 0;
            for (; i + W <= a.dim; i += W) products += load(o + i) * load(d + i);
            if (i < a.dim) products += load(o + i, static_cast<int>(a.dim - i)) * load(d + i, static_cast<int>(a.dim - i));
            delta[c * QUERIES + r] = sum(products);
            lse[c * QUERIES + r] = a.lse[(b * a.heads + h) * queries(a) + tile.first + r] * LOG2E;
        }
    }
    const float factor = a.scale * LOG2E;
    for (const Tile& key : keys) {
        const std::int64_t vectors = (key.rows + W - 1) / W;
        const T *k = at<const T>(a.k, b, key.first, h), *v = at<const T>(a.v, b, key.first, h);
        std::memset(dk, 0, wide_keys * sizeof(float));
        std::memset(dv, 0, wide_keys * sizeof(float));
        bool packed = false;
        for (std::int64_t c = 0; c < many; c++) {
            if (!sees(a.mask, rows[c].block, key.block)) continue;
            if (!packed) {
                right_transposed(k_transposed, KEYS, words, k, a.k.token, key.rows, a.dim);
                right_transposed(v_transposed, KEYS, words, v, a.v.token, key.rows, a.dim);
                right(k_right, wide_dim, k, a.k.token, key.rows, a.dim);
                packed = true;
            }
            const std::int64_t n = rows[c].rows, depth = (n + M::K - 1) / M::K, columns = wide_dim / W;
            product<M>(weights, KEYS, q_left + c * left_size, words, 1, k_transposed, KEYS, words, n, vectors, false);
            product<M>(gradients, KEYS, do_left + c * left_size, words, 1, v_transposed, KEYS, words, n, vectors, false);
            for (std::int64_t r = 0; r < n; r++) {
                float *w = weights + r * KEYS, *g = gradients + r * KEYS;
                const float l = lse[c * QUERIES + r], d = delta[c * QUERIES + r];
                for (std::int64_t i = 0; i < vectors * W; i += W) {
                    const vf p = exp2(load(w + i) * factor - l);
                    store(w + i, p);
                    store(g + i, p * (load(g + i) - d));
                }
                for (std::int64_t i = key.rows; i < KEYS; i++) w[i] = g[i] = 0;
            }
            factors.fill(n);
            product<M>(dv, wide_dim, factors.weights_over_queries(), 1, KEYS, do_right + c * right_size, wide_dim, depth,
                       key.rows, columns, true);
            product<M>(dk, wide_dim, factors.over_queries, 1, KEYS, q_right + c * right_size, wide_dim, depth, key.rows,
                       columns, true);
            product<M>(dq + c * QUERIES * wide_dim, wide_dim, factors.over_keys, KEYS / M::K, 1, k_right, wide_dim,
                       (key.rows + M::K - 1) / M::K, n, columns, true);
        }
        for (std::int64_t r = 0; r < key.rows; r++) {
            write_row(at<T>(a.dk, b, key.first + r, h), dk + r * wide_dim, a.scale, a.dim);
            write_row(at<T>(a.dv, b, key.first + r, h), dv + r * wide_dim, 1.0f, a.dim);
        }
    }
    for (std::int64_t c = 0; c < many; c++)
        for (std::int64_t r = 0; r < rows[c].rows; r++)
            write_row(at<T>(a.dq, b, rows[c].first + r, h), dq + (c * QUERIES + r) * wide_dim, a.scale, a.dim);
}

template <class M, class T>
static void backward_all(const Attention& a, int threads) {
    const auto rows = query_tiles(a, QUERIES), keys = tiles(a.layout, 0, a.layout.blocks, KEYS);
    parallel(threads, a.batch * a.heads, [&](std::int64_t unit) {
        backward_unit<M, T>(a, rows, keys, unit / a.heads, unit % a.heads);
    });
}

#ifdef __AVX512BF16__
typedef Pair Half;
#else
typedef Single Half;
#endif

static void attention_forward(const Attention& a, int threads) {
    a.q.dtype == DType::f32 ? forward_all<Single, float>(a, threads) : forward_all<Half, bf16>(a, threads);
}

static void attention_backward(const Attention& a, int threads) {
    a.q.dtype == DType::f32 ? backward_all<Single, float>(a, threads) : backward_all<Half, bf16>(a, threads);
}

}  // namespace ARD_ISA
}  // namespace ard
