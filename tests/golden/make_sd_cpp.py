"""Run stable-diffusion.cpp's own schedules and samplers on a toy model and keep what comes out, in sd_cpp.npz.

    python tests/golden/make_sd_cpp.py V0_4_7_SRC MASTER_SRC        needs g++

V0_4_7_SRC: vendor/stable-diffusion.cpp/src of the source distribution stable-diffusion-cpp-python 0.4.7.
MASTER_SRC: src of stable-diffusion.cpp at commit 97d2990 (August 2026), for what 0.4.7 does not have.

Only denoiser.hpp, tensor.hpp and the generators are compiled, with empty stand-ins for the headers above them.

    <version>/schedule/<name>/<n>/<shift>/<n_positions>    n + 1 sigmas
    <version>/sample/<method>/<k>/<eta>                    16 values; schedule k of SIGMAS, see tests/test_sampler.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

STAND_IN = r"""
#pragma once
#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>
#define LOG_INFO(...) (void)0
#define LOG_WARN(...) (void)0
#define LOG_DEBUG(...) (void)0
#define LOG_ERROR(...) (void)0
#define GGML_ASSERT(x) assert(x)
#define SD_UNUSED(x) (void)(x)
enum SDVersion { VERSION_SVD, VERSION_OTHER };
inline bool sd_version_is_sd1(SDVersion) { return false; }
inline bool sd_version_is_sd2(SDVersion) { return false; }
inline bool sd_version_is_sdxl(SDVersion) { return false; }
enum scheduler_t { SCHEDULERS };
enum sample_method_t { METHODS };
static std::vector<const std::vector<std::vector<float>>*> GITS_NOISE;
using KeyValueArgs = std::vector<std::pair<std::string, std::string>>;
inline KeyValueArgs parse_key_value_args(const char*, const char*) { return {}; }
inline bool parse_strict_float(const std::string&, float&) { return false; }
inline bool parse_strict_int(const std::string&, int&) { return false; }
inline bool parse_strict_bool(const std::string&, bool&) { return false; }
"""

MAIN = r"""
#if MASTER
#include "runtime/denoiser.hpp"
#include "core/rng_philox.hpp"
#define EXTRA , nullptr
#else
#include "denoiser.hpp"
#include "rng_philox.hpp"
#define EXTRA
#endif
using T = sd::Tensor<float>;

static T guided(const T& x, float s) {
    T y = x;
    for (int64_t i = 0; i < y.numel(); i++) y[i] = 0.5f * std::tanh(x[i]) * (2.0f - s) + 0.3f * s;
    return y;
}
static T unguided(const T& x, float s) {
    T y = x;
    for (int64_t i = 0; i < y.numel(); i++) y[i] = 0.2f * x[i] / (1.0f + s);
    return y;
}
template <typename V> static void show(const std::string& key, const V& values, size_t n) {
    printf("%s", key.c_str());
    for (size_t i = 0; i < n; i++) printf(" %.9g", values[i]);
    printf("\n");
}

