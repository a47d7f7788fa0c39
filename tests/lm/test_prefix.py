"""Prompts that begin alike: read once, and scored as if each had been read whole."""

from __future__ import annotations

import pytest
import torch

from lib.lm.batches import padded
from lib.lm.gold import as_rollout
from lib.lm.models import load_policy
from lib.lm.network import Network
from lib.lm.policy import Scorer
from lib.lm.prefix import Prefixed, shared_prefix
from tests.tiny_lm import save_tiny_policy


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1, 2, 3, 4], [1, 2, 5]], [1, 2]),
        ([[1, 2, 3], [1, 2, 3]], [1, 2]),  # a token is left to each
        ([[1, 2], [1]], []),
        ([[1, 2], [2, 1]], []),
        ([[7, 8, 9]], [7, 8]),
    ],
)
def test_shared_prefix(prompts, shared):
    assert shared_prefix(prompts) == shared


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = save_tiny_policy(tmp_path_factory.mktemp("policy"), initializer_range=0.3)
    return Network(load_policy(folder)[0])


PREFIX = [5, 9, 2, 77]
HEADS = [[3, 4, 6], [8], [1, 2]]  # padded on the left: padding stands inside, after the prefix
BODIES = [[10, 11], [12, 13, 14, 15], [16]]


@pytest.mark.parametrize("budget", [None, 1, 8])
@pytest.mark.parametrize("prefix", [PREFIX, []])
def test_scores_are_those_of_whole_rows(network, prefix, budget):
    def scores(network, heads):
        batch = as_rollout(heads, *padded(BODIES, 0), 0, "cpu")
        return Scorer(network, (0,), 0, budget).score(batch)

    whole = scores(network, [prefix + head for head in HEADS])
    split = Prefixed(network, prefix)
    torch.testing.assert_close(scores(split, HEADS), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores(split, HEADS), whole, rtol=0, atol=1e-5)  # nothing was added


def test_a_cache_of_the_callers_is_refused(network):
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="whole rows"):
        Prefixed(network, PREFIX).hidden(tokens, tokens > 0, positions=tokens)
