"""How much of its codebook a tokenizer uses over a whole set. arXiv 2509.10140."""

from typing import Any

from genkit.eval.metrics.base import FeatureSet, Metric


class CodeUsageMetric(Metric):
    """``code_usage``, the share of the codes that occur in the set's tokens, and ``code_perplexity``, ``exp`` of the
    entropy of the tokens, K if all codes occur equally often; higher is better.

    Beside them ``code_usage_expected``, ``1 - (1 - 1/K)^N``: what even uniform tokens would use, N of them. Full usage
    is not uniform usage, and a set of few tokens cannot use many codes.

    Raises:
        ValueError: a set that is no reconstruction by a tokenizer (``reconstructed:FOLDER``).

    Source: Chang et al., "Scalable training for vector-quantized networks with 100% codebook utilization", arXiv
    2509.10140, section 4.
    """

    by_default = False
    reads_reference = ()
    reads_generated = ("images", "model")
    better = {"code_usage": "higher", "code_perplexity": "higher", "code_usage_expected": None}

    def check(self, reference: Any, generated: Any) -> None:
        generated.model.check_codes()

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert generated.model is not None
        codes = generated.model.count_codes()
        return {
            "code_usage": codes.usage,
            "code_usage_expected": codes.expected,
            "code_perplexity": codes.perplexity,
        }
