"""The native build as others meet it: the C++ package, the CUDA library, the ODR rule of the ISA objects,
introspection, clean imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

import kdq_kernels
from kdq_kernels.cpu import PeakName

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def require_success(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cmake --install` of the libraries alone (CUDA's where nvcc is), and consumers built against nothing but that."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on PATH")
    folder = tmp_path_factory.mktemp("cpp")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    require_success(run("cmake", "-S", ROOT, "-B", folder / "build", "-DKDQ_TESTS=ON", *generator))
    require_success(run("cmake", "--build", folder / "build"))
    require_success(run("cmake", "--install", folder / "build", "--prefix", folder / "prefix"))
    require_success(
        run(
            "cmake",
            "-S",
            ROOT / "tests" / "consumer",
            "-B",
            folder / "consumer",
            *generator,
            f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}",
        )
    )
    require_success(run("cmake", "--build", folder / "consumer"))
    return folder


def test_consumer_agrees_with_the_reference(installed: Path) -> None:
    output = require_success(run(installed / "consumer" / "consumer"))
    assert "DIFFERENT" not in output
    assert output.count("equal") == 8 * len(kdq_kernels.available_isas())


def test_installed_library_needs_neither_torch_nor_python(installed: Path) -> None:
    (library,) = (installed / "prefix").rglob("libkdq.so")
    needed = require_success(run("ldd", library))
    assert "torch" not in needed
    assert "python" not in needed


def test_cuda_kernels_agree_with_the_reference_on_the_emulator(installed: Path) -> None:
    """tests/cuda: the kernels' own bodies, run on the CPU; needs neither nvcc nor a GPU."""
    output = require_success(run("ctest", "--test-dir", installed / "build", "--output-on-failure"))
    assert re.search(r"100% tests passed.* out of 11\n", output)


