"""How fast is a document saved and loaded, compared with the disk's rate for the same bytes in the same run?

The KV is that of SmolLM2-135M in bfloat16. ``load`` reads the files, checks them and copies them into the pools of two
workers. ``load_cold`` does the same after the files were dropped from the page cache (if the system allows it);
``disk_cold`` is a plain read of the same files with one thread.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine


def seconds(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write(path: Path, size: int) -> None:
    """Write random bytes, and flush them to the disk."""
    piece = os.urandom(16 << 20)
    with path.open("wb") as file:
        for at in range(0, size, len(piece)):
            file.write(piece[: size - at])
        file.flush()
        os.fsync(file.fileno())


def read(files: list[Path]) -> None:
    """Read files from beginning to end."""
    buffer = bytearray(16 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=8000)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,
        LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, "smollm2-135m", dtype="bfloat16", kv_memory="512 MiB", policy="best") as engine,
    ):
        ids = engine.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))[: options.tokens]
        place = Path(folder) / "document"
        with engine.ingest(ids, name="long") as document:
            saves = [seconds(lambda: document.save(place)) for _ in range(options.repeats)]
        files = sorted(place.glob("blocks-*"))
        size = sum(path.stat().st_size for path in files)

        def load(cold: bool) -> float:
            if cold:
                forget(files)
            began = time.perf_counter()
            with engine.load(place):
                return time.perf_counter() - began

        def plain(cold: bool) -> float:
            if cold:
                forget(files)
            return seconds(lambda: read(files))

        loads = {cold: [(load(cold), plain(cold)) for _ in range(options.repeats)] for cold in (False, True)}
        disk = seconds(lambda: write(Path(folder) / "plain", size))
    gigabytes = size / 1e9
    figures = {
        "gigabytes": gigabytes,
        "files": len(files),
        "save_gb_per_second": gigabytes / min(saves),
        "disk_write_gb_per_second": gigabytes / disk,
        "load_gb_per_second": gigabytes / min(one for one, _ in loads[False]),
        "cached_read_gb_per_second": gigabytes / min(one for _, one in loads[False]),
        "load_cold_gb_per_second": gigabytes / min(one for one, _ in loads[True]),
        "disk_cold_gb_per_second": gigabytes / min(one for _, one in loads[True]),
    }
    report(figures, {name: getattr(options, name) for name in ("tokens", "workers", "repeats")}, options.json)


if __name__ == "__main__":
    main()
