// ard_kernels._C: pointers, strides and numbers in, results written through pointers. Who calls checks and owns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef ARD_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace ard {
#define ARD_DECLARE(isa) namespace isa { extern const Kernels kernels; }
ARD_DECLARE(portable)
ARD_DECLARE(avx2)
ARD_DECLARE(avx512)
ARD_DECLARE(avx512_bf16)
ARD_DECLARE(amx)
ARD_DECLARE(amx_emulated)

namespace {

#ifdef ARD_HAS_AMX
// Whether the processor has AMX with bfloat16 and the system lets this process use it: Linux wants to be asked.
bool amx_granted() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#endif

// The best first, those that were built and that this processor can run.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    [[maybe_unused]] const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(ARD_HAS_AVX512_BF16) || defined(ARD_HAS_AMX) || defined(ARD_HAS_AMX_EMULATED)
    [[maybe_unused]] const bool products = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef ARD_HAS_AVX512_BF16
    if (products) found.push_back(&avx512_bf16::kernels);
#endif
#ifdef ARD_HAS_AMX_EMULATED
    if (products) found.push_back(&amx_emulated::kernels);
#endif
#ifdef ARD_HAS_AVX512
    if (avx512) found.push_back(&avx512::kernels);
#endif
#ifdef ARD_HAS_AVX2
    if (avx2) found.push_back(&avx2::kernels);
#endif
#endif
    found.push_back(&portable::kernels);
#ifdef ARD_HAS_AMX
    if (products && amx_granted()) found.push_back(&amx::kernels);  // the last, until one has timed it
#endif
    return found;
}

const Kernels* chosen = usable().front();

// (address, is bfloat16, strides of batch, token and head), address 0: absent.
using Given = std::tuple<std::uintptr_t, bool, std::int64_t, std::int64_t, std::int64_t>;

Tensor tensor(const Given& given) {
    Tensor x;
    bool half;
    std::uintptr_t address;
    std::tie(address, half, x.batch, x.token, x.head) = given;
    x.data = reinterpret_cast<void*>(address);
    x.dtype = half ? DType::bf16 : DType::f32;
    return x;
}

struct Blocks {
    std::vector<std::int64_t> starts{0};
    explicit Blocks(const std::vector<std::int64_t>& lengths) {
        for (const std::int64_t n : lengths) starts.push_back(starts.back() + n);
    }
    Layout layout() const { return {static_cast<std::int64_t>(starts.size()) - 1, starts.data()}; }
};

void attention(
    bool backward, std::int64_t batch, std::int64_t heads, std::int64_t dim, const std::vector<std::int64_t>& lengths,
    int mask, float scale, std::int64_t block, const std::vector<Given>& tensors, std::uintptr_t lse, int threads) {
    const Blocks blocks(lengths);
    Attention a{batch, heads, dim, blocks.layout(), static_cast<Mask>(mask), scale, block, {}, {}, {}, {}, nullptr,
                {}, {}, {}, {}};
    Tensor* const slots[] = {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv};
    for (std::size_t i = 0; i < tensors.size() && i < 8; i++) *slots[i] = tensor(tensors[i]);
    a.lse = reinterpret_cast<float*>(lse);
    const py::gil_scoped_release unlocked;
    (backward ? chosen->attention_backward : chosen->attention_forward)(a, threads);
}

Adaln adaln_arguments(
    std::int64_t batch, std::int64_t width, const Blocks& blocks, float eps, const std::vector<Given>& tensors,
    std::uintptr_t mean, std::uintptr_t rstd) {
    Adaln a{batch, width, blocks.layout(), eps, {}, {}, {}, {}, {}, {}, {}, nullptr, nullptr,
            {}, {}, {}, {}, {}, {}, {}};
    Tensor* const slots[] = {&a.x, &a.branch, &a.gate, &a.shift, &a.scale, &a.residual, &a.y,
                             &a.dy, &a.dx_in, &a.dx, &a.dbranch, &a.dgate, &a.dshift, &a.dscale};
    for (std::size_t i = 0; i < tensors.size() && i < 14; i++) *slots[i] = tensor(tensors[i]);
    a.mean = reinterpret_cast<float*>(mean);
    a.rstd = reinterpret_cast<float*>(rstd);
    return a;
}

void adaln(
    bool backward, std::int64_t batch, std::int64_t width, const std::vector<std::int64_t>& lengths, float eps,
    const std::vector<Given>& tensors, std::uintptr_t mean, std::uintptr_t rstd, int threads) {
    const Blocks blocks(lengths);
    const Adaln a = adaln_arguments(batch, width, blocks, eps, tensors, mean, rstd);
    const py::gil_scoped_release unlocked;
    (backward ? chosen->adaln_backward : chosen->adaln_forward)(a, threads);
}

#ifdef ARD_HAS_CUDA
void adaln_cuda(
    bool backward, bool clusters, std::int64_t batch, std::int64_t width, const std::vector<std::int64_t>& lengths,
    float eps, const std::vector<Given>& tensors, std::uintptr_t mean, std::uintptr_t rstd, std::uintptr_t partial,
    std::uintptr_t stream) {
    const Blocks blocks(lengths);
    const Adaln a = adaln_arguments(batch, width, blocks, eps, tensors, mean, rstd);
    const char* error = cuda::adaln(
        a, reinterpret_cast<float*>(partial), backward, clusters, reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(error);
}
#endif

}  // namespace
}  // namespace ard

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of ard_kernels.";
    m.def("attention", &ard::attention);
    m.def("adaln", &ard::adaln);
#ifdef ARD_HAS_CUDA
    m.def("adaln_cuda", &ard::adaln_cuda);
#else
    m.attr("no_cuda") = ARD_NO_CUDA;
#endif
    m.def("threaded", &ard::threaded);
    m.def("instruction_set", [] { return std::string(ard::chosen->name); });
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const ard::Kernels* kernels : ard::usable()) names.emplace_back(kernels->name);
        return names;
    });
    m.def("use_instruction_set", [](const std::string& name) {
        for (const ard::Kernels* kernels : ard::usable())
            if (name == kernels->name) {
                ard::chosen = kernels;
                return;
            }
        throw std::invalid_argument("instruction set is '" + name + "', which is not among instruction_sets()");
    });
}
