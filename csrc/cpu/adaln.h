// Gated residual, layer norm and modulation, forward and backward: one pass over memory each. A unit of work is up to
// ROWS tokens of one block of one sample; a unit's sums for the table gradients are added up in a fixed order, so that
// results do not depend on the number of threads.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace ard {
namespace ARD_ISA {

// Rows of a unit. 32 keep the partial sums of the table gradients below a fifth of one bfloat16 activation, and their
// rounding errors where PyTorch's sums have theirs (64: a quarter more).
constexpr std::int64_t ROWS = 32;

// Rows that the backward takes at once: a table, and the sums of its gradient, are loaded once for all of them. Memory is
// asked for what the rows so far ahead need. (At (8, 1024, 1152) in bfloat16, two cores of a Zen 4: 4.1 ms instead of 6.1.)
constexpr int R = 4;
constexpr std::int64_t AHEAD = 4;

static inline vf only(vf x, int n) {
    if (n == W) return x;
    float full[W] = {};
    store(full, x, n);
    return load(full);
}

template <class T>
static T* row_of(const Tensor& x, std::int64_t row, std::int64_t width) {
    return x.data == nullptr ? nullptr : static_cast<T*>(x.data) + row * width;
}

// A table's row for a block, in float, plus a constant; zeros without a table.
static void table_row(const Tensor& table, std::int64_t b, std::int64_t s, std::int64_t width, float plus, float* to) {
    if (table.data == nullptr) {
        std::memset(to, 0, width * sizeof(float));
        return;
    }
    const std::int64_t offset = b * table.batch + s * table.token;
    columns(width, [&](std::int64_t i, int n) {
        const vf x = table.dtype == DType::f32 ? get(static_cast<const float*>(table.data) + offset + i, n)
                                               : get(static_cast<const bf16*>(table.data) + offset + i, n);
        put(to + i, x + plus, n);
    });
}

// Whether results go past the caches: an L3 of 32 MiB does not hold them until they are read. (38 MB, bfloat16, two cores
// of a Zen 4: the forward took 2.8 ms instead of 3.6.)
constexpr std::int64_t LARGE = 32 << 20;

static bool large(const Adaln& a, const Tensor& one, const Tensor& other) {
    std::int64_t bytes = 0;
    for (const Tensor* x : {&one, &other}) {
        if (x->data == nullptr) continue;
        const std::int64_t row = a.width * (x->dtype == DType::f32 ? sizeof(float) : sizeof(bf16));
        if (row % 64 != 0 || reinterpret_cast<std::uintptr_t>(x->data) % 64 != 0) return false;
        bytes += a.batch * a.layout.total() * row;
    }
    return bytes >= LARGE;
}

template <class T>
static inline void put(T* p, vf x, int n, bool past) {
    past ? stream(p, x) : put(p, x, n);  // a large row is whole vectors
}

struct Unit {
    std::int64_t b, s, first, rows;  // first: token of the sample
};

// The units of a sample's blocks, in order: unit u of all.
struct Units {
    Layout layout;
    Array<std::int64_t> starts;  // of a block's units

    explicit Units(const Layout& l) : layout(l), starts(l.blocks + 1) {
        starts.start[0] = 0;
        for (std::int64_t s = 0; s < l.blocks; s++)
            starts.start[s + 1] = starts.start[s] + (l.starts[s + 1] - l.starts[s] + ROWS - 1) / ROWS;
    }

    std::int64_t per_sample() const { return starts.start[layout.blocks]; }
    std::int64_t of_block(std::int64_t s) const { return starts.start[s + 1] - starts.start[s]; }

