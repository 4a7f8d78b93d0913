"""pyproject.toml lists the packages by hand, since they have two roots: none may be forgotten."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        str(init.parent.relative_to(base)).replace("/", ".")
        for base, top in ((ROOT, "kdq_kernels"), (ROOT / "python", "kdq"))
        for init in (base / top).rglob("__init__.py")
    }
    assert set(listed) == found
