// ard_kernels._C: pointers, strides and numbers in, results written through pointers. Who calls checks and owns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cuda/launch.h"
#include "instruction_sets.h"  // written by CMake: ARD_INSTRUCTION_SETS(f) is f(name) for each that was built

namespace py = pybind11;

namespace ard {
#define ARD_DECLARE(name) namespace name { extern const Kernels kernels; }
ARD_INSTRUCTION_SETS(ARD_DECLARE)
#undef ARD_DECLARE

namespace {

#ifdef __x86_64__
// Whether bit `bit` of word `word` (of eax, ebx, ecx, edx) is set in a leaf of the processor's description.
bool described(unsigned leaf, unsigned part, int word, int bit) {
    unsigned words[4];
    return __get_cpuid_count(leaf, part, &words[0], &words[1], &words[2], &words[3]) && (words[word] >> bit & 1);
}

// Whether the system lets this process use the tiles of AMX: Linux wants to be asked.
bool tiles_granted() {
#ifdef __linux__
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}
#endif

// Whether this processor can run the kernels of an instruction set.
bool runs(const std::string& name) {
    if (name == "portable") return true;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    if (name == "avx2") return true;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return false;
    if (name == "avx512") return true;
    if (!described(7, 1, 0, 5)) return false;  // AVX512_BF16, which older compilers have no name for
    if (name == "avx512_bf16" || name == "amx_emulated") return true;
    if (name == "amx") return described(7, 0, 3, 22) && described(7, 0, 3, 24) && tiles_granted();  // AMX-BF16, -TILE
#endif
    return false;
}

// The best first, those that were built and that this processor can run.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#define ARD_ADD(name) \
    if (runs(#name)) found.push_back(&name::kernels);
    ARD_INSTRUCTION_SETS(ARD_ADD)
#undef ARD_ADD
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
    explicit Blocks(const std::vector<std::int64_t>& runs) {  // how many blocks of which length, how many, ...
        for (std::size_t i = 0; i + 1 < runs.size(); i += 2)
            for (std::int64_t k = 0; k < runs[i]; k++) starts.push_back(starts.back() + runs[i + 1]);
    }
    Layout layout() const { return {static_cast<std::int64_t>(starts.size()) - 1, starts.data()}; }
};

void attention(
    bool backward, std::int64_t batch, std::int64_t heads, std::int64_t dim, const std::vector<std::int64_t>& runs,
    int mask, float scale, std::int64_t block, const std::vector<Given>& tensors, std::uintptr_t lse, int threads) {
    const Blocks blocks(runs);
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
    bool backward, std::int64_t batch, std::int64_t width, const std::vector<std::int64_t>& runs, float eps,
    const std::vector<Given>& tensors, std::uintptr_t mean, std::uintptr_t rstd, int threads) {
    const Blocks blocks(runs);
    const Adaln a = adaln_arguments(batch, width, blocks, eps, tensors, mean, rstd);
    const py::gil_scoped_release unlocked;
    (backward ? chosen->adaln_backward : chosen->adaln_forward)(a, threads);
}

void gelu(std::int64_t count, const Given& x, const Given& dout, const Given& out, int threads) {
    const Gelu g{count, tensor(x), tensor(dout), tensor(out)};
    const py::gil_scoped_release unlocked;
    chosen->gelu(g, threads);
}

#ifdef ARD_HAS_CUDA
void adaln_cuda(
    bool backward, bool clusters, std::int64_t batch, std::int64_t width, const std::vector<std::int64_t>& runs,
    float eps, const std::vector<Given>& tensors, std::uintptr_t mean, std::uintptr_t rstd, std::uintptr_t partial,
    std::uintptr_t stream) {
    const Blocks blocks(runs);
    const Adaln a = adaln_arguments(batch, width, blocks, eps, tensors, mean, rstd);
    const char* error = cuda::adaln(
        a, reinterpret_cast<float*>(partial), backward, clusters, reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string("ard_kernels, adaLN in CUDA: ") + error);
}
#endif

}  // namespace
}  // namespace ard

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of ard_kernels.";
    m.def("attention", &ard::attention);
    m.def("adaln", &ard::adaln);
    m.def("gelu", &ard::gelu);
#ifdef ARD_HAS_CUDA
    m.def("adaln_cuda", &ard::adaln_cuda);
    m.attr("cuda_architectures") = ARD_CUDA_ARCHITECTURES;
    m.def("why_no_driver", &ard::cuda::why_not);
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
