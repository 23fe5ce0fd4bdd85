"""Likelihood, samples and pictures of an autoregressive network; exact where its law can be written down."""

import itertools

import pytest
import torch
from torch import nn

from genkit import data
from genkit.autoregressive import Autoregressive
from genkit.denoisers.base import Condition
from genkit.networks.gpt import GPT
from genkit.token_sampling import TokenSampling


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = GPT(vocab_size=3, sample_size=2, num_classes=2, hidden_size=16, num_layers=2, num_heads=2)
    nn.init.normal_(network.out.weight, std=1.0)
    return Autoregressive(network.eval())


def test_tokens_are_the_grey_levels_of_the_digits():
    model, x = Autoregressive(GPT(17, 8, 10, 16, 1, 2)), data.make("digits").__getitems__(range(50))["x0"]
    tokens = model.tokens(x)
    assert tokens.min() == 0 and tokens.max() == 16 and torch.equal(model.pictures(tokens), x)
    assert torch.equal(model.tokens(3 * x), model.tokens((3 * x).clamp(-1, 1)))


def test_probabilities_of_all_pictures_add_up_to_one(model):
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for label in (0, 1, 2):
        condition = Condition({"class_labels": torch.full((81,), label)})
        assert model.log_probabilities(tokens, condition).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("w", [1.0, 2.0])
def test_samples_follow_the_law(w, model):
    """The first two tokens: ``p_c^w p_n^(1-w)``, normalised at each; chi-squared of 9 cells."""
    n = 4000
    uniform = torch.rand(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    condition = model.encode(None, class_labels=[1]).repeat(n)
    tokens = model.sample(uniform, condition, TokenSampling(w))
    assert model.calls == 4 * (1 + (w != 1))
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))
    full = torch.cat((pairs, torch.zeros_like(pairs)), dim=1)
    logits = [model.network(full[:, :-1], torch.full((9,), label))[:, :2].double() for label in (1, 2)]
    guided = (logits[1] + w * (logits[0] - logits[1])).softmax(-1)
    expected = n * guided.gather(2, pairs[..., None])[..., 0].prod(1)
    counts = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9)
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # 8 degrees of freedom, p = 0.001


def test_a_sample_is_a_function_of_its_own_draws(model):
    uniform = torch.rand(5, 4, dtype=torch.float64)
    condition = model.encode(None, class_labels=[0, 1, 0, 1, 0])
    together = model.sample(uniform, condition)
    assert torch.equal(model.sample(uniform[3:4], condition.index([3])), together[3:4])
    model.network.train()
    assert torch.equal(model.sample(uniform, condition), together) and model.network.training
    assert model.sample(torch.full((1, 4), 1 - 1e-16, dtype=torch.float64), condition.index([0])).max() <= 2


@pytest.mark.parametrize("labels", [[], [2], [-1]])
def test_labels_out_of_range(labels, model):
    with pytest.raises(ValueError, match="accepted are 0 to 1"):
        model.encode(None, class_labels=labels)


def test_a_token_that_is_not_guided_costs_one_branch(model):
    """From ``guidance_end`` on the law is the conditional one, and the cache that of the conditional branch."""
    uniform = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    condition = model.encode(None, class_labels=[0, 1]).repeat(3)
    some = model.sample(uniform, condition, TokenSampling(2.0, guidance_end=2))
    assert model.calls == 2 * 2 + 2
    whole = model.sample(uniform, condition, TokenSampling(2.0))
    assert torch.equal(some[:, :2], whole[:, :2])
    model.network.eval()
    logits = model.network(some[:, :-1], condition["class_labels"])[:, 2:].double()
    for i, token in enumerate(some[:, 2:].unbind(1)):
        assert torch.equal(TokenSampling().draw(logits[:, i], uniform[:, 2 + i, None])[:, 0], token)


@pytest.mark.parametrize("w", [1.0, 1.75])
def test_the_cache_changes_no_token_and_no_logit(w):
    """Each token again from one full pass over those before it, in float64."""
    torch.manual_seed(0)
    network = GPT(vocab_size=11, sample_size=4, num_classes=3, hidden_size=32, num_layers=3, num_heads=2).double()
    nn.init.normal_(network.out.weight, std=1.0)
    model = Autoregressive(network.eval())
    uniform = torch.rand(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    condition = model.encode(None, class_labels=[0, 1, 2, 0, 1])
    sampling = TokenSampling(w, temperature=0.9, top_k=7, top_p=0.95)
    tokens = model.sample(uniform, condition, sampling)
    with torch.no_grad():
        c = network(tokens[:, :-1], condition["class_labels"])
        u = network(tokens[:, :-1], condition.null()["class_labels"])
        logits = u + w * (c - u)
        again = torch.cat([sampling.draw(logits[:, i], uniform[:, i, None]) for i in range(16)], 1)
        assert torch.equal(again, tokens)
        cache: list = []
        steps = [network(tokens[:, :0], condition["class_labels"], cache)]
        for i in range(15):
            steps.append(network(tokens[:, i : i + 1], None, cache))
    assert (torch.cat(steps, 1) - c).abs().max() < 1e-12


@pytest.mark.slow
def test_a_markov_chain_is_learned():
    """Four tokens, each hanging on the last: the trained model's transitions are within 0.02 of the true ones, in total
    variation, and guided samples follow the guided law of theirs, by chi-squared."""
    torch.manual_seed(0)
    chains = torch.tensor(
        [
            [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]],
            [[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3], [0.3, 0.4, 0.1, 0.2], [0.2, 0.3, 0.4, 0.1]],
        ]
    )

    def walks(labels):
        steps = [torch.randint(4, labels.shape)]
        for _ in range(8):
            steps.append(torch.multinomial(chains[labels, steps[-1]], 1)[:, 0])
        return torch.stack(steps, 1)

    network = GPT(vocab_size=4, sample_size=3, num_classes=2, hidden_size=32, num_layers=2, num_heads=2, dropout=0.0)
    model = Autoregressive(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=1500)
    for _ in range(1500):
        labels = torch.randint(2, (128,))
        condition = Condition({"class_labels": torch.where(torch.rand(128) < 0.1, 2, labels)})
        loss = -model.log_probabilities(walks(labels), condition).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    for label in (0, 1):
        tokens = walks(torch.full((500,), label))
        with torch.no_grad():
            p = network(tokens[:, :-1], torch.full((500,), label))[:, 1:].softmax(-1)
        true = chains[label, tokens[:, :-1]]
        assert (p - true).abs().sum(-1).mean() / 2 < 0.02
    uniform = torch.rand(6000, 9, dtype=torch.float64)
    condition = model.encode(None, class_labels=[0]).repeat(6000)
    with torch.no_grad():
        tokens = model.sample(uniform, condition, TokenSampling(2.0))
        c, u = (
            network(tokens[:, :1], y).double()[:, 1]
            for y in (condition["class_labels"], condition.null()["class_labels"])
        )
    law = (u + 2 * (c - u)).softmax(-1)
    counts = torch.zeros(4, dtype=torch.float64).index_add_(0, tokens[:, 1], torch.ones(6000, dtype=torch.float64))
    expected = law.sum(0)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, p = 0.001
