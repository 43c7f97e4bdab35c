// Attention between blocks, forward and backward, in tiles that stay in the cache: as in FlashAttention (arXiv
// 2205.14135), the scores are never in memory. A tile lies within one block of queries and one of keys, so that no pair
// is masked.
#pragma once

#include <cmath>
#include <initializer_list>
#include <vector>

#include "amx.h"
#include "kernels.h"
#include "parallel.h"
#include "product.h"

namespace ard {
namespace ARD_ISA {

constexpr std::int64_t KEYS = 64;  // of a tile
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Not std::min: see Array.
static inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

static inline std::int64_t up(std::int64_t x, std::int64_t of) { return (x + of - 1) / of * of; }

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
    columns(width, [&](std::int64_t i, int many) { put(to + i, load(row + i) * factor, many); });
}

// Rows of the tensors, from token t of sample and head `pair` on.
template <class T>
static void foresee(
    Ahead& ahead, const Attention& a, std::initializer_list<const Tensor*> tensors, std::int64_t pair,
    std::int64_t t) {
    ahead.bytes = a.dim * sizeof(T);
    for (const Tensor* x : tensors) {
        ahead.next[ahead.tensors] = reinterpret_cast<const char*>(at<T>(*x, pair / a.heads, t, pair % a.heads));
        ahead.stride[ahead.tensors++] = x->token * sizeof(T);
    }
}

constexpr int VECTORS = KEYS / W;

// Which keys of a tile are there.
struct Keys {
    vi lanes[VECTORS];
    explicit Keys(std::int64_t rows) {
        std::int32_t each[KEYS];
        for (std::int64_t i = 0; i < KEYS; i++) each[i] = i < rows ? -1 : 0;
        std::memcpy(lanes, each, sizeof lanes);
    }
    template <bool WHOLE>
    vf only(int i, vf x, float otherwise) const {
        return WHOLE ? x : lanes[i] ? x : all(otherwise);
    }
};

// A row of weights as the left factor.
static inline void keep_row(float* to, const vf* row) {
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i++) store(to + i * W, row[i]);
}
#ifdef __AVX512BF16__
static inline void keep_row(std::uint32_t* to, const vf* row) {
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i += 2) _mm512_storeu_si512(to + i / 2 * W, halves(row[i], row[i + 1]));
}
#endif

// Queries of a unit of the forward: a tile of keys is packed for so many.
constexpr std::int64_t FORWARD_QUERIES = 256;

// What the forward knows of its rows so far: their largest scores, and under those the sums of the weights, one for
// every lane, and of the weighted values.
struct Rows {
    float *top, *total, *out;
    std::int64_t wide_dim;
    bool started;
};

// Scores (rows, KEYS) to weights, as the left factor. What was summed before shrinks where a score is larger than all.
template <bool WHOLE, class Word>
static inline void weigh(
    Word* kept, const float* scores, std::int64_t rows, float factor, const Keys& keys, const Rows& so_far) {
    const auto score = [&](std::int64_t r, int i) {
        return keys.only<WHOLE>(i, load(scores + r * KEYS + i * W) * factor, -INFINITY);
    };
    for (std::int64_t first = 0; first < rows; first += W) {
        const std::int64_t many = least(rows - first, W);
        vf most[W];
        for (std::int64_t r = 0; r < W; r++) {
            most[r] = all(-INFINITY);
#pragma GCC unroll 16
            for (int i = 0; i < VECTORS && r < many; i++) most[r] = larger(score(first + r, i), most[r]);
        }
        const vf before = so_far.started ? load(so_far.top + first) : all(-INFINITY);
        const vf now = larger(largest_of_each(most), before), offsets = now == all(-INFINITY) ? vf{} : now;
        alignas(64) float offset[W], shrink[W];
        store(offset, offsets);
        store(shrink, exp2(before - offsets));
        store(so_far.top + first, now);
        for (std::int64_t r = 0; r < many; r++) {
            vf x[VECTORS], sums{};
#pragma GCC unroll 16
            for (int i = 0; i < VECTORS; i++) {
                x[i] = exp2(score(first + r, i) - offset[r]);
                sums += x[i];
            }
            keep_row(kept + (first + r) * (KEYS * sizeof(Element<Word>) / sizeof(Word)), x);
            if (so_far.started) {
                sums += load(so_far.total + (first + r) * W) * shrink[r];
                float* out = so_far.out + (first + r) * so_far.wide_dim;
                for (std::int64_t i = 0; shrink[r] != 1 && i < so_far.wide_dim; i += W)
                    store(out + i, load(out + i) * shrink[r]);
            }
            store(so_far.total + (first + r) * W, sums);
        }
    }
}

