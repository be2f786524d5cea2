"""Package map and the C++ module. Everything static stands in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

if shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is None:
    raise SystemExit("idefics2_fast needs a C++17 compiler: install g++ (or set CXX to another one) and run this again.")
if not Path(sysconfig.get_path("include"), "Python.h").is_file():
    raise SystemExit("idefics2_fast needs Python's C headers: install python3-dev (or python3-devel) and run this again.")

from ninja import Writer
from pybind11.setup_helpers import Pybind11Extension, build_ext

# On disk the folders stand side by side; imported, they are one package. The bare name `kernels` belongs to another project.
PACKAGES = {
    "idefics2_fast": "idefics2_fast",
    "idefics2_fast.patching": "idefics2_fast/patching",
    "idefics2_fast.kernels": "kernels",
    "idefics2_fast.training": "training",
    "idefics2_fast.benchmarks": "benchmarks",
    "idefics2_fast.benchmarks.sm90": "benchmarks/sm90",
}
OBJECTS = Path("build", "objects", sys.implementation.cache_tag)


class NinjaBuildExt(build_ext):
    """Compiles through ninja: sources in parallel, and again only those whose code, headers or flags changed."""

    def build_extensions(self):
        self.compiler.compile = self.compile
        super().build_extensions()

    def compile(
        self,
        sources,
        output_dir=None,  # a fresh temporary folder in an editable build: OBJECTS outlives it
        macros=None,
        include_dirs=None,
        debug=False,
        extra_preargs=None,
        extra_postargs=None,
        depends=None,
    ):
        """Stands in for the compiler's own `compile` and returns the object files, as that does."""
        _, objects, flags, options, _ = self.compiler._setup_compile(str(OBJECTS), macros, include_dirs, sources, depends, extra_postargs)
        command = [*self.compiler.compiler_so_cxx, *self.compiler._get_cc_args(options, debug, extra_preargs), *flags]
        with open(OBJECTS / "build.ninja", "w") as file:
            ninja = Writer(file)
            ninja.variable("builddir", str(OBJECTS))
            ninja.rule("cxx", f"{shlex.join(command).replace('$', '$$')} -MMD -MF $out.d $in -o $out", depfile="$out.d", deps="gcc")
            for source, target in zip(sources, objects, strict=True):
                ninja.build(target, "cxx", source)
        if subprocess.call([sys.executable, "-m", "ninja", "-f", file.name]):
            raise SystemExit("idefics2_fast._C did not compile: the compiler's messages stand above.")
        return objects


setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    ext_modules=[
        Pybind11Extension(
            "idefics2_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp")),
            cxx_std=17,
            # Geometry must round as Python's doubles do.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
