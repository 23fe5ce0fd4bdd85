"""Fused attention with tangents: errors, memory, speed against the device's floors, PyTorch and jvp_flash_attention.

One dot is ``2 B H M N D`` operations: value and tangent count 6, the backward of both 15, a plain forward 2. Bounds, in
bfloat16, are set for an H100 (989 TFLOP/s): value and tangent at least 40 % of it, the backward of both at least 30 %,
for N >= 4096 and D = 64 and 128; never slower than 3.5 times PyTorch's own plain forward; at least 1.5 times faster
than jvp_flash_attention, where that is installed and takes the shape; memory linear in N. On other devices the shares
are of that device's peak, if it is known, and are only reported. What a product of matrices and a copy reach is
measured first, for the peaks are the vendor's. Bounds come first, too, so that a run that is cut off has them.

    python benchmarks/gpu/attention.py            2 minutes, most of which is compiling
    python benchmarks/gpu/attention.py --device cpu    the script itself, on tiny shapes, in eager code
"""

import sys
from collections.abc import Callable, Iterator

import torch
from _measure import Row, main, peak_bytes, seconds, sections
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit import kernels
from genkit.attention import attention, attention_with_tangent

try:
    from jvp_flash_attention.jvp_attention import JVPAttn as peer
except ImportError:
    peer = None

# Dense bfloat16 TFLOP/s and TB/s, by what is in the device's name.
PEAKS = {"H100 PCIe": (756, 2.0), "H100": (989, 3.35), "H200": (989, 4.8), "A100": (312, 2.0), "L40": (181, 0.86)}
# Name: B, H, N, D.
BOUNDED = {
    "N 4096, D 64": (4, 16, 4096, 64),
    "N 4096, D 128": (2, 16, 4096, 128),
    "N 16384, D 64": (1, 16, 16384, 64),
    "N 16384, D 128": (1, 16, 16384, 128),
}
NETWORKS = {
    "DiT-XL/2 512px": (32, 16, 1024, 72),
    "DiT-XL/2 256px": (32, 16, 256, 72),
    "SD3.5-M 1024px": (1, 24, 4429, 64),
    "Flux 1024px": (1, 24, 4608, 128),
    "Wan 1.3B 480p": (1, 12, 32760, 128),
}
TINY = {"D 64": (1, 2, 40, 64), "D 72": (1, 2, 33, 72)}
FORWARD, BACKWARD, SLOWER, FASTER = 0.40, 0.30, 3.5, 1.5