template <class M, class T>
static void forward_unit(
    const Attention& a, const std::vector<Tile>& keys, std::int64_t b, std::int64_t h, const Tile& tile, Ahead& ahead) {
    typedef typename M::word word;
    constexpr std::int64_t GROUP = M::GROUP;
    static_assert(GROUP % W == 0, "");  // rows are reduced W at a time
    [[maybe_unused]] const typename M::Session session;
    const std::int64_t words = (a.dim + M::K - 1) / M::K, wide_words = up(words, W), wide_dim = up(a.dim, W);
    const std::int64_t n = tile.rows, rows_size = up(n, GROUP), keys_size = wide_words * KEYS + KEYS * wide_dim;
    Memory memory{static_cast<char*>(scratch(
        4 * (rows_size * (wide_words + wide_dim + W + 1) + keys_size + 2 * GROUP * KEYS) + 64 * 8))};
    word *q = memory.take<word>(rows_size * wide_words), *k = memory.take<word>(wide_words * KEYS);
    word *v = memory.take<word>(KEYS / M::K * wide_dim), *kept = memory.take<word>(GROUP * KEYS / M::K);
    float *scores = memory.take<float>(GROUP * KEYS), *out = memory.take<float>(rows_size * wide_dim);
    float *top = memory.take<float>(rows_size), *total = memory.take<float>(rows_size * W);  // totals: of every lane
    left(q, wide_words, at<const T>(a.q, b, tile.first, h), a.q.token, n, a.dim);
    const float factor = a.scale * LOG2E;
    bool started = false;
    for (const Tile& key : keys) {
        if (!sees(a.mask, tile.block, key.block)) continue;
        const Keys there(key.rows);
        right_transposed(k, KEYS, wide_words, at<const T>(a.k, b, key.first, h), a.k.token, key.rows, a.dim);
        right(v, wide_dim, at<const T>(a.v, b, key.first, h), a.v.token, key.rows, a.dim);
        for (std::int64_t g = 0; g < n; g += GROUP) {
            const std::int64_t rows = n - g < GROUP ? n - g : GROUP;
            product<M>(scores, KEYS, q + g * wide_words, wide_words, 1, k, KEYS, words, rows, key.rows, false, ahead);
            const Rows so_far{top + g, total + g * W, out + g * wide_dim, wide_dim, started};
            key.rows == KEYS ? weigh<true>(kept, scores, rows, factor, there, so_far)
                             : weigh<false>(kept, scores, rows, factor, there, so_far);
            product<M>(out + g * wide_dim, wide_dim, kept, KEYS / M::K, 1, v, wide_dim, (key.rows + M::K - 1) / M::K,
                       rows, a.dim, started, ahead);
        }
        started = true;
    }
    float* lse = a.lse + (b * a.heads + h) * queries(a) + tile.first;
    for (std::int64_t first = 0; first < n; first += W) {
        vf each[W];
        for (std::int64_t r = 0; r < W; r++) each[r] = load(total + (first + r) * W);
        const vf sums = sum_of_each(each);
        alignas(64) float share[W];
        store(share, 1.0f / sums);
        for (std::int64_t r = first; r < least(first + W, n); r++)
            write_row(at<T>(a.out, b, tile.first + r, h), out + r * wide_dim, share[r - first], a.dim);
        put(lse + first, (load(top + first) + log2(sums)) * LN2, static_cast<int>(least(W, n - first)));
    }
}

