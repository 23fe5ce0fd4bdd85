import torch

from genkit.quantizers import make


def test_one_map_moves_all_codes():
    quantizer = make("simvq", dim=6, codebook_size=64)
    sum(quantizer(torch.randn(1, 20, 6)).losses.values()).backward()
    assert {n for n, _ in quantizer.named_parameters()} == {"weight", "bias"}
    before = quantizer.codebook().detach()
    torch.optim.SGD(quantizer.parameters(), lr=0.1).step()
    assert ((quantizer.codebook() - before).abs().sum(1) > 0).all()
    expected = quantizer.embedding @ quantizer.weight.T + quantizer.bias
    torch.testing.assert_close(quantizer.codebook(), expected)


def test_codes_that_learn_all_have_gradients_only_where_hit_but_all_move():
    quantizer = make("simvq", dim=6, codebook_size=64, freeze=False, bias=False)
    found = quantizer(torch.randn(1, 20, 6))
    sum(found.losses.values()).backward()
    assert torch.equal(quantizer.embedding.grad.any(1).nonzero().flatten(), found.indices.unique())
    assert quantizer.bias is None and quantizer.weight.grad.any()
