"""Builds the compiled parts with ninja. A missing compiler is said aloud and never fatal: the package runs without them."""

import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILD_INFO = Extension("helios_engine._build_info", ["csrc/bindings/build_info.cpp"], optional=True)


class NinjaBuild(build_ext):
    """Writes one build.ninja per extension and runs it: parallel, incremental, and the same commands everywhere."""

    def build_extension(self, extension: Extension) -> None:
        import ninja
        import pybind11

        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        work = Path(self.build_temp).resolve() / extension.name
        output.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        includes = [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_paths()['include']}"]
        compiler = self._compiler()
        with (work / "build.ninja").open("w") as file:
            writer = ninja.ninja_syntax.Writer(file)
            compile_line = f"{compiler} {' '.join(flags + includes)} -DHELIOS_CXX_FLAGS='\"{' '.join(flags)}\"'"
            writer.rule("cxx", f"{compile_line} -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            writer.rule("link", f"{compiler} -shared $in -o $out")
            objects = []
            for source in extension.sources:
                object_file = str(work / (Path(source).stem + ".o"))
                objects += writer.build(object_file, "cxx", str(ROOT / source))
            writer.build(str(output), "link", objects)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(work)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(result.stdout, result.stderr, file=sys.stderr)
            raise RuntimeError(f"building {extension.name} failed; helios_engine works without it")

    def _compiler(self) -> str:
        return sysconfig.get_config_var("CXX").split()[0] if sysconfig.get_config_var("CXX") else "c++"

    def run(self) -> None:
        # build_ext.run would first look for a compiler of its own choice; ninja needs only the file names.
        for extension in self.extensions:
            extension._full_name = self.get_ext_fullname(extension.name)
            try:
                self.build_extension(extension)
            except (RuntimeError, OSError, ImportError) as error:
                print(f"warning: {error}", file=sys.stderr)
                self.extensions = [other for other in self.extensions if other is not extension]


setup(ext_modules=[BUILD_INFO], cmdclass={"build_ext": NinjaBuild})
