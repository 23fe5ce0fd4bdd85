"""Plain vector quantization: a table of codes, learned by gradients or as moving averages.

arXiv 1711.00937.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from genkit.quantizers import processes
from genkit.quantizers._codebook import CodebookConfig, CodebookQuantizer
from genkit.rng import hash_seed


class VQConfig(CodebookConfig):
    """``rule``: codes learn by the codebook loss (``gradient``) or are moving averages of what they stand for (``ema``,
    with ``decay``). ``kmeans_init``: the first batch decides them, by ten rounds of Lloyd's algorithm.
    ``restart_threshold``: a code that stands for fewer vectors a batch, as a moving average, becomes one of the batch's
    vectors, the least used codes first and no two the same; 0 is never, 1 to 2 usual. ``init``: ``uniform`` on +-1/K,
    or ``normal`` with variance 1/D. ``seed``: of these choices.
    """

    rule: Literal["gradient", "ema"] = "gradient"
    decay: float = Field(default=0.99, ge=0, lt=1)
    kmeans_init: bool = False
    restart_threshold: float = Field(default=0.0, ge=0)
    init: Literal["uniform", "normal"] = "uniform"
    seed: int = 0

    @model_validator(mode="after")
    def _settings_are_read(self):
        if "codebook_weight" in self.model_fields_set and self.rule == "ema":
            raise ValueError("codebook_weight is of the codebook loss, which rule='ema' has not")
        if "init" in self.model_fields_set and self.kmeans_init:
            raise ValueError("init has no effect under kmeans_init=True")
        if "decay" in self.model_fields_set and self.rule == "gradient" and not self.restart_threshold:
            raise ValueError("decay is of the averages that rule='ema' and restart_threshold keep; there are none")
        return self


class VQ(CodebookQuantizer):
    """``q = c_k``, ``k = argmin |z - c_k|^2``; losses ``|q - sg z|^2 + beta |z - sg q|^2``.

    Under ``rule="ema"``, with ``g`` the decay, ``n_k <- g n_k + (1 - g) count_k``,
    ``m_k <- g m_k + (1 - g) sum_k z`` and ``c_k = m_k / n~_k``, ``n~ = (n + e) / (sum n + K e) sum n``, ``e = 1e-5``:
    with ``g = 0`` a step of Lloyd's algorithm. There is no codebook loss then. Counts and sums are those of all
    processes. A code that is restarted takes ``n`` and ``m`` with it, or the next update would undo it. Where training
    averages weights, it averages these codes as well, since an averaged encoder needs averaged codes.

    Sources: van den Oord et al., "Neural discrete representation learning", arXiv 1711.00937, eq. 3 and appendix A.1;
    under ``cosine`` Yu et al., "Vector-quantized image modeling with improved VQGAN", arXiv 2110.04627.
    """

    Config = VQConfig
    averaged_buffers: tuple[str, ...] = ()  # which training averages as it does weights
    embedding: Tensor
    counts: Tensor
    sums: Tensor
    steps: Tensor

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        config, k, d = self.config, self.codebook_size, self.dim
        generator = torch.Generator().manual_seed(hash_seed(config.seed, 0x5651))
        if config.init == "uniform":
            start = (torch.rand(k, d, generator=generator) * 2 - 1) / k
        else:
            start = torch.randn(k, d, generator=generator) / d**0.5
        if config.rule == "gradient":
            self.embedding = nn.Parameter(start)
        else:
            self.register_buffer("embedding", start)
            self.averaged_buffers = ("embedding",)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if config.rule == "ema" or config.restart_threshold:
            self.register_buffer("counts", torch.ones(k))
        if config.rule == "ema":
            self.register_buffer("sums", start.clone())

    def table(self) -> Tensor:
        return self.embedding

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if not self.training:
            return super().quantize(z)
        if self.config.kmeans_init and not int(self.steps):
            self._start(self._normalised(z.detach()))
        found = super().quantize(z)
        if hasattr(self, "counts"):
            self._learn(self._normalised(z.detach()), found[1])
        self.steps += 1
        return found

    @torch.no_grad()
    def _learn(self, z: Tensor, indices: Tensor) -> None:
        """Move averages towards this batch, and restart what is hardly used."""
        config, k = self.config, self.codebook_size
        count = torch.bincount(indices, minlength=k).to(self.counts)
        total = z.new_zeros(k, self.dim).index_add_(0, indices, z) if config.rule == "ema" else None
        self.counts.lerp_(processes.add_up(count), 1 - config.decay)
        if total is not None:
            self.sums.lerp_(processes.add_up(total).to(self.sums), 1 - config.decay)
        if config.restart_threshold:
            self._restart(z)
        if total is not None:
            n = self.counts
            smooth = (n + 1e-5) / (n.sum() + k * 1e-5) * n.sum()
            used = n > 0  # under decay 0 a code without vectors stays where it is
            self.embedding[used] = self._normalised(self.sums[used] / smooth[used, None]).to(self.embedding)

    def _restart(self, z: Tensor) -> None:
        dead = (self.counts < self.config.restart_threshold).nonzero().flatten()
        if not len(dead):
            return
        pool = processes.all_rows(z)
        if len(dead) > len(pool):  # two codes on one vector would leave one of them dead
            dead = dead[self.counts[dead].argsort(stable=True)[: len(pool)]]
        some = self._rows(len(pool), len(dead)).to(z.device)
        self.embedding[dead] = pool[some].to(self.embedding)
        self.counts[dead] = self.config.restart_threshold
        if self.config.rule == "ema":
            self.sums[dead] = pool[some].to(self.sums) * self.config.restart_threshold

    def _rows(self, n: int, wanted: int) -> Tensor:
        """Which of ``n`` vectors: all different while there are enough. The same on all processes."""
        generator = torch.Generator().manual_seed(hash_seed(self.config.seed, 0x7273, int(self.steps)))
        rounds = -(-wanted // n)
        return torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])[:wanted]

    @torch.no_grad()
    def _start(self, z: Tensor) -> None:
        """Lloyd's algorithm on the first batch of all processes, from some of its vectors."""
        pool = processes.all_rows(z)
        codes = pool[self._rows(len(pool), self.codebook_size).to(z.device)].clone()
        if self.codebook_size > len(pool):  # repeats are moved apart, or they would share one fate
            generator = torch.Generator().manual_seed(hash_seed(self.config.seed, 0x6A69))
            noise = torch.randn(codes.shape, generator=generator).to(codes)
            codes[len(pool) :] += 1e-2 * pool.std(correction=0) * noise[len(pool) :]
        for _ in range(10):
            indices = self.search(pool, self._normalised(codes))
            count = torch.bincount(indices, minlength=len(codes))
            total = torch.zeros_like(codes).index_add_(0, indices, pool)
            codes = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], codes)
        self.embedding.copy_(self._normalised(codes))
        if hasattr(self, "counts"):
            self.counts.copy_(count)
        if self.config.rule == "ema":
            self.sums.copy_(self.embedding * count[:, None])
