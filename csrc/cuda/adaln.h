// Gated residual, layer norm and modulation in CUDA: one pass over memory forward, one backward. X is the type of the
// residual stream, L that of the branch, of y and of the tables. Table gradients are summed in a fixed order.
#pragma once

#include <cmath>

#include "../cpu/kernels.h"
#include "device.h"

namespace ard {
namespace cuda {

constexpr int MOST_BLOCKS = 255;  // of a sample: where they start travels with the launch

struct Arguments {
    const void *x, *branch, *gate, *shift, *scale, *dy, *dx_in;
    void *residual, *y, *dx, *dbranch, *dgate, *dshift, *dscale;
    float *mean, *rstd, *partial;
    std::int64_t gate_batch, gate_block, shift_batch, shift_block, scale_batch, scale_block;  // strides
    float eps;
    int width, blocks, starts[MOST_BLOCKS + 1];
    int units, starts_of_units[MOST_BLOCKS + 1];  // of a sample and of its blocks: the forward's thread blocks
};

// The forward: half a warp for a row, which holds it in registers.
constexpr int LANES = 16, ROW_LANES = 128 / LANES, ROWS = 32;  // ROW_LANES rows at once, ROWS of a block of threads

ARD_DEVICE float sum_of_half_warp(float x) {
    const unsigned mask = thread_index() & LANES ? 0xffff0000u : 0x0000ffffu;
    for (int distance = LANES / 2; distance > 0; distance /= 2) x += from_lane(mask, x, distance);
    return x;
}

// V: vectors of a lane; D = 128 V.
template <class X, class L, int V, bool GATE, bool NORM>
ARD_GLOBAL void ARD_BOUNDS(128, 1) forward(Arguments a) {
    constexpr int D = V * LANES * VECTOR;
    // Tables stay in registers where they fit beside the row.
    constexpr bool KEEP = sizeof(L) == 2, KEEP_GATE = KEEP && (V <= 6 || !NORM);
    constexpr int KEPT = KEEP ? V : 1, KEPT_GATES = KEEP_GATE ? V : 1;
    const int sample = block_index() / a.units, unit = block_index() % a.units;
    int s = 0;
    while (a.starts_of_units[s + 1] <= unit) s++;
    const int first = a.starts[s] + (unit - a.starts_of_units[s]) * ROWS;
    const int end = first + ROWS < a.starts[s + 1] ? first + ROWS : a.starts[s + 1];
    const int column = thread_index() % LANES * VECTOR;
    const L* gate = static_cast<const L*>(a.gate) + sample * a.gate_batch + s * a.gate_block + column;
    const L* shift = static_cast<const L*>(a.shift) + sample * a.shift_batch + s * a.shift_block + column;
    const L* scale = static_cast<const L*>(a.scale) + sample * a.scale_batch + s * a.scale_block + column;
    Vector<L> gates[KEPT_GATES], shifts[KEPT], scales[KEPT];
    if constexpr (KEEP) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            if constexpr (GATE && KEEP_GATE) gates[v] = read(gate + v * LANES * VECTOR);
            if constexpr (NORM) shifts[v] = read(shift + v * LANES * VECTOR), scales[v] = read(scale + v * LANES * VECTOR);
        }
    }
    for (int t = first + thread_index() / LANES; t < end; t += ROW_LANES) {
        const std::int64_t row = static_cast<std::int64_t>(sample) * a.starts[a.blocks] + t, at = row * D + column;
        float kept[V][VECTOR], total = 0;
#pragma unroll
        for (int v = 0; v < V; v++) {
            const Vector<X> x = read(static_cast<const X*>(a.x) + at + v * LANES * VECTOR);
            if constexpr (GATE) {
                const Vector<L> branch = read(static_cast<const L*>(a.branch) + at + v * LANES * VECTOR);
                const Vector<L> g = KEEP_GATE ? gates[KEEP_GATE ? v : 0] : read(gate + v * LANES * VECTOR);
                Vector<X> residual;
#pragma unroll
                for (int i = 0; i < VECTOR; i++) {
                    residual.at[i] = narrow<X>(x[i] + g[i] * branch[i]);
                    kept[v][i] = residual[i];  // as it is stored
                }
                write(static_cast<X*>(a.residual) + at + v * LANES * VECTOR, residual);
            } else {
#pragma unroll
                for (int i = 0; i < VECTOR; i++) kept[v][i] = x[i];
            }
#pragma unroll
            for (int i = 0; i < VECTOR; i++) total += kept[v][i];
        }
        if constexpr (NORM) {
            const float mean = sum_of_half_warp(total) / D;
            float squares = 0;
#pragma unroll
            for (int v = 0; v < V; v++)
#pragma unroll
                for (int i = 0; i < VECTOR; i++) squares += (kept[v][i] - mean) * (kept[v][i] - mean);
            const float rstd = 1.0f / sqrtf(sum_of_half_warp(squares) / D + a.eps);
            if (column == 0) a.mean[row] = mean, a.rstd[row] = rstd;
#pragma unroll
            for (int v = 0; v < V; v++) {
                const Vector<L> plus = KEEP ? shifts[KEEP ? v : 0] : read(shift + v * LANES * VECTOR);
                const Vector<L> times = KEEP ? scales[KEEP ? v : 0] : read(scale + v * LANES * VECTOR);
                Vector<L> y;
#pragma unroll
                for (int i = 0; i < VECTOR; i++)
                    y.at[i] = narrow<L>((kept[v][i] - mean) * rstd * (1.0f + times[i]) + plus[i]);
                write(static_cast<L*>(a.y) + at + v * LANES * VECTOR, y);
            }
        }
    }
}