// f(unit, next) for every unit: a tile of rows for a sample and head, counted sample by sample; next: the one that this
// thread takes afterwards, most likely. Heads of a sample share cache lines: one thread takes them all where samples are
// so many that the last ones do not leave other threads idle for long (6 % at 16 a thread).
template <class F>
static void for_all(const Attention& a, std::int64_t units, int threads, const F& f) {
    const std::int64_t each = a.batch >= 16 * threads ? a.heads : 1;
    parallel(threads, units / each, [&](std::int64_t group) {
        for (std::int64_t i = 0; i < each; i++)
            f(group * each + i, i + 1 < each ? group * each + i + 1 : (group + threads) * each);
    });
}

template <class M, class T>
static void forward_all(const Attention& a, int threads) {
    const auto rows = query_tiles(a, FORWARD_QUERIES), keys = tiles(a.layout, 0, a.layout.blocks, KEYS);
    const std::int64_t many = rows.size(), pairs = a.batch * a.heads, units = pairs * many;
    // The last blocks see the most keys under the causal mask: they come first.
    for_all(a, units, threads, [&](std::int64_t unit, std::int64_t next) {
        const std::int64_t pair = unit % pairs;
        const Tile& tile = rows[many - 1 - unit / pairs];
        Ahead ahead;
        ahead.pace = 3;  // 2 products of 11 groups of rows, for a tile of 64 queries and one of keys
        foresee<T>(ahead, a, {&a.out}, pair, tile.first);
        if (next < units) {
            const Tile& after = rows[many - 1 - next / pairs];
            ahead.rows = least(tile.rows, least(after.rows, keys[0].rows));
            foresee<T>(ahead, a, {&a.q}, next % pairs, after.first);
            foresee<T>(ahead, a, {&a.k, &a.v}, next % pairs, 0);
        }
        forward_unit<M, T>(a, keys, pair / a.heads, pair % a.heads, tile, ahead);
    });
}

// Queries of a tile of the backward.
constexpr std::int64_t QUERIES = 64;

// Weights and their gradients of a tile as the factors of the three products that take them: summed over the queries
// (`row` and `depth` are the strides) and over the keys.
template <class M>
struct Factors;

template <>
struct Factors<Single> {
    static constexpr std::int64_t size = 2 * QUERIES * KEYS, row = 1, depth = KEYS;
    float *weights, *over_queries, *over_keys;
    explicit Factors(Memory& memory) {
        weights = memory.take<float>(QUERIES * KEYS);
        over_queries = over_keys = memory.take<float>(QUERIES * KEYS);
    }
    // Vector i of a row.
    void put(std::int64_t row, int i, const vf (&p)[1], const vf (&g)[1]) const {
        store(weights + row * KEYS + i * W, p[0]);
        store(over_keys + row * KEYS + i * W, g[0]);
    }
    void finish(std::int64_t) const {}
};

#ifdef __AVX512BF16__
template <>
struct Factors<Pair> {
    static constexpr std::int64_t size = 3 * QUERIES * KEYS / 2, row = 1, depth = KEYS;
    std::uint32_t *weights, *over_queries, *over_keys;
    explicit Factors(Memory& memory) {
        for (std::uint32_t** part : {&weights, &over_queries, &over_keys})
            *part = memory.take<std::uint32_t>(QUERIES * KEYS / 2);
    }
    // Vector i of a row and of the next.
    void put(std::int64_t row, int i, const vf (&p)[2], const vf (&g)[2]) const {
        const __m512i slopes = halves(g[0], g[1]);
        _mm512_storeu_si512(weights + row / 2 * KEYS + i * W, paired(halves(p[0], p[1])));
        _mm512_storeu_si512(over_queries + row / 2 * KEYS + i * W, paired(slopes));
        auto* const to = reinterpret_cast<__m256i*>(over_keys + row * (KEYS / 2) + i * (W / 2));
        _mm256_storeu_si256(to, _mm512_castsi512_si256(slopes));
        _mm256_storeu_si256(to + KEYS / HALVES * 2, _mm512_extracti64x4_epi64(slopes, 1));
    }
    void finish(std::int64_t) const {}
};
#endif

