"""One of two processes of `test_distributed`: runs checks as its rank, and leaves what came of each in a file."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import rank_files
import rank_training
from kdq.distributed import alone
from rank_cases import RANKS, WRAPS, ddp_unused, fsdp


def checks(folder: Path) -> dict[str, Callable[[], None]]:
    """By name, in the order in which they run."""
    made: dict[str, Callable[[], None]] = {}
    for check in rank_training.WITH_WRAP:
        made |= {f"{check.__name__}-{name}": lambda c=check, w=wrap: c(w) for name, wrap in WRAPS.items()}
    for saved in (rank_files.checkpoints, rank_files.resumption, rank_files.conversion, rank_files.sharded_teacher):
        made |= {f"{saved.__name__}-{name}": lambda c=saved, w=wrap: c(w, folder) for name, wrap in WRAPS.items()}
    for name, wrap in {"ddp": ddp_unused, "fsdp": fsdp}.items():
        made[f"resumption_switchable-{name}"] = lambda w=wrap: rank_files.resumption(w, folder, switchable=True)
    made["shared_cache"] = lambda: rank_files.shared_cache(folder)
    for alone_ in rank_training.WITHOUT:
        made[alone_.__name__] = alone_
    return made


NAMES = tuple(name for name in checks(Path()) if "dies" not in name)
DEATHS = tuple(name for name in checks(Path()) if "dies" in name)


def main(rank: int, folder: Path, names: tuple[str, ...]) -> None:
    """Runs the checks as one rank; each leaves a file `<check>.<rank>`: empty, or why it failed."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=30), RANKS, rank)
    for name in names:
        error = ""
        try:
            with alone():  # what one process does; wrapped models do otherwise by themselves
                checks(folder)[name]()
        except Exception:
            error = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(error)
        if error:
            os._exit(1)  # the other rank may wait within a collective: it gets an error too
    os._exit(0)  # its peer may be dead


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:]))
