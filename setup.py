"""Builds the native code with CMake and packs it next to kdq_kernels; everything else is in pyproject.toml.

Environment, ON, OFF or AUTO: KDQ_TORCH says whether the torch operator library is built (AUTO: where torch is
installed), KDQ_CUDA whether its operators for CUDA tensors are (AUTO: where nvcc is found and torch has CUDA).
KDQ_TORCH_CALLS, ON or OFF, says whether the module is built that calls operators directly in this one torch.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Lets CMake put the libraries where `kdq_kernels._C` belongs: the source folder (editable install) or the wheel.

    Overrides `run` because setuptools's own copies the extension alone, without the libraries beside it that it loads.
    """

    def run(self) -> None:
        output = Path(self.get_ext_fullpath("kdq_kernels._C")).resolve().parent
        kind = "editable" if self.editable_mode else "wheel"  # two folders: each remembers where its libraries go
        build = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DKDQ_PYTHON=ON",
            f"-DKDQ_TORCH={os.environ.get('KDQ_TORCH', 'AUTO')}",
            f"-DKDQ_TORCH_CALLS={os.environ.get('KDQ_TORCH_CALLS', 'ON')}",
            f"-DKDQ_CUDA={os.environ.get('KDQ_CUDA', 'AUTO')}",
            f"-DKDQ_OUTPUT={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("kdq_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