#ifdef ARD_AMX
// A factor must have its summed dimension contiguous: pairs of queries by keys are transposed.
template <>
struct Factors<Amx> : Factors<Pair> {
    static constexpr std::int64_t size = Factors<Pair>::size + QUERIES * KEYS, row = QUERIES / 2, depth = 1;
    Factors<Pair> pairs;
    explicit Factors(Memory& memory) : Factors<Pair>(memory), pairs(*this) {
        weights = memory.take<std::uint32_t>(KEYS * row), over_queries = memory.take<std::uint32_t>(KEYS * row);
    }
    void put(std::int64_t r, int i, const vf (&p)[2], const vf (&g)[2]) const { pairs.put(r, i, p, g); }
    void finish(std::int64_t rows) const {
        turn(weights, pairs.weights, (rows + 1) / 2);
        turn(over_queries, pairs.over_queries, (rows + 1) / 2);
    }
    static void turn(std::uint32_t* to, const std::uint32_t* from, std::int64_t count) {
        for (std::int64_t first = 0; first < count; first += W)
            for (std::int64_t key = 0; key < KEYS; key += W) {
                vu square[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) {
                    if (first + i < count) std::memcpy(&square[i], from + (first + i) * KEYS + key, sizeof(vu));
                    else square[i] = vu{};
                }
                transpose(square);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) std::memcpy(to + (key + i) * row + first, &square[i], sizeof(vu));
            }
    }
};
#endif

// Scores (rows, KEYS) and the weights' gradients to factors.
template <bool WHOLE, class M>
static inline void differentiate(
    const Factors<M>& factors, const float* scores, const float* gradients, std::int64_t rows, float factor,
    const float* lse, const float* delta, const Keys& keys) {
    for (std::int64_t r = 0; r < rows; r += M::K) {
#pragma GCC unroll 16
        for (int i = 0; i < VECTORS; i++) {
            vf p[M::K] = {}, g[M::K] = {};
#pragma GCC unroll 2
            for (int j = 0; j < M::K; j++) {
                if (r + j >= rows) break;
                const std::int64_t at = (r + j) * KEYS + i * W;
                p[j] = keys.only<WHOLE>(i, exp2(load(scores + at) * factor - lse[r + j]), 0);
                g[j] = keys.only<WHOLE>(i, p[j] * (load(gradients + at) - delta[r + j]), 0);
            }
            factors.put(r, i, p, g);
        }
    }
    factors.finish(rows);
}