    Unit operator[](std::int64_t unit) const {
        const std::int64_t b = unit / per_sample(), u = unit % per_sample();
        std::int64_t low = 0, high = layout.blocks;  // starts.start[low] <= u < starts.start[high]
        while (high - low > 1) {
            const std::int64_t middle = (low + high) / 2;
            (starts.start[middle] <= u ? low : high) = middle;
        }
        const std::int64_t first = layout.starts[low] + (u - starts.start[low]) * ROWS;
        const std::int64_t rest = layout.starts[low + 1] - first;
        return {b, low, first, rest < ROWS ? rest : ROWS};
    }
};

template <class X, class Branch, class Y>
static void forward_rows(const Adaln& a, const Unit& unit, bool past) {
    const std::int64_t D = a.width, T = a.layout.total();
    float* gate = static_cast<float*>(scratch(4 * D * sizeof(float)));
    float *shift = gate + D, *scale = shift + D, *row = scale + D;
    if (a.branch.data != nullptr) table_row(a.gate, unit.b, unit.s, D, 0.0f, gate);
    if (a.y.data != nullptr) {
        table_row(a.shift, unit.b, unit.s, D, 0.0f, shift);
        table_row(a.scale, unit.b, unit.s, D, 1.0f, scale);
    }
    for (std::int64_t r = unit.b * T + unit.first, end = r + unit.rows; r < end; r++) {
        const X* x = row_of<const X>(a.x, r, D);
        const Branch* branch = row_of<const Branch>(a.branch, r, D);
        X* residual = row_of<X>(a.residual, r, D);
        vf total{};
        if (branch != nullptr) {
            columns(D, [&](std::int64_t i, int n) {
                fetch(x + AHEAD * D + i);
                fetch(branch + AHEAD * D + i);
                const vf both = get(x + i, n) + get(gate + i, n) * get(branch + i, n);
                const vf kept = as_stored(residual, both);
                put(residual + i, both, n, past);
                put(row + i, kept, n);
                total += kept;
            });
        } else {
            columns(D, [&](std::int64_t i, int n) {
                fetch(x + AHEAD * D + i);
                const vf kept = get(x + i, n);
                put(row + i, kept, n);
                total += kept;
            });
        }
        Y* y = row_of<Y>(a.y, r, D);
        if (y == nullptr) continue;
        const float mean = sum(total) / D;
        vf squares{};
        columns(D, [&](std::int64_t i, int n) {
            const vf d = only(get(row + i, n) - mean, n);
            squares += d * d;
        });
        const float rstd = 1.0f / std::sqrt(sum(squares) / D + a.eps);
        a.mean[r] = mean;
        a.rstd[r] = rstd;
        columns(D, [&](std::int64_t i, int n) {
            put(y + i, (get(row + i, n) - mean) * rstd * get(scale + i, n) + get(shift + i, n), n, past);
        });
    }
    if (past) arrived();
}

// f(how many, first) for the rows of a unit: R of them at once, and those that are left one by one.
template <class F>
static inline void groups(std::int64_t rows, const F& f) {
    std::int64_t k = 0;
    for (; k + R <= rows; k += R) f(std::integral_constant<int, R>{}, k);
    for (; k < rows; k++) f(std::integral_constant<int, 1>{}, k);
}

// Of `many` rows from r: what they add to dshift and dscale; for each, sums / D of dnormed and of dnormed * normed * rstd,
// where dnormed is the gradient of the normed row.
template <int many, class X, class Y>
static void norm_sums(const Adaln& a, std::int64_t r, const float* scale, float* dshift, float* dscale, float* first,
                      float* second) {
    const std::int64_t D = a.width;
    const X* x = row_of<const X>(a.x, r, D);
    const Y* dy = row_of<const Y>(a.dy, r, D);
    const float *mean = a.mean + r, *rstd = a.rstd + r;
    vf one[many] = {}, two[many] = {};
    columns(D, [&](std::int64_t i, int n) {
        const vf by = get(scale + i, n);
        vf shift = get(dshift + i, n), scaled = get(dscale + i, n);
#pragma GCC unroll 4
        for (int k = 0; k < many; k++) {
            const std::int64_t j = k * D + i;
            fetch(dy + AHEAD * D + j);
            fetch(x + AHEAD * D + j);
            const vf g = get(dy + j, n), normed = (get(x + j, n) - mean[k]) * rstd[k], h = g * by;
            one[k] += h;
            two[k] += h * normed;
            shift += g;
            scaled += g * normed;
        }
        put(dshift + i, shift, n);
        put(dscale + i, scaled, n);
    });
    for (int k = 0; k < many; k++) first[k] = sum(one[k]) / D, second[k] = rstd[k] * sum(two[k]) / D;
}

// Of `many` rows from r: dx and dbranch, and what they add to dgate.
template <int many, class X, class Branch, class Y>
static void row_gradients(const Adaln& a, std::int64_t r, const float* gate, const float* scale, float* dgate,
                          const float* first, const float* second, bool past) {
    const std::int64_t D = a.width;
    const bool norm = a.dy.data != nullptr, gated = a.branch.data != nullptr;
    const X *x = row_of<const X>(a.x, r, D), *dx_in = row_of<const X>(a.dx_in, r, D);
    const Y* dy = row_of<const Y>(a.dy, r, D);
    const Branch* branch = row_of<const Branch>(a.branch, r, D);
    X* dx = row_of<X>(a.dx, r, D);
    Branch* dbranch = row_of<Branch>(a.dbranch, r, D);
    const float *mean = a.mean + r, *rstd = a.rstd + r;
    columns(D, [&](std::int64_t i, int n) {
        const vf by = norm ? get(scale + i, n) : vf{}, through = gated ? get(gate + i, n) : vf{};
        vf total = gated ? get(dgate + i, n) : vf{};
#pragma GCC unroll 4
        for (int k = 0; k < many; k++) {
            const std::int64_t j = k * D + i;
            vf d{};
            if (norm) d = rstd[k] * (get(dy + j, n) * by - first[k] - (get(x + j, n) - mean[k]) * second[k]);
            if (dx_in != nullptr) {
                fetch(dx_in + AHEAD * D + j);
                d += get(dx_in + j, n);
            }
            if (dx != nullptr) put(dx + j, d, n, past);
            if (gated) {
                fetch(branch + AHEAD * D + j);
                put(dbranch + j, d * through, n, past);
                total += d * get(branch + j, n);
            }
        }
        if (gated) put(dgate + i, total, n);
    });
}

// sums: over the unit's rows for gate, shift and scale, of width D each. memory: room for a row of two tables.
template <class X, class Branch, class Y>
static void backward_rows(const Adaln& a, const Unit& unit, float* sums, float* memory, bool past) {
    const std::int64_t D = a.width, start = unit.b * a.layout.total() + unit.first;
    float *gate = memory, *scale = memory + D, *dgate = sums, *dshift = sums + D, *dscale = sums + 2 * D;
    if (a.branch.data != nullptr) table_row(a.gate, unit.b, unit.s, D, 0.0f, gate);
    if (a.dy.data != nullptr) table_row(a.scale, unit.b, unit.s, D, 1.0f, scale);
    std::memset(sums, 0, 3 * D * sizeof(float));
    float first[ROWS] = {}, second[ROWS] = {};
    if (a.dy.data != nullptr)
        groups(unit.rows, [&](auto many, std::int64_t k) {
            norm_sums<many, X, Y>(a, start + k, scale, dshift, dscale, first + k, second + k);
        });
    groups(unit.rows, [&](auto many, std::int64_t k) {
        row_gradients<many, X, Branch, Y>(a, start + k, gate, scale, dgate, first + k, second + k, past);
    });
    if (past) arrived();
}

// Partial sums that are added up before they join a total: at 4,096 rows the error is 1.2 epsilons, as PyTorch's, and 1.9
// with all in one chain.
constexpr std::int64_t TOGETHER = 8;

// A table gradient's row: the sum of what its units have, in a fixed order.
static void table_gradient(
    const Tensor& to, const float* sums, std::int64_t units, std::int64_t row, std::int64_t width) {
    if (to.data == nullptr) return;
    columns(width, [&](std::int64_t i, int n) {
        vf total{};
        for (std::int64_t first = 0; first < units; first += TOGETHER) {
            vf some{};
            for (std::int64_t u = first; u < units && u < first + TOGETHER; u++)
                some += get(sums + 3 * u * width + i, n);
            total += some;
        }
        if (to.dtype == DType::f32)
            put(static_cast<float*>(to.data) + row * width + i, total, n);
        else
            put(static_cast<bf16*>(to.data) + row * width + i, total, n);
    });
}

// The rows of all table gradients for a block of a sample.
static void table_gradients(const Adaln& a, std::int64_t b, std::int64_t s, const float* sums, std::int64_t units) {
    const std::int64_t row = b * a.layout.blocks + s;
    table_gradient(a.dgate, sums, units, row, a.width);
    table_gradient(a.dshift, sums + a.width, units, row, a.width);
    table_gradient(a.dscale, sums + 2 * a.width, units, row, a.width);
}

// f(X{}, Branch{}, Y{}) with the types of the tensors.
template <class F>
static void typed(DType x, DType branch, DType y, const F& f) {
    const auto with_y = [&](auto X, auto B) { y == DType::f32 ? f(X, B, float{}) : f(X, B, bf16{}); };
    const auto with_branch = [&](auto X) { branch == DType::f32 ? with_y(X, float{}) : with_y(X, bf16{}); };
    x == DType::f32 ? with_branch(float{}) : with_branch(bf16{});
}

static void adaln_forward(const Adaln& a, int threads) {
    const Units units(a.layout);
    const bool past = large(a, a.residual, a.y);
    parallel(threads, a.batch * units.per_sample(), [&](std::int64_t unit) {
        typed(a.x.dtype, a.branch.dtype, a.y.dtype, [&](auto x, auto branch, auto y) {
            forward_rows<decltype(x), decltype(branch), decltype(y)>(a, units[unit], past);
        });
    });
}

static void adaln_backward(const Adaln& a, int threads) {
    const Units units(a.layout);
    const std::int64_t D = a.width, S = a.layout.blocks, count = a.batch * units.per_sample();
    // Of the units of blocks that have several; the others' sums are a table gradient's row at once.
    const Array<float> partial(units.per_sample() > S ? count * 3 * D : 0);
    const bool past = large(a, a.dx, a.dbranch);
    parallel(threads, count, [&](std::int64_t index) {
        const Unit unit = units[index];
        const bool alone = units.of_block(unit.s) == 1;
        float* memory = static_cast<float*>(scratch(5 * D * sizeof(float)));
        float* sums = alone ? memory + 2 * D : partial.start + index * 3 * D;
        typed(a.dx_in.data != nullptr ? a.dx_in.dtype : a.x.dtype, a.branch.dtype, a.dy.dtype,
              [&](auto x, auto branch, auto y) {
                  backward_rows<decltype(x), decltype(branch), decltype(y)>(a, unit, sums, memory, past);
              });
        if (alone) table_gradients(a, unit.b, unit.s, sums, 1);
    });
    if (units.per_sample() == S) return;
    parallel(threads, a.batch * S, [&](std::int64_t row) {
        const std::int64_t b = row / S, s = row % S;
        if (units.of_block(s) == 1) return;
        const std::int64_t first = b * units.per_sample() + units.starts.start[s];
        table_gradients(a, b, s, partial.start + first * 3 * D, units.of_block(s));
    });
}

}  // namespace ARD_ISA
}  // namespace ard
