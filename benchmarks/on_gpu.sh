#!/usr/bin/env bash
# What a machine with one GPU has to show, in calls of less than ten minutes, so that a lent one suffices:
#
#     benchmarks/on_gpu.sh check OUT COMMIT      the GPU's tests, then every operator's results
#     benchmarks/on_gpu.sh measure OUT COMMIT    tunes the attention kernels, then measures with what it found
#     benchmarks/on_gpu.sh more OUT COMMIT SECTION ...    other sections of benchmarks.gpu_suite
#     benchmarks/on_gpu.sh amx OUT COMMIT        where the CPU has AMX: its kernels against those without
#
# OUT gets logs, launches.json (which `more` reads where it is there) and what the suite writes.
# CPUINFO names a file in the place of /proc/cpuinfo.
set -uo pipefail
cd "$(dirname "$0")/.."
[[ $# -ge 3 ]] || { sed -n '2,10p' "$0"; exit 2; }
what=$1 out=$2 commit=$3
shift 3
mkdir -p "$out"
export ARD_KERNELS_LAUNCHES=${ARD_KERNELS_LAUNCHES:-$out/launches.json}
python=${PYTHON:-python3}
"$python" -m pip install -q -e . --no-build-isolation --no-deps || exit
suite() { "$python" -m benchmarks.gpu_suite --out "$out" --commit "$commit" "$@"; }
# An interrupt, not an end: what has failed so far is then reported.
limited() { timeout --foreground -s INT -k 40 "$@"; }
case $what in
    check)
        limited 220 "$python" -m pytest -m gpu -n 15 --dist worksteal --tb=short -rf \
            --deselect tests/benchmarks/test_gpu_suite.py::test_a_quick_run_on_the_gpu_passes \
            tests/ard_kernels tests/ard/test_sampling.py tests/benchmarks/test_gpu_suite.py > "$out/pytest.log" 2>&1
        tests=$?
        tail -c 4000 "$out/pytest.log"
        if grep -q amx_bf16 "${CPUINFO:-/proc/cpuinfo}"; then  # the CPU's kernels that few machines can run
            limited 60 "$python" -m pytest -n 8 --tb=short -k "native and amx" tests/ard_kernels \
                > "$out/amx.log" 2>&1
            tail -c 2000 "$out/amx.log"
        fi
        suite --only correctness --seconds 220
        checks=$?
        exit $((tests || checks))
        ;;
    measure)
        limited 150 "$python" -m ard_kernels tune --dims 72 > "$out/tune.log" 2>&1
        tail -n 5 "$out/tune.log"
        suite --only attention adaln training sampling --seconds 370
        ;;
    more)
        suite --only "$@" --seconds 520
        ;;
    amx)
        for isa in avx512_bf16 amx; do
            ARD_KERNELS_ISA=$isa limited 280 "$python" -m benchmarks.cpu --repeats 5 --out "$out/cpu-$isa.json"
        done
        ;;
    *)
        sed -n '2,10p' "$0"
        exit 2
        ;;
esac