def inputs(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> list[Tensor]:
    """``q, k, v, tq, tk, tv``."""
    generator = torch.Generator(device).manual_seed(0)
    b, h, n, d = shape
    return [torch.randn(b, h, n, d, device=device, dtype=dtype, generator=generator) for _ in range(6)]


def peak() -> tuple[float, float] | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((PEAKS[key] for key in PEAKS if key in name), None)


def speed(name: str, shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> Iterator[Row]:
    b, h, n, d = shape
    q, k, v, tq, tk, tv = inputs(shape, device, dtype)
    dot, limits = 2 * b * h * n * n * d, peak()
    hopper = limits is not None and limits[0] == PEAKS["H100"][0]
    bounded = hopper and n >= 4096 and d in (64, 128)

    def share(dots: int, taken: float) -> str:
        return "" if limits is None else f"{dots * dot / taken / 1e12 / limits[0]:.0%} of {limits[0]} TFLOP/s"

    with torch.no_grad():
        fused = seconds(lambda: attention_with_tangent(q, k, v, tq, tk, tv), device)
        least = None
        if limits is not None:
            moved = 8 * b * h * n * d * q.element_size()
            least = max(6 * dot / limits[0] / 1e12, moved / limits[1] / 1e12)
        note = share(6, fused) + ("" if least is None else f"; floor {least * 1e3:.3f} ms")
        yield Row(f"{name}: value and tangent", fused * 1e3, "ms", note=note)
        if bounded:
            assert limits is not None
            yield Row(f"{name}: value and tangent", 6 * dot / fused / 1e12 / limits[0], "of peak", FORWARD)
        plain = seconds(lambda: F.scaled_dot_product_attention(q, k, v), device)
        yield Row(f"{name}: PyTorch's plain forward", plain * 1e3, "ms", note=share(2, plain))
        ratio = Row(f"{name}: value and tangent over plain forward", fused / plain, "x", SLOWER, at_least=False)
        yield ratio if n >= 1024 and device != "cpu" else Row(ratio.what, ratio.value, "x")
        own = seconds(lambda: attention(q, k, v), device)
        yield Row(f"{name}: our plain forward", own * 1e3, "ms", note=share(2, own))
        by_jvp = seconds(lambda: torch.func.jvp(attention, (q, k, v), (tq, tk, tv)), device)
        yield Row(
            f"{name}: through torch.func.jvp", by_jvp * 1e3, "ms", note=f"{by_jvp / fused:.2f} of the one operation"
        )
        partial = seconds(lambda: attention_with_tangent(q, k, v, tq), device)
        yield Row(f"{name}: tangent of q alone", partial * 1e3, "ms", note=f"{partial / fused:.2f} of all three")
    yield from backward(name, (q, k, v, tq, tk, tv), device, dot, share, limits if bounded else None)


def backward(
    name: str,
    all_six: tuple[Tensor, ...],
    device: str,
    dot: int,
    share: Callable[[int, float], str],
    limits: tuple[float, float] | None,
) -> Iterator[Row]:
    leaves = [x.clone().requires_grad_() for x in all_six]
    o, to = attention_with_tangent(*leaves)
    g, h = torch.randn_like(o), torch.randn_like(to)
    dual = seconds(lambda: torch.autograd.grad((o, to), leaves, (g, h), retain_graph=True), device)
    yield Row(f"{name}: backward of both", dual * 1e3, "ms", note=share(15, dual))
    if limits is not None:
        yield Row(f"{name}: backward of both", 15 * dot / dual / 1e12 / limits[0], "of peak", BACKWARD)
    ordinary = seconds(lambda: torch.autograd.grad(o, leaves[:3], g, retain_graph=True), device)
    yield Row(f"{name}: backward of the value", ordinary * 1e3, "ms", note=share(5, ordinary))
    yield from duality(name, leaves, o, to)
    theirs = F.scaled_dot_product_attention(*leaves[:3])
    library = seconds(lambda: torch.autograd.grad(theirs, leaves[:3], g, retain_graph=True), device)
    yield Row(f"{name}: PyTorch's backward", library * 1e3, "ms", note=share(5, library))


def duality(name: str, leaves: list[Tensor], o: Tensor, to: Tensor) -> Iterator[Row]:
    """``<to, to>`` by either backward, as the inner product of gradients and tangents, for ``to`` is linear in them."""
    h, tangents = to.detach(), leaves[3:]
    exact = float(h.double().square().sum())
    for what, of, to_what in (("the value", o, leaves[:3]), ("the tangent", to, tangents)):
        gradients = torch.autograd.grad(of, to_what, h, retain_graph=True)
        made = sum(float((a.double() * b.detach().double()).sum()) for a, b in zip(gradients, tangents, strict=True))
        yield Row(f"{name}: duality of the backward of {what}", abs(made / exact - 1), "", 1e-2, at_least=False)


def memory(device: str) -> Iterator[Row]:
    """Of a step through value and tangent, at twice the tokens."""
    used = []
    for n in (4096, 8192, 16384):
        leaves = [x.requires_grad_() for x in inputs((1, 8, n, 64), device, torch.bfloat16)]

        def step(leaves=leaves):
            o, to = attention_with_tangent(*leaves)
            torch.autograd.grad(o.float().sum() + to.float().square().sum(), leaves)

        used.append(peak_bytes(step, device))
        yield Row(
            f"memory at {n} tokens", used[-1] / 2**20, "MiB", note=f"a score matrix has {8 * n * n * 4 / 2**20:.0f}"
        )
    yield Row("memory at 16384 over that at 8192 tokens", used[2] / used[1], "x", 2.1, at_least=False)


def hard(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Keys share a tangent and values an offset, which cancel in exact arithmetic."""
    q, k, v, tq, tk, tv = (x.float() for x in inputs(shape, device, dtype))
    shared = torch.randn(shape[-1], device=device, generator=torch.Generator(device).manual_seed(1))
    return [x.to(dtype) for x in (q, k, v + 4 * shared.sign(), tq, tk + 4 * shared, tv)]


def errors(dtype: torch.dtype, device: str, shape: tuple[int, int, int] = (1, 2, 500)) -> Iterator[Row]:
    """Relative errors of value, tangent and all gradients against float64."""
    bound = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}[dtype]
    for d in (64, 72, 128):
        for label, make in (("benign", inputs), ("hard", hard)):
            six = make((*shape, d), device, dtype)
            found, exact = derivatives(six), derivatives([x.double() for x in six])
            wrong = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
            at = f"{label}, {str(dtype).removeprefix('torch.')}, D {d}"
            limit = 3e-3 if label == "hard" and dtype == torch.bfloat16 else bound
            yield Row(f"error of the tangent, {at}", wrong[1], "", limit, at_least=False)
            yield Row(f"largest error of value and gradients, {at}", max(wrong), "", bound, at_least=False)


def derivatives(six: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in six]
    o, to = torch.func.jvp(attention, tuple(leaves[:3]), tuple(leaves[3:]))
    generator = torch.Generator(o.device).manual_seed(2)
    g, h = (torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for _ in range(2))
    return [o.detach(), to.detach(), *torch.autograd.grad((o, to), leaves, (g, h))]


def ceilings(device: str) -> Iterator[Row]:
    """What this very device does at its best."""
    yield Row("attention is fused here", float(kernels.fused(torch.device(device))), "", 1.0)
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    yield Row("product of 8192 x 8192 matrices", 2 * 8192**3 / seconds(lambda: a @ b, device) / 1e12, "TFLOP/s")
    x = torch.empty(2**30, device=device, dtype=torch.uint8)
    yield Row("copy", 2 * 2**30 / seconds(x.clone, device) / 1e12, "TB/s")


def beside_peer(name: str, shape: tuple[int, int, int, int]) -> Iterator[Row]:
    """jvp_flash_attention by its documented call, against ours by the same construct."""
    what, (_, _, n, d) = f"{name}: faster than jvp_flash_attention", shape
    if peer is None:
        yield Row(what, None, "x", note="not installed: pip install jvp_flash_attention")
        return
    if d not in (16, 32, 64, 128, 256) or n % 2:  # what its code refuses
        yield Row(what, None, "x", note=f"it does not take {n} tokens and {d} channels")
        return
    six = inputs(shape, "cuda", torch.bfloat16)
    with torch.no_grad():
        ours = seconds(lambda: torch.func.jvp(attention, tuple(six[:3]), tuple(six[3:])), "cuda")
        try:
            theirs = seconds(lambda: torch.func.jvp(peer.fwd_dual, tuple(six[:3]), tuple(six[3:])), "cuda")
        except Exception as error:  # theirs to mend
            yield Row(what, None, "x", note=f"it raises {type(error).__name__}: {error}".splitlines()[0][:160])
            return
    yield Row(what, theirs / ours, "x", FASTER, note=f"{theirs * 1e3:.3f} ms")


def beside_math(device: str) -> Iterator[Row]:
    q, k, v, tq, tk, tv = inputs(NETWORKS["DiT-XL/2 512px"], device, torch.bfloat16)
    with torch.no_grad():
        ours = seconds(lambda: torch.func.jvp(attention, (q, k, v), (tq, tk, tv)), device)
        with sdpa_kernel(SDPBackend.MATH):
            math = seconds(lambda: torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), (tq, tk, tv)), device)
    yield Row("DiT-XL/2 512px: faster than PyTorch's math attention", math / ours, "x", note=f"{math * 1e3:.2f} ms")


def rows(device: str) -> Iterator[Row]:
    cuda = device.startswith("cuda")
    half = torch.bfloat16 if cuda else torch.float32

    def speeds(shapes):
        return [(name, lambda n=name: speed(n, shapes[n], device, half)) for name in shapes]

    def wrong(dtype):
        shape = (1, 2, 500) if cuda else (1, 1, 40)
        return f"errors in {dtype}", lambda: errors(dtype, device, shape)

    if not cuda:
        return sections([wrong(torch.float32), *speeds(TINY)])
    shapes = BOUNDED | NETWORKS
    return sections(
        [
            ("ceilings", lambda: ceilings(device)),
            *speeds(BOUNDED),
            wrong(torch.bfloat16),
            ("memory", lambda: memory(device)),
            *speeds(NETWORKS),
            ("beside math attention", lambda: beside_math(device)),
            wrong(torch.float16),
            wrong(torch.float32),
            # Last, since a kernel of others that breaks takes the device's context along.
            *((f"{name} beside jvp_flash_attention", lambda n=name: beside_peer(n, shapes[n])) for name in shapes),
        ]
    )


if __name__ == "__main__":
    sys.exit(main("attention", __doc__.splitlines()[0], rows))
