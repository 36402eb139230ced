"""Builds the compiled parts with ninja. A missing compiler is said aloud and never fatal: the package runs without them.

HELIOS_CUDA=1 makes a missing CUDA toolkit an error, HELIOS_CUDA=0 leaves CUDA out; by default its kernels are built where nvcc
is found and torch has CUDA of the same major release. HELIOS_CUDA=force is as 1, and takes an nvcc of another major release
too: the driver must then serve the newer of the two.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_INFO = Extension("helios_engine._build_info", ["csrc/bindings/build_info.cpp"], optional=True)
OPERATORS = Extension("helios_engine.libhelios_ops", [], optional=True)

# One object of every CPU twin per instruction set; dispatch.cpp picks one at run time.
ISAS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512",
}
COMMON = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
# Products and sums round one by one, as torch's own chain does.
TWIN = f"{COMMON} -O3 -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi"
NVCC = "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden"
GPUS = ("80", "90", "100", "120")


class NinjaBuild(build_ext):
    """Writes one build.ninja per extension and runs it: parallel, incremental, and the same commands everywhere."""

    def run(self) -> None:
        # build_ext.run would first look for a compiler of its own choice; ninja needs only the file names.
        for extension in list(self.extensions):
            extension._full_name = self.get_ext_fullname(extension.name)
            try:
                self.build_extension(extension)
            except (RuntimeError, OSError, ImportError) as error:
                if extension is OPERATORS and (wanted := os.environ.get("HELIOS_CUDA")) in ("1", "force"):
                    raise SystemExit(f"HELIOS_CUDA={wanted}, but the operators cannot be built: {error}") from None
                print(
                    f"warning: {extension.name} is not built: {error}; helios_engine works without it", file=sys.stderr
                )
                self.extensions = [other for other in self.extensions if other is not extension]

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("libhelios_ops"):  # holds no Python: one file for every version
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, extension: Extension) -> None:
        import ninja

        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        work = Path(self.build_temp).resolve() / extension.name
        output.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        with (work / "build.ninja").open("w") as file:
            write = self._write_operators if extension is OPERATORS else self._write_build_info
            write(ninja.ninja_syntax.Writer(file), output, work)
        result = subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(work)], capture_output=True, text=True)
        if result.returncode:
            print(result.stdout, result.stderr, file=sys.stderr)
            raise RuntimeError("compiling failed")

    def _write_build_info(self, writer, output: Path, work: Path) -> None:
        import pybind11

        includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
        flags = f"{COMMON} -O2 {includes} -DHELIOS_CXX_FLAGS='\"{TWIN}\"'"
        _rules(writer, _compiler())
        objects = _compile(writer, work, "csrc/bindings/build_info.cpp", flags)
        writer.build(str(output), "link", objects)

    def _write_operators(self, writer, output: Path, work: Path) -> None:
        import torch

        torch_folder = Path(torch.__file__).parent
        _check_compiler()
        self.cuda = cuda = _cuda_toolkit(torch)
        machine = "-DHELIOS_X86" if os.uname().machine == "x86_64" else ""
        headers = f"-isystem {torch_folder}/include -isystem {torch_folder}/include/torch/csrc/api/include"
        # The oldest release whose stable interface is asked for; newer ones keep it.
        bindings = f"{COMMON} -O2 {headers} -DTORCH_TARGET_VERSION=0x020a000000000000"
        if cuda:
            bindings += " -DHELIOS_CUDA -DUSE_CUDA"
        _rules(writer, _compiler())
        objects = _compile(writer, work, "csrc/kernels/dispatch.cpp", f"{COMMON} -O2 {machine}")
        for source in sorted((ROOT / "csrc/kernels").glob("*_cpu.cpp")):
            for isa, flags in ISAS.items() if machine else {"baseline": ""}.items():
                objects += _compile(writer, work, source, f"{TWIN} {machine} {flags} -DHELIOS_ISA={isa}", isa)
        for source in sorted((ROOT / "csrc/bindings").glob("*.cpp")):
            if source.name != "build_info.cpp":
                objects += _compile(writer, work, source, bindings, "bind")
        libraries = f"-fopenmp -L{torch_folder}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"
        if cuda:
            known = subprocess.run(
                [f"{cuda}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True
            ).stdout.split()
            gpus = [gpu for gpu in GPUS if f"compute_{gpu}" in known]  # older toolkits know fewer
            targets = " ".join(f"-gencode arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus)
            targets += f" -gencode arch=compute_{gpus[-1]},code=compute_{gpus[-1]}"
            command = f"{cuda}/bin/nvcc {NVCC} {targets} -MD -MF $out.d -c $in -o $out"
            writer.rule("nvcc", command, depfile="$out.d", deps="gcc")
            for source in sorted((ROOT / "csrc/kernels").glob("*_cuda.cu")):
                objects += writer.build(str(work / f"{source.stem}.o"), "nvcc", str(source))
            libraries += f" -L{cuda}/lib64 -L{cuda}/lib -lcudart_static -ldl -lrt -lpthread"
        writer.build(str(output), "link", objects, variables={"libraries": libraries})


def _compiler() -> str:
    return (sysconfig.get_config_var("CXX") or "c++").split()[0]


def _rules(writer, compiler: str) -> None:
    writer.rule("cxx", f"{compiler} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
    writer.rule("link", f"{compiler} -shared $in -o $out $libraries")


def _compile(writer, work: Path, source: str | Path, flags: str, tag: str = "") -> list[str]:
    source = ROOT / source
    target = str(work / f"{tag}{'_' * bool(tag)}{source.stem}.o")
    return writer.build(target, "cxx", str(source), variables={"flags": flags})


def _cuda_toolkit(torch) -> Path | None:
    """The toolkit to build CUDA kernels with, or None to leave them out."""
    wanted = os.environ.get("HELIOS_CUDA", "")
    if wanted not in ("", "0", "1", "force"):
        raise SystemExit(f"HELIOS_CUDA must be 0, 1 or force, got {wanted!r}")
    if wanted == "0":
        return None
    toolkit, problem = _find_toolkit()
    if toolkit is not None and torch.version.cuda is None:
        problem = f"torch {torch.__version__} has no CUDA"
    elif toolkit is not None:
        printed = subprocess.run([f"{toolkit}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
        release = printed.partition("release ")[2].split(",")[0]
        if release.split(".")[0] != torch.version.cuda.split(".")[0]:
            mismatch = f"nvcc is of CUDA {release} and torch of CUDA {torch.version.cuda}"
            if wanted == "force":
                print(f"warning: {mismatch}; the driver must serve both", file=sys.stderr)
            else:
                problem = mismatch
    if not problem:
        return toolkit
    if wanted in ("1", "force"):
        raise SystemExit(f"HELIOS_CUDA={wanted}, but {problem}; set HELIOS_CUDA=0 to build without CUDA")
    print(f"the CUDA kernels are left out: {problem}", file=sys.stderr)
    return None


def _find_toolkit() -> tuple[Path | None, str]:
    """(the toolkit's folder, or None; what is wrong). nvcc may be a script somewhere else, so it is asked where it lives."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if nvcc is None:
        return None, f"nvcc is not in CUDA_HOME {home}" if home else "nvcc is not on PATH"
    printed = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    tops = [line.partition("TOP=")[2].strip() for line in printed.splitlines() if "TOP=" in line]
    toolkit = Path(tops[0]).resolve() if tops else Path(nvcc).resolve().parent.parent
    if not list(toolkit.glob("lib*/libcudart_static.a")) + list(toolkit.glob("targets/*/lib/libcudart_static.a")):
        return None, f"{toolkit} has no libcudart_static.a"
    return toolkit, ""


def _check_compiler() -> None:
    """The CPU twins use _Float16 in C++, which GCC has since 12 and clang since 15."""
    source = "int main() { _Float16 x = 1; return static_cast<float>(x) != 1.0f; }"
    command = [_compiler(), "-x", "c++", "-std=c++17", "-fopenmp", "-fsyntax-only", "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{_compiler()} lacks _Float16 or OpenMP: GCC 12 or clang 15 is needed")


setup(ext_modules=[BUILD_INFO, OPERATORS], cmdclass={"build_ext": NinjaBuild})