def test_cuda_library_needs_no_toolkit(installed: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: libkdq_cuda is not built here")
    assert "expected a pointer" in require_success(run(installed / "consumer" / "cuda_consumer"))
    (library,) = (installed / "prefix").rglob("libkdq_cuda.so")
    needed = require_success(run("ldd", library))
    assert "cudart" not in needed
    assert "torch" not in needed


def disassembler() -> str | None:
    """cuobjdump: on PATH, of the CUDA toolkit, or of PyPI's nvidia-cuda-cuobjdump or triton."""
    found = shutil.which("cuobjdump")
    folders = (Path(sysconfig.get_path("purelib")) / part for part in ("nvidia", "triton/backends/nvidia"))
    return found or next((str(path) for folder in folders for path in folder.rglob("bin/cuobjdump")), None)


def instructions_by_kernel(library: Path, cuobjdump: str) -> dict[tuple[str, str], Counter[str]]:
    """(architecture, mangled name) -> how often each instruction is in it."""
    path = f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"  # its nvdisasm lies beside it
    listing = require_success(run(cuobjdump, "--dump-sass", library, PATH=path))
    kernels: dict[tuple[str, str], Counter[str]] = {}
    architecture = ""
    for line in listing.splitlines():
        if match := re.match(r"\s*code for (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernels[architecture, match[1]] = current = Counter()
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line):
            current[match[1]] += 1
    return kernels


def test_cuda_products_are_on_tensor_cores(installed: Path) -> None:
    """IMMA, BMMA and HMMA in the machine code, for Hopper IGMMA and BGMMA too, and nothing spilled to local memory."""
    cuobjdump = disassembler()
    if shutil.which("nvcc") is None or cuobjdump is None:
        pytest.skip("nvcc and cuobjdump are not both here: libkdq_cuda is not built, or cannot be disassembled")
    (library,) = (installed / "prefix").rglob("libkdq_cuda.so")
    kernels = instructions_by_kernel(library, cuobjdump)
    assert {architecture for architecture, _ in kernels} == {"sm_80", "sm_90a"}
    for warp, warpgroup, product, convolutions in (
        ("IMMA", "IGMMA", "Int8Product", 4),  # dynamic and static, whole and in pieces of k
        ("BMMA", "BGMMA", "BinaryProduct", 1),
    ):
        meant = {key: counts for key, counts in kernels.items() if product in key[1]}
        for_any = [counts for key, counts in meant.items() if "HopperProduct" not in key[1]]
        assert len(for_any) >= 2 * 4  # tiled and small, two results, on two architectures
        assert all(counts[warp] > 0 for counts in for_any)
        assert len([key for key in meant if "Windows" in key[1]]) == 2 * convolutions  # on two architectures
        for_hopper = {key: counts for key, counts in meant.items() if "HopperProduct" in key[1]}
        on_hopper = [counts for (architecture, _), counts in for_hopper.items() if architecture == "sm_90a"]
        assert len(on_hopper) == 3
        assert all(counts[warpgroup] > 0 and counts["UTMALDG"] == 2 for counts in on_hopper)
        # Fences and waits: where ptxas makes wgmma wait for each product, there are more of them than products.
        assert all(counts["WARPGROUP"] <= counts[warpgroup] for counts in on_hopper)
        elsewhere = [counts for (architecture, _), counts in for_hopper.items() if architecture == "sm_80"]
        assert all(set(counts) <= {"LDC", "MOV", "EXIT", "BRA", "NOP"} for counts in elsewhere)  # empty
    planes = [counts for key, counts in kernels.items() if "PlaneProduct" in key[1]]
    assert len(planes) == 2 * 2  # integers and floats, on two architectures
    assert all(counts["BMMA"] > 0 for counts in planes)
    floats = [counts for key, counts in kernels.items() if "FloatProduct" in key[1]]
    assert len(floats) == 2 * 10  # two tiles; int8 with three types of x, codebooks with two; on two architectures
    assert all(counts["HMMA"] > 0 for counts in floats)
    loops = [("IMMA", "Int8Loop"), ("BMMA", "BinaryLoop"), ("HMMA", "BFloat16Loop"), ("FFMA", "Float32Loop")]
    for instruction, name in loops:
        meant = [counts for key, counts in kernels.items() if name in key[1]]
        assert len(meant) >= 2  # on two architectures
        assert all(counts[instruction] > 0 for counts in meant)
    assert not [key for key, counts in kernels.items() if counts["LDL"] + counts["STL"]]


def test_cuda_without_nvcc_is_an_error(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on PATH")
    result = run("cmake", "-S", ROOT, "-B", tmp_path, "-DKDQ_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert result.returncode != 0
    assert "KDQ_CUDA=ON, but there is no CUDA compiler" in " ".join(result.stderr.split())


def test_cuda_operators_need_a_torch_with_cuda(tmp_path: Path) -> None:
    """Asked for, that is an error; not asked for, a note, and everything else is built."""
    torch = pytest.importorskip("torch")
    if shutil.which("cmake") is None or torch.version.cuda is not None:
        pytest.skip("cmake is not on PATH, or this torch has CUDA")
    configure = ("cmake", "-S", ROOT, "-DKDQ_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}")
    asked = run(*configure, "-B", tmp_path / "on", "-DKDQ_CUDA=ON")
    assert asked.returncode != 0
    assert re.search(r"KDQ_CUDA=ON, but torch \S+ is built without CUDA", " ".join(asked.stderr.split()))
    left_out = run(*configure, "-B", tmp_path / "auto")
    require_success(left_out)
    assert "built without CUDA, so the operators for CUDA tensors are left out" in left_out.stderr


def test_a_build_without_cuda_removes_the_operators_of_one_with_it(tmp_path: Path) -> None:
    """In an editable install they would lie beside the new libraries, and be loaded."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on PATH")
    left = [tmp_path / f"lib{name}.so" for name in ("kdq_torch", "kdq_cuda", "kdq_torch_cuda")]
    kept = tmp_path / "libkdq.so"
    for path in (*left, kept):
        path.touch()
    options = (f"-DKDQ_OUTPUT={tmp_path}", f"-DPython_EXECUTABLE={sys.executable}", "-DKDQ_TORCH=OFF", "-DKDQ_CUDA=OFF")
    require_success(run("cmake", "-S", ROOT, "-B", tmp_path / "build", "-DKDQ_PYTHON=ON", *options))
    assert [path.exists() for path in left] == [False] * 3
    assert kept.exists()


def test_isa_objects_have_no_weak_symbols(installed: Path) -> None:
    """A weak symbol compiled with ISA flags may replace the same one in a file without: a crash on older CPUs."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not on PATH")
    objects = [path for path in (installed / "build").rglob("*.o") if "/x86/" in str(path)]
    if not objects:
        pytest.skip("this build has no ISA objects")
    assert len(objects) == len(list((ROOT / "csrc" / "x86").glob("*.cpp")))
    for path in objects:
        symbols = require_success(run("nm", "-C", path))
        weak = re.findall(r"^[0-9a-f ]{16} ([WwVvu] .*)$", symbols, re.MULTILINE)
        assert not weak, f"{path.name}: {weak}"


def test_available_isas_start_at_the_reference() -> None:
    isas = kdq_kernels.available_isas()
    assert isas[0] == "reference"
    assert kdq_kernels.cpu_isa() in isas


def test_set_isa_refuses_the_unknown_and_the_impossible() -> None:
    before = kdq_kernels.cpu_isa()
    with pytest.raises(ValueError, match="set_isa.*'mmx'.*avx2"):
        kdq_kernels.set_isa("mmx")
    missing = [n for n in ("avx2", "avx512", "avx512vnni") if n not in kdq_kernels.available_isas()]
    for name in missing:
        with pytest.raises(RuntimeError, match=f"cannot run '{name}'|'{name}' is not built"):
            kdq_kernels.set_isa(name)
    assert kdq_kernels.cpu_isa() == before


@pytest.mark.parametrize("module", ["kdq_kernels", "kdq_kernels.numpy"])
def test_import_needs_no_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}; assert sys.modules['torch'] is None"
    require_success(run(sys.executable, "-c", code))


def test_environment_forces_the_isa() -> None:
    code = "import kdq_kernels; print(kdq_kernels.cpu_isa())"
    assert require_success(run(sys.executable, "-c", code, KDQ_ISA="reference")).strip() == "reference"
    wrong = run(sys.executable, "-c", code, KDQ_ISA="sse9")
    assert wrong.returncode != 0
    assert "KDQ_ISA: unknown instruction set 'sse9'" in wrong.stderr


def test_peaks_are_positive_and_add_up() -> None:
    peaks = kdq_kernels.machine_peaks(1, copy_bytes=1 << 20, read_bytes=1 << 20, seconds=0.02)
    assert peaks["int8_gops"] > peaks["float32_gflops"] > 0
    assert peaks["binary_gops"] > peaks["int8_gops"]
    assert peaks["copy_gbps"] > 0
    assert peaks["read_gbps"] > 0


@pytest.mark.parametrize(
    "name", ["int8_gops", "binary_gops", "float32_gflops", "bfloat16_gflops", "copy_gbps", "read_gbps"]
)
def test_every_peak_is_measured_on_every_isa(isa: str, name: PeakName) -> None:
    assert kdq_kernels.machine_peak(name, 2, buffer_bytes=5000, seconds=0.002) > 0


def test_peaks_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="threads"):
        kdq_kernels.machine_peaks(0)
    with pytest.raises(ValueError, match="seconds"):
        kdq_kernels.machine_peak("int8_gops", seconds=0)
    with pytest.raises(ValueError, match="bytes.*512 a thread"):
        kdq_kernels.machine_peak("read_gbps", 2, buffer_bytes=1000)
    with pytest.raises(ValueError, match="name: expected one of int8_gops, .*got 'int4_gops'"):
        kdq_kernels.machine_peak("int4_gops")  # type: ignore[arg-type]


def test_fork_keeps_working() -> None:
    """Pool threads do not survive a fork; the child must not wait for them."""
    code = """
import os, sys, warnings
import numpy as np
import kdq_kernels.numpy as kn
kn.set_num_threads(2)
x = np.random.default_rng(0).normal(size=(400, 400)).astype("f4")
expected = kn.pack_signs(x)
child = os.fork()
if child == 0:
    os._exit(0 if (kn.pack_signs(x) == expected).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    require_success(run(sys.executable, "-c", code))
