"""A backend is tried before it is chosen: what it gets wrong is named."""

import torch
from torch.nn import functional as F

from genkit.attention import probing


def test_a_backend_that_loses_tangents_or_gradients_is_refused(monkeypatch):
    cpu = torch.device("cpu")

    class Loses(torch.autograd.Function):
        @staticmethod
        def forward(q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, g):
            return g, g, g

        @staticmethod
        def jvp(ctx, *tangents):
            return torch.zeros_like(tangents[0])

    functions = {
        "lost": lambda q, k, v, attn_mask=None: Loses.apply(q, k, v),
        "flat": lambda q, k, v, attn_mask=None: F.scaled_dot_product_attention(q, k, v).detach(),
        "unmasked": lambda q, k, v, attn_mask=None: F.scaled_dot_product_attention(q, k, v),
    }
    monkeypatch.setattr(probing, "compute", functions.__getitem__)
    assert probing.problem("lost", cpu, torch.float32, 16) is None
    assert probing.problem("lost", cpu, torch.float32, 16, tangent=True) == "its tangent is wrong"
    assert probing.problem("lost", cpu, torch.float32, 16, gradient=True) == "its gradient is wrong"
    assert "grad" in probing.problem("flat", cpu, torch.float32, 16, gradient=True)
    assert probing.problem("unmasked", cpu, torch.float32, 16, masked=True) == "its result is wrong"