int main() {
    const std::vector<const char*> schedulers = {SCHEDULER_NAMES}, methods = {METHOD_NAMES};
    for (float shift : {3.0f, 6.0f})
        for (size_t s = 0; s < schedulers.size(); s++)
            for (int n : {2, 5, 8, 9, 20})
                for (int positions : {960, 4096}) {
                    if (!*schedulers[s]) continue;
                    DiscreteFlowDenoiser denoiser(shift);
                    auto v = denoiser.get_sigmas(n, positions, (scheduler_t)s, VERSION_OTHER EXTRA);
                    show(std::string("schedule/") + schedulers[s] + "/" + std::to_string(n) + "/" +
                         std::to_string((int)shift) + "/" + std::to_string(positions), v, v.size());
                }
    const std::vector<std::vector<float>> sigmas = {SIGMAS};
    for (size_t m = 0; m < methods.size(); m++)
        for (size_t k = 0; k < sigmas.size(); k++)
            for (float eta : {0.0f, 0.5f, 1.0f}) {
                if (!*methods[m]) continue;
                auto rng = std::make_shared<PhiloxRNG>();
                rng->manual_seed(42);
                T x({4, 4});
                auto noise = rng->randn(16);
                for (int i = 0; i < 16; i++) x[i] = noise[i] * sigmas[k][0] + 0.5f * (1 - sigmas[k][0]);
#if MASTER
                auto f = [](const T& x, float s, int) -> sd::guidance::GuiderOutput { return {guided(x, s), unguided(x, s)}; };
#else
                auto f = [](const T& x, float s, int) -> T { return guided(x, s); };
#endif
                T y = sample_k_diffusion((sample_method_t)m, f, x, sigmas[k], rng, eta, true EXTRA);
                char key[64];
                snprintf(key, sizeof key, "sample/%s/%zu/%g", methods[m], k, eta);
                show(key, y, 16);
            }
}
"""  # noqa: E501

GUIDER = """
#pragma once
#include "core/tensor.hpp"
namespace sd { namespace guidance { struct GuiderOutput { sd::Tensor<float> pred, pred_uncond; }; } }
"""

# enumerator -> name on the command line; "" where we have no such thing
SCHEDULERS = {
    "DISCRETE": "discrete", "KARRAS": "karras", "EXPONENTIAL": "exponential", "AYS": "", "GITS": "",
    "SGM_UNIFORM": "sgm_uniform", "SIMPLE": "simple", "SMOOTHSTEP": "smoothstep", "KL_OPTIMAL": "kl_optimal",
    "LCM": "lcm", "BONG_TANGENT": "bong_tangent", "LTX2": "ltx2", "LOGIT_NORMAL": "logit_normal", "FLUX2": "flux2",
    "FLUX": "flux", "BETA": "beta",
}  # fmt: skip
METHODS = {
    "EULER": "euler", "EULER_A": "euler_a", "HEUN": "heun", "DPM2": "dpm2", "DPMPP2S_A": "dpm++2s_a",
    "DPMPP2M": "dpm++2m", "DPMPP2Mv2": "dpm++2mv2", "IPNDM": "ipndm", "IPNDM_V": "ipndm_v", "LCM": "lcm",
    "DDIM_TRAILING": "ddim_trailing", "TCD": "", "RES_MULTISTEP": "res_multistep", "RES_2S": "res_2s",
    "ER_SDE": "er_sde", "EULER_CFG_PP": "euler_cfg_pp", "EULER_A_CFG_PP": "", "EULER_GE": "euler_ge",
    "DPMPP2M_SDE": "", "DPMPP2M_SDE_BT": "", "LMS": "lms",
}  # fmt: skip
ONLY_MASTER = ("ltx2", "logit_normal", "flux2", "flux", "beta", "euler_cfg_pp", "euler_ge", "lms")
SIGMAS = ((1.0, 0.95, 0.85, 0.7, 0.5, 0.3, 0.1, 0.0), (0.6, 0.35, 0.1, 0.0), (1.0, 0.0))


def run(source: Path, master: bool) -> dict[str, np.ndarray]:
    def known(name: str) -> str:
        return f'"{name}"' if name and (master or name not in ONLY_MASTER) else '""'

    stand_in = STAND_IN.replace("SCHEDULERS", ", ".join(f"{k}_SCHEDULER" for k in SCHEDULERS) + ", SCHEDULER_COUNT")
    stand_in = stand_in.replace("METHODS", ", ".join(f"{k}_SAMPLE_METHOD" for k in METHODS) + ", SAMPLE_METHOD_COUNT")
    code = MAIN.replace("SCHEDULER_NAMES", ", ".join(map(known, SCHEDULERS.values())))
    code = code.replace("METHOD_NAMES", ", ".join(map(known, METHODS.values())))
    code = code.replace("{SIGMAS}", "{" + ", ".join("{" + ", ".join(f"{x}f" for x in s) + "}" for s in SIGMAS) + "}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        core = folder / ("core" if master else ".")
        runtime = folder / ("runtime" if master else ".")
        core.mkdir(exist_ok=True)
        runtime.mkdir(exist_ok=True)
        for name in ("denoiser.hpp", "tensor.hpp", "rng.hpp", "rng_philox.hpp"):
            found = next(source.rglob(name))
            shutil.copy(found, (runtime if name == "denoiser.hpp" else core) / name)
        (core / "ggml_extend.hpp").write_text(stand_in)
        (runtime / "guidance.h").write_text(GUIDER)
        for name in ("gits_noise.h", "gits_noise.inl"):
            (runtime / name).write_text("")
        (folder / "main.cpp").write_text(code)
        command = ["g++", "-std=c++17", "-O1", "-w", f"-DMASTER={int(master)}", f"-I{folder}"]
        subprocess.run([*command, str(folder / "main.cpp"), "-o", str(folder / "main")], check=True)
        lines = subprocess.run([str(folder / "main")], check=True, capture_output=True, text=True).stdout.splitlines()
    out = {}
    for line in lines:
        key, *values = line.split()
        if not master or key.split("/")[1] in ONLY_MASTER:
            out[f"{'master' if master else '0.4.7'}/{key}"] = np.array(values, np.float32)
    return out


if __name__ == "__main__":
    old, new = map(Path, sys.argv[1:3])
    np.savez_compressed(Path(__file__).parent / "sd_cpp.npz", **run(old, False), **run(new, True))
