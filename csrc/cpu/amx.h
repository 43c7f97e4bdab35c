// Matrix products of bfloat16 pairs in the tile registers of AMX. Factors are packed as for Pair, with zeros up to
// whole tiles along the summed dimension; rows of the result up to the next whole tile are written, with anything.
#pragma once

#include "product.h"

#ifdef ARD_AMX

namespace ard {
namespace ARD_ISA {
namespace amx {

constexpr int SIDE = 16;  // rows of a tile, and 32-bit words of a row

#ifdef ARD_AMX_EMULATED
// The same in plain code, for processors without: tests run it.
struct Tile {
    std::uint32_t words[SIDE][SIDE];
};
static thread_local Tile tiles[8];

struct Session {};

template <int t>
static inline void load(const void* from, std::int64_t stride) {
    for (int r = 0; r < SIDE; r++) std::memcpy(tiles[t].words[r], static_cast<const char*>(from) + r * stride, 64);
}

template <int t>
static inline void store(void* to, std::int64_t stride) {
    for (int r = 0; r < SIDE; r++) std::memcpy(static_cast<char*>(to) + r * stride, tiles[t].words[r], 64);
}

template <int t>
static inline void zero() {
    tiles[t] = Tile{};
}

template <int c, int a, int b>
static inline void add_product() {
    const auto half = [](std::uint32_t word, int i) { return bits<float>(i ? word & 0xffff0000u : word << 16); };
    for (int m = 0; m < SIDE; m++)
        for (int n = 0; n < SIDE; n++) {
            float sum = bits<float>(tiles[c].words[m][n]);
            for (int k = 0; k < SIDE; k++)
                for (int i = 0; i < 2; i++) sum += half(tiles[a].words[m][k], i) * half(tiles[b].words[k][n], i);
            tiles[c].words[m][n] = bits<std::uint32_t>(sum);
        }
}
#else
// The thread's tile registers are ours: eight, all of full size. (The compilers' intrinsics take literal numbers only.)
struct Session {
    Session() {
        alignas(64) std::uint8_t shape[64] = {1};  // the only palette there is
        for (int t = 0; t < 8; t++) shape[16 + 2 * t] = 4 * SIDE, shape[48 + t] = SIDE;  // bytes of a row, and rows
        __asm__ volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Session() { __asm__ volatile("tilerelease"); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
};

template <int t>
static inline void load(const void* from, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
}

template <int t>
static inline void store(void* to, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
}

template <int t>
static inline void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(t));
}

template <int c, int a, int b>
static inline void add_product() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
#endif

// c = or += a b, for one or two tiles of rows and one or two of columns. Strides are in words.
template <int MR, int NV>
static inline void product_tile(
    float* c, std::int64_t ldc, const std::uint32_t* a, std::int64_t lda, const std::uint32_t* b, std::int64_t ldb,
    std::int64_t depth, bool add) {
    float* const lower = c + SIDE * ldc;
    if (add) {
        load<0>(c, 4 * ldc);
        if constexpr (NV > 1) load<1>(c + SIDE, 4 * ldc);
        if constexpr (MR > 1) load<2>(lower, 4 * ldc);
        if constexpr (MR > 1 && NV > 1) load<3>(lower + SIDE, 4 * ldc);
    } else {
        zero<0>(), zero<1>(), zero<2>(), zero<3>();
    }
    for (std::int64_t k = 0; k < depth; k += SIDE) {
        load<4>(a + k, 4 * lda);
        load<6>(b + k * ldb, 4 * ldb);
        add_product<0, 4, 6>();
        if constexpr (NV > 1) {
            load<7>(b + k * ldb + SIDE, 4 * ldb);
            add_product<1, 4, 7>();
        }
        if constexpr (MR > 1) {
            load<5>(a + SIDE * lda + k, 4 * lda);
            add_product<2, 5, 6>();
        }
        if constexpr (MR > 1 && NV > 1) add_product<3, 5, 7>();
    }
    store<0>(c, 4 * ldc);
    if constexpr (NV > 1) store<1>(c + SIDE, 4 * ldc);
    if constexpr (MR > 1) store<2>(lower, 4 * ldc);
    if constexpr (MR > 1 && NV > 1) store<3>(lower + SIDE, 4 * ldc);
}

}  // namespace amx

struct Amx : Pair {
    typedef amx::Session Session;
    static constexpr int GROUP = 2 * amx::SIDE;
};

template <>
void product<Amx>(
    float* c, std::int64_t ldc, const std::uint32_t* a, std::int64_t lda, std::int64_t, const std::uint32_t* b,
    std::int64_t ldb, std::int64_t depth, std::int64_t rows, std::int64_t width, bool add, Ahead& ahead) {
    using amx::SIDE;
    const std::int64_t vectors = (width + W - 1) / W;
    for (std::int64_t m = 0; m < rows; m += 2 * SIDE)
        for (std::int64_t v = 0; v < vectors; v += 2) {
            ahead.step();
            const auto call = [&](auto f) {
                f(c + m * ldc + v * W, ldc, a + m * lda, lda, b + v * W, ldb, depth, add);
            };
            if (m + SIDE < rows)
                v + 1 < vectors ? call(amx::product_tile<2, 2>) : call(amx::product_tile<2, 1>);
            else
                v + 1 < vectors ? call(amx::product_tile<1, 2>) : call(amx::product_tile<1, 1>);
        }
}

}  // namespace ARD_ISA
}  // namespace ard

#endif
