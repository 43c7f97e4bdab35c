// Which kernel runs for which tensors. Compiled by nvcc, or by the C++ compiler for the tests on the host.
#include "adaln.h"

#include "launch.h"

namespace ard {
namespace cuda {
namespace {

template <int V>
struct Width {
    static constexpr int vectors = V;
};

// f(Width<V>{}) for D = 128 V; false where there is no kernel for that width.
template <class F>
bool with_width(std::int64_t width, const F& f) {
    switch (width) {
        case 384: return f(Width<3>{}), true;
        case 768: return f(Width<6>{}), true;
        case 1024: return f(Width<8>{}), true;
        case 1152: return f(Width<9>{}), true;
    }
    return false;
}

template <class X, class L, int V>
const char* run_forward(const Arguments& arguments, bool gate, bool norm, int blocks, Stream stream) {
    const auto kernel = gate && norm ? forward<X, L, V, true, true>
                        : gate       ? forward<X, L, V, true, false>
                                     : forward<X, L, V, false, true>;
    return launch(kernel, arguments, blocks, 128, 0, 1, stream);
}

template <class X, class L, bool CLUSTER>
const char* run_backward(const Arguments& arguments, bool gate, bool norm, int blocks, Stream stream) {
    constexpr int STEP = sizeof(L) == 2 ? 4 : 2;  // rows at once, so that they fit the registers
    const auto kernel = gate && norm ? backward<X, L, STEP, true, true, CLUSTER>
                        : gate       ? backward<X, L, STEP, true, false, CLUSTER>
                                     : backward<X, L, STEP, false, true, CLUSTER>;
    const int threads = (arguments.width / VECTOR + 31) / 32 * 32;
    const int bytes = 4 * (2 * threads / 32 * 2 * STEP + (CLUSTER ? 3 * arguments.width : 0));
    const char* error = launch(kernel, arguments, blocks, threads, bytes, CLUSTER ? SLICES : 1, stream);
    if (error != nullptr || CLUSTER) return error;
    const int each = (3 * arguments.width + 255) / 256;
    return launch(add_slices<L>, arguments, blocks / SLICES * each, 256, 0, 1, stream);
}

template <class X, class L>
const char* run(const Adaln& a, Arguments& arguments, bool backwards, bool clusters, Stream stream) {
    const bool gate = a.branch.data != nullptr, norm = backwards ? a.dy.data != nullptr : a.y.data != nullptr;
    if (!with_width(a.width, [](auto) {})) return "there is no kernel for that width";
    if (!backwards) {
        const char* error = nullptr;
        with_width(a.width, [&](auto width) {
            constexpr int V = decltype(width)::vectors;
            error = run_forward<X, L, V>(arguments, gate, norm, a.batch * arguments.units, stream);
        });
        return error;
    }
    const int blocks = a.batch * a.layout.blocks * SLICES;
    return clusters ? run_backward<X, L, true>(arguments, gate, norm, blocks, stream)
                    : run_backward<X, L, false>(arguments, gate, norm, blocks, stream);
}

}  // namespace

const char* adaln(const Adaln& a, float* partial, bool backwards, bool clusters, void* stream) {
    Arguments arguments = {};
    if (a.layout.blocks > MOST_BLOCKS) return "there are too many blocks";
    arguments.x = a.x.data, arguments.branch = a.branch.data, arguments.gate = a.gate.data;
    arguments.shift = a.shift.data, arguments.scale = a.scale.data, arguments.dy = a.dy.data;
    arguments.dx_in = a.dx_in.data, arguments.residual = a.residual.data, arguments.y = a.y.data;
    arguments.dx = a.dx.data, arguments.dbranch = a.dbranch.data, arguments.dgate = a.dgate.data;
    arguments.dshift = a.dshift.data, arguments.dscale = a.dscale.data;
    arguments.mean = a.mean, arguments.rstd = a.rstd, arguments.partial = partial;
    arguments.gate_batch = a.gate.batch, arguments.gate_block = a.gate.token;
    arguments.shift_batch = a.shift.batch, arguments.shift_block = a.shift.token;
    arguments.scale_batch = a.scale.batch, arguments.scale_block = a.scale.token;
    arguments.eps = a.eps, arguments.width = a.width, arguments.blocks = a.layout.blocks;
    for (int s = 0; s <= arguments.blocks; s++) arguments.starts[s] = a.layout.starts[s];
    for (int s = 0; s < arguments.blocks; s++)
        arguments.starts_of_units[s + 1] =
            arguments.starts_of_units[s] + (arguments.starts[s + 1] - arguments.starts[s] + ROWS - 1) / ROWS;
    arguments.units = arguments.starts_of_units[arguments.blocks];
    const bool half = (a.gate.data != nullptr ? a.gate : a.scale).dtype == DType::bf16;
    const bool half_stream = (a.x.data != nullptr ? a.x : a.dx_in).dtype == DType::bf16;
    const auto on = static_cast<Stream>(stream);
    if (half_stream) return run<bf16, bf16>(a, arguments, backwards, clusters, on);
    return half ? run<float, bf16>(a, arguments, backwards, clusters, on)
                : run<float, float>(a, arguments, backwards, clusters, on);
}

std::string why_not() { return driver_reason(); }

}  // namespace cuda
}  // namespace ard