// The backward: a thread has VECTOR columns of all rows of a slice, and their sums for the table gradients. STEP rows
// are worked on together, with one barrier.
constexpr int SLICES = 8;  // of a block of tokens; the blocks of a cluster

// Number i of the (3, D) sums of a block of tokens.
template <class L>
ARD_DEVICE void put_table_gradient(const Arguments& a, std::int64_t segment, int i, float x) {
    const int D = a.width, column = i % D;
    void* const to = i < D ? a.dgate : i < 2 * D ? a.dshift : a.dscale;
    if (to != nullptr) static_cast<L*>(to)[segment * D + column] = narrow<L>(x);
}

template <class X, class L, int STEP, bool GATE, bool NORM, bool CLUSTER>
ARD_GLOBAL void ARD_BOUNDS(160, 1) backward(Arguments a) {  // 1152 columns are 144 threads
    const int D = a.width, segment = block_index() / SLICES, slice = block_index() % SLICES;
    const int sample = segment / a.blocks, s = segment % a.blocks, warps = threads() / 32;
    const int column = thread_index() * VECTOR, end = a.starts[s + 1];
    const bool active = column < D;
    float gate[VECTOR] = {}, scale[VECTOR] = {}, dgate[VECTOR] = {}, dshift[VECTOR] = {}, dscale[VECTOR] = {};
    if (active) {
        if constexpr (GATE) {
            const auto g = read(static_cast<const L*>(a.gate) + sample * a.gate_batch + s * a.gate_block + column);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) gate[i] = g[i];
        }
        if constexpr (NORM) {
            const auto m = read(static_cast<const L*>(a.scale) + sample * a.scale_batch + s * a.scale_block + column);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) scale[i] = 1.0f + m[i];
        }
    }
    float* sums = shared();  // (2, warps, 2 STEP): two steps in turn
    bool odd = false;
    for (int t = a.starts[s] + slice * STEP; t < end; t += SLICES * STEP, odd = !odd) {
        const int rows = end - t < STEP ? end - t : STEP;
        const std::int64_t row = static_cast<std::int64_t>(sample) * a.starts[a.blocks] + t, at = row * D + column;
        Vector<X> x[STEP], dx_in[STEP];
        Vector<L> dy[STEP], branch[STEP];
        float mean[STEP], rstd[STEP], first[STEP] = {}, second[STEP] = {};
#pragma unroll
        for (int r = 0; r < STEP; r++) {
            if (!active || r >= rows) continue;
            if constexpr (NORM) {
                x[r] = read(static_cast<const X*>(a.x) + at + r * D);
                dy[r] = read(static_cast<const L*>(a.dy) + at + r * D);
            }
            if (a.dx_in != nullptr) dx_in[r] = read(static_cast<const X*>(a.dx_in) + at + r * D);
            if constexpr (GATE) branch[r] = read(static_cast<const L*>(a.branch) + at + r * D);
        }
        if constexpr (NORM) {
#pragma unroll
            for (int r = 0; r < STEP; r++) {
                if (active && r < rows) {
                    mean[r] = a.mean[row + r], rstd[r] = a.rstd[row + r];
#pragma unroll
                    for (int i = 0; i < VECTOR; i++) {
                        const float normed = (x[r][i] - mean[r]) * rstd[r], h = dy[r][i] * scale[i];
                        first[r] += h;
                        second[r] += h * normed;
                        dshift[i] += dy[r][i];
                        dscale[i] += dy[r][i] * normed;
                    }
                }
                for (int distance = 16; distance > 0; distance /= 2) {
                    first[r] += from_lane(0xffffffffu, first[r], distance);
                    second[r] += from_lane(0xffffffffu, second[r], distance);
                }
            }
            float* const now = sums + (odd ? warps * 2 * STEP : 0);
            if (thread_index() % 32 == 0) {
#pragma unroll
                for (int r = 0; r < STEP; r++) {
                    now[thread_index() / 32 * 2 * STEP + r] = first[r];
                    now[thread_index() / 32 * 2 * STEP + STEP + r] = second[r];
                }
            }
            wait_for_block();
#pragma unroll
            for (int r = 0; r < STEP; r++) {
                first[r] = second[r] = 0;
                for (int w = 0; w < warps; w++) first[r] += now[w * 2 * STEP + r], second[r] += now[w * 2 * STEP + STEP + r];
                first[r] /= D, second[r] /= D;
            }
        }
        if (!active) continue;
#pragma unroll
        for (int r = 0; r < STEP; r++) {
            if (r >= rows) continue;
            Vector<X> dx;
            Vector<L> dbranch;
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                float d = a.dx_in != nullptr ? dx_in[r][i] : 0.0f;
                if constexpr (NORM) {
                    const float normed = (x[r][i] - mean[r]) * rstd[r];
                    d += rstd[r] * (dy[r][i] * scale[i] - first[r] - normed * second[r]);
                }
                dx.at[i] = narrow<X>(d);
                if constexpr (GATE) {
                    dbranch.at[i] = narrow<L>(d * gate[i]);
                    dgate[i] += d * branch[r][i];
                }
            }
            if constexpr (NORM) write(static_cast<X*>(a.dx) + at + r * D, dx);
            if constexpr (GATE) write(static_cast<L*>(a.dbranch) + at + r * D, dbranch);
        }
    }
    // Sums of this slice, then those of all slices in order.
    float* const all = sums + 2 * warps * 2 * STEP;  // (3, D)
    if constexpr (CLUSTER) {
        if (active) {
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                all[column + i] = dgate[i], all[D + column + i] = dshift[i], all[2 * D + column + i] = dscale[i];
        }
        wait_for_cluster();
        const float* of[SLICES];
#pragma unroll
        for (int c = 0; c < SLICES; c++) of[c] = shared_of(c) + (all - shared());
        for (int i = rank_in_cluster() * threads() + thread_index(); i < 3 * D; i += SLICES * threads()) {
            float total = 0;
#pragma unroll
            for (int c = 0; c < SLICES; c++) total += of[c][i];
            put_table_gradient<L>(a, segment, i, total);
        }
        wait_for_cluster();  // others read what is here
    } else if (active) {
        float* const to = a.partial + static_cast<std::int64_t>(block_index()) * 3 * D + column;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) to[i] = dgate[i], to[D + i] = dshift[i], to[2 * D + i] = dscale[i];
    }
}

// Where there are no clusters: the slices' sums added up, in order. partial is (segments, SLICES, 3, D).
template <class L>
ARD_GLOBAL void ARD_BOUNDS(256, 1) add_slices(Arguments a) {
    const int D = a.width, each = (3 * D + threads() - 1) / threads();
    const std::int64_t segment = block_index() / each;
    const int i = block_index() % each * threads() + thread_index();
    if (i >= 3 * D) return;
    float total = 0;
    for (int c = 0; c < SLICES; c++) total += a.partial[(segment * SLICES + c) * 3 * D + i];
    put_table_gradient<L>(a, segment, i, total);
}

}  // namespace cuda
}  // namespace ard
