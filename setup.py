"""Builds the native code with CMake and packs it next to kdq_kernels; everything else is in pyproject.toml.

Environment: KDQ_TORCH=ON|OFF|AUTO says whether the torch operator library is built (AUTO: where torch is installed).
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake once and lets it put the libraries where setuptools expects `kdq_kernels._C`."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"python-{sys.implementation.cache_tag}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DKDQ_PYTHON=ON",
            f"-DKDQ_TORCH={os.environ.get('KDQ_TORCH', 'AUTO')}",
            f"-DKDQ_OUTPUT={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("kdq_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
