// The instruction set the CPU twins run with here.

#pragma once

namespace helios {

const char* cpu_isa() noexcept;  // "avx512", "avx2" or "baseline"

}  // namespace helios
