// What this build is: compiler, flags and the instruction sets it may use. Nothing else depends on
// it.

#include <pybind11/pybind11.h>

#include <string>

#ifndef HELIOS_CXX_FLAGS
#define HELIOS_CXX_FLAGS ""
#endif

namespace {

std::string cpu_capability() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "default";
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "Build facts of helios_engine's compiled parts.";
  module.def("compiler", &compiler);
  module.def("cxx_flags", [] { return std::string(HELIOS_CXX_FLAGS); });
  module.def("cpu_capability", &cpu_capability,
             "Best instruction set this CPU has: avx512, avx2 or default.");
}
