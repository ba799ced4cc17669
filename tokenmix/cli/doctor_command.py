"""`tokenmix doctor`: what runs fast here, what does not, and exactly why."""

from __future__ import annotations

import argparse
import importlib.util
import platform

from tokenmix.cli.tables import table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: tokenmix doctor --build-kernels"
    parser.add_argument(
        "--build-kernels", action="store_true", help="compile the C++ kernels for this processor (needs g++ or clang++)"
    )
    parser.add_argument(
        "--format", choices=("table", "json", "csv", "markdown"), default="table", help="form of the report"
    )


def run(options: argparse.Namespace) -> int:
    from tokenmix.runtime.module import require_torch

    require_torch()
    from tokenmix.fast.native import BuildError, build_library

    if options.build_kernels:
        try:
            print(f"built {build_library()}")
        except BuildError as error:
            print(f"error: {error}")
            return 1
    rows = _kernels()
    machine = _machine()
    if options.format == "json":
        import json

        keys = ("kernel", "device", "runs", "why")
        kernels = [dict(zip(keys, row, strict=True)) for row in rows]
        print(json.dumps({"schema": 1, "machine": machine, "kernels": kernels}, indent=2))
        return 0
    if options.format == "table":
        width = max(len(key) for key in machine)
        print("\n".join(f"{key.ljust(width)}  {value}" for key, value in machine.items()) + "\n")
    print(table(["kernel", "device", "runs as", "why not faster"], rows, options.format, left=range(4)))
    return 0


def _machine() -> dict[str, str]:
    import torch

    from tokenmix.runtime.memory import allocator

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    memory, remedy = allocator()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "triton": "installed" if importlib.util.find_spec("triton") else "not installed",
        "allocator": memory,
        **({"faster_with": remedy} if remedy else {}),
    }


def _kernels() -> list[tuple[str, str, str, str]]:
    import torch

    from tokenmix.blocks.kernels import FAST

    rows = []
    for name, file in sorted(FAST.items()):
        status = importlib.import_module(f"tokenmix.fast.{file}").status()
        if not torch.cuda.is_available():
            status["cuda"] = ("-", f"torch finds no GPU; on one: {status['cuda'][0]}")
        rows += [(name, device, runs, why) for device, (runs, why) in status.items()]
    return rows
