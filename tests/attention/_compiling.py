"""Compiles kernels for GPUs that are not present: what the compiler refuses, spills or cannot hold shows without one.

``python -m tests.attention._compiling`` is run by :func:`compiled` without ``TRITON_INTERPRET``: Triton decides when a
kernel is defined whether it is interpreted, and the tests' process interprets.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have


def compiled(module: str, cases: list[dict], timeout: float = 600) -> list[dict]:
    """``module.launch(**case)`` gives (kernel, its launch's arguments, options); tensors are on the meta device.

    Each result is a dict with ``registers`` of a thread, ``spilled`` bytes of a thread, ``shared`` bytes of a block,
    ``wgmma`` and ``mma`` (instructions of either kind), and ``arch``, which a case names as 80 or 90.
    """
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.attention._compiling", module],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
        timeout=timeout,
    )
    if ran.returncode:
        raise RuntimeError(ran.stdout[-2000:] + ran.stderr[-6000:])
    return json.loads(ran.stdout)


def compile_one(kernel, arguments: dict, options: dict, arch: int):
    """The compiled kernel of one launch, specialised as a launch would: alignment by 16, ones, absent tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[tuple, Any] = {}
    hints: dict[tuple, list] = {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(position,)] = "constexpr", value
        else:
            signature[parameter.name] = _type(value, (position,), constants, hints)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _type(value, path: tuple, constants: dict, hints: dict):
    import torch

    if isinstance(value, tuple):
        return tuple(_type(x, (*path, i), constants, hints) for i, x in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        hints[path] = [["tt.divisibility", 16]]
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
        return "*" + names[value.dtype]
    if isinstance(value, int):
        if value % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"
    return "fp32"


def usage(kernel) -> dict:
    """What ``cuobjdump`` of Triton's own tools says of a compiled kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\smma\.sync", ptx)),
        "asynchronous_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }


def main() -> None:
    launch = importlib.import_module(sys.argv[1]).launch
    results = []
    for case in json.load(sys.stdin):
        kernel, arguments, options = launch(**case)
        results.append({**case, **usage(compile_one(kernel, arguments, options, case["arch"]))})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