template <class M, class T>
static void backward_unit(
    const Attention& a, const std::vector<Tile>& rows, const std::vector<Tile>& keys, std::int64_t b, std::int64_t h,
    Ahead& ahead) {
    typedef typename M::word word;
    [[maybe_unused]] const typename M::Session session;
    const std::int64_t words = (a.dim + M::K - 1) / M::K, wide_words = up(words, W), wide_dim = up(a.dim, W);
    const std::int64_t many = rows.size(), left_size = QUERIES * wide_words, right_size = QUERIES / M::K * wide_dim;
    const std::int64_t key_left = wide_words * KEYS, key_right = KEYS / M::K * wide_dim, wide_keys = KEYS * wide_dim;
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
    float *scores = memory.take<float>(QUERIES * KEYS), *gradients = memory.take<float>(QUERIES * KEYS);
    Factors<M> factors(memory);
    std::memset(dq, 0, many * QUERIES * wide_dim * sizeof(float));
    for (std::int64_t c = 0; c < many; c++) {
        const Tile& tile = rows[c];
        const T *q = at<const T>(a.q, b, tile.first, h), *dout = at<const T>(a.dout, b, tile.first, h);
        left(q_left + c * left_size, wide_words, q, a.q.token, tile.rows, a.dim);
        right(q_right + c * right_size, wide_dim, q, a.q.token, tile.rows, a.dim);
        left(do_left + c * left_size, wide_words, dout, a.dout.token, tile.rows, a.dim);
        right(do_right + c * right_size, wide_dim, dout, a.dout.token, tile.rows, a.dim);
        const T* out = at<const T>(a.out, b, tile.first, h);
        const float* natural = a.lse + (b * a.heads + h) * queries(a) + tile.first;
        for (std::int64_t first = 0; first < tile.rows; first += W) {
            vf products[W] = {};
            for (std::int64_t r = 0; r < least(W, tile.rows - first); r++) {
                const T *o = out + (first + r) * a.out.token, *d = dout + (first + r) * a.dout.token;
                for (std::int64_t i = 0; i < a.dim; i += W)
                    products[r] += some(o + i, a.dim - i) * some(d + i, a.dim - i);
            }
            store(delta + c * QUERIES + first, sum_of_each(products));
            store(lse + c * QUERIES + first, some(natural + first, tile.rows - first) * LOG2E);
        }
    }
    const float factor = a.scale * LOG2E;
    for (const Tile& key : keys) {
        const T *k = at<const T>(a.k, b, key.first, h), *v = at<const T>(a.v, b, key.first, h);
        const Keys there(key.rows);
        bool started = false;
        for (std::int64_t c = 0; c < many; c++) {
            if (!sees(a.mask, rows[c].block, key.block)) continue;
            if (!started) {
                right_transposed(k_transposed, KEYS, wide_words, k, a.k.token, key.rows, a.dim);
                right_transposed(v_transposed, KEYS, wide_words, v, a.v.token, key.rows, a.dim);
                right(k_right, wide_dim, k, a.k.token, key.rows, a.dim);
            }
            const std::int64_t n = rows[c].rows, depth = (n + M::K - 1) / M::K;
            product<M>(scores, KEYS, q_left + c * left_size, wide_words, 1, k_transposed, KEYS, words, n, key.rows,
                       false, ahead);
            product<M>(gradients, KEYS, do_left + c * left_size, wide_words, 1, v_transposed, KEYS, words, n, key.rows,
                       false, ahead);
            const float *l = lse + c * QUERIES, *d = delta + c * QUERIES;
            key.rows == KEYS ? differentiate<true>(factors, scores, gradients, n, factor, l, d, there)
                             : differentiate<false>(factors, scores, gradients, n, factor, l, d, there);
            product<M>(dv, wide_dim, factors.weights, factors.row, factors.depth, do_right + c * right_size, wide_dim,
                       depth, key.rows, a.dim, started, ahead);
            product<M>(dk, wide_dim, factors.over_queries, factors.row, factors.depth, q_right + c * right_size,
                       wide_dim, depth, key.rows, a.dim, started, ahead);
            product<M>(dq + c * QUERIES * wide_dim, wide_dim, factors.over_keys, KEYS / M::K, 1, k_right, wide_dim,
                       (key.rows + M::K - 1) / M::K, n, a.dim, true, ahead);
            started = true;
        }
        if (!started) {
            std::memset(dk, 0, wide_keys * sizeof(float));
            std::memset(dv, 0, wide_keys * sizeof(float));
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
    const std::int64_t units = a.batch * a.heads;
    for_all(a, units, threads, [&](std::int64_t unit, std::int64_t next) {
        Ahead ahead;
        ahead.pace = 2;                       // 5 products
        ahead.rows = least(queries(a), 256);  // of 8 tensors: a quarter of a MiB that must stay in the cache until then
        foresee<T>(ahead, a, {&a.dq, &a.dk, &a.dv}, unit, 0);
        if (next < units) foresee<T>(ahead, a, {&a.q, &a.k, &a.v, &a.out, &a.dout}, next, 0);
        backward_unit<M, T>(a, rows, keys, unit / a.heads, unit % a.heads, ahead);
    });
}

#if defined(ARD_AMX)
typedef Amx Half;
#elif defined(__AVX512BF16__)
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
