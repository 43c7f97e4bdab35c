// GELU in its tanh form, forward and backward, one pass over memory each: x s with s = (1 + tanh(u)) / 2, the logistic
// function of 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3).
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace ard {
namespace ARD_ISA {

// Numbers of a unit of work: 5 to 10 microseconds, next to which handing it out is nothing.
constexpr std::int64_t GELU_UNIT = 16384;

template <class T>
static void gelu_of(const T* x, const T* dout, T* to, std::int64_t count) {
    columns(count, [&](std::int64_t i, int n) {
        const vf a = get(x + i, n);
        // Beyond [-16, 9] s is 0 or 1 in float, its derivative as good as 0, and no power of 2 may overflow.
        const vf below = a > all(9.0f) ? all(9.0f) : a, inside = all(-16.0f) > below ? all(-16.0f) : below;
        const vf square = inside * inside;
        const vf e = exp2(inside * (square * 0.10294324f + 2.3022082f));  // 2 u / log(2)
        const vf rest = 1.0f / (e + 1.0f), s = e * rest;                  // 1 - s has all its digits
        if (dout == nullptr) {
            put(to + i, a * s, n);
            return;
        }
        const vf slope = square * 0.21406445f + 1.5957691f;  // of 2 u
        // a - a: NaN for infinities, as the reference.
        put(to + i, get(dout + i, n) * (inside * (s * rest) * slope + s + (a - a)), n);
    });
}

static void gelu(const Gelu& g, int threads) {
    parallel(threads, (g.count + GELU_UNIT - 1) / GELU_UNIT, [&](std::int64_t unit) {
        const auto run = [&](auto type) {
            using T = decltype(type);
            const auto at = [&](const Tensor& x) {
                return x.data == nullptr ? nullptr : static_cast<T*>(x.data) + unit * GELU_UNIT;
            };
            const std::int64_t rest = g.count - unit * GELU_UNIT;
            gelu_of<T>(at(g.x), at(g.dout), at(g.out), rest < GELU_UNIT ? rest : GELU_UNIT);
        };
        g.x.dtype == DType::f32 ? run(float{}) : run(bf16{});
    });
}

}  // namespace ARD_ISA
}  // namespace ard
