"""Compiles kernels for GPUs that are not present: what the compiler refuses, spills or cannot hold shows without one.

``python -m tests.compiling`` is run by :func:`compiled` without ``TRITON_INTERPRET``: Triton decides when a
kernel is defined whether it is interpreted, and the tests' process interprets.
"""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have


def compiled(module: str, cases: list[dict], timeout: float = 600) -> list[dict]:
    """``module.launch(**case)`` gives (kernel, its launch's arguments, options); tensors are on the meta device.

    Each result is its case (which names ``arch``, 80 or 90) with ``rows`` and ``keys`` of the tile, ``registers`` and
    ``spilled`` bytes of a thread, ``shared`` bytes of a block, ``wgmma`` and ``mma`` (instructions of either kind) and
    ``serialised`` (whether Hopper's dots wait for each other, at a great loss of speed).
    """
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.compiling", module],
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


def compile_one(kernel, arguments: dict, options: dict, arch: int) -> dict:
    """Compiles one launch, specialised as it would be: alignment by 16, ones, absent tensors. Returns what came out."""
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
    triton.knobs.compilation.always_compile = True  # else there is no log
    triton.knobs.nvidia.dump_ptxas_log = True
    with redirect_stdout(io.StringIO()) as log:
        done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = log.getvalue()
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", said)]
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "spilled": sum(spilled),
        "shared": done.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", done.asm["ptx"])),
        "mma": len(re.findall(r"\smma\.sync", done.asm["ptx"])),
        "serialised": "wgmma.mma_async instructions are serialized" in said,
        "asm": done.asm,
    }


def _type(value, path: tuple, constants: dict, hints: dict):
    import torch
    import triton

    if isinstance(value, tuple):
        return tuple(_type(x, (*path, i), constants, hints) for i, x in enumerate(value))
    if value is None or isinstance(value, triton.language.constexpr) or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        hints[path] = [["tt.divisibility", 16]]
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
        names |= {torch.int32: "i32", torch.int64: "i64"}
        return "*" + names[value.dtype]
    if isinstance(value, int):
        if value % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"
    return "fp32"


def main() -> None:
    launch = importlib.import_module(sys.argv[1]).launch
    results = []
    for case in json.load(sys.stdin):
        kernel, arguments, options = launch(**case)
        found = compile_one(kernel, arguments, options, case["arch"])
        tile = {"rows": arguments.get("ROWS"), "keys": arguments.get("KEYS")}
        results.append({**case, **tile, **{name: x for name, x in found.items() if name != "asm"}})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
