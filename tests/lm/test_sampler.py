"""Many prompts answered: in pieces that fit, and in batches that are kept."""

from types import SimpleNamespace

import pytest
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from lib.lm import pairs, sampler
from lib.lm.models import TokenIds
from lib.lm.network import Network
from lib.lm.policy import Scorer
from lib.lm.sampler import KeptSamples, Sampler
from tests.tiny_lm import save_tiny_policy


@pytest.mark.parametrize("decoder", ["growing", "static"])
def test_pieces_that_fit_draw_what_the_whole_batch_does(tmp_path, monkeypatch, decoder):
    folder = save_tiny_policy(tmp_path / "sft", initializer_range=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[i % 250 + 1] * (1 + i % 5) for i in range(11)]
    whole = pairs.sample_pairs(Scorer(Network(model), (256,), 257), prompts, 12)
    options = SimpleNamespace(dtype="float32", decoder=decoder)
    row = 4 * 17 * 2 * 16  # float32 keys and values of one layer of width 16: 5 + 12 tokens
    seen, sample = [], Scorer.sample
    monkeypatch.setattr(Scorer, "sample", lambda self, *x: seen.append(len(x[2])) or
                        sample(self, *x))  # fmt: skip
    for room, rows, sizes in ((7 * row, 4, [4] * 5 + [2]), (1, 1, [1] * 22), (99 * row, 64, [22])):
        monkeypatch.setattr(sampler, "ROOM", room)
        pieces = Sampler(model, TokenIds((256,), 257), 17, options)
        assert pieces.rows == rows
        seen.clear()
        again = pairs.sample_pairs(pieces, prompts, 12)
        assert seen == sizes
        assert (again.first, again.second) == (whole.first, whole.second)


PROMPTS = [[i % 250 + 1] * (1 + i % 5) for i in range(11)]


@pytest.fixture
def policy(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "BATCH", 4)
    folder = save_tiny_policy(tmp_path / "sft", initializer_range=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = SimpleNamespace(dtype="float32", decoder=None)
    return Sampler(model, TokenIds((256,), 257), 17, options)


def kept(policy, file, about="p"):
    return KeptSamples(policy, file, about, tqdm(total=22))


@pytest.mark.parametrize("cut", [0, 40])
def test_a_second_start_draws_what_the_first_did_not(policy, tmp_path, monkeypatch, cut):
    """Killed in the third of three batches, with or without half of the second one's line: the
    pairs are those of a start that nobody killed, and what is whole is not drawn again."""
    whole = pairs.sample_pairs(policy, PROMPTS, 12)
    seen, sample, file = [], Sampler.sample, tmp_path / "batches"

    def killed(self, *x):
        seen.append(len(x[2]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return sample(self, *x)

    monkeypatch.setattr(Sampler, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        pairs.sample_pairs(kept(policy, file), PROMPTS, 12)
    file.write_bytes(file.read_bytes()[: -cut or None])
    for drawn in ([8, 6] if cut else [6], []):
        seen[:] = [0] * 3
        again = kept(policy, file)
        found = pairs.sample_pairs(again, PROMPTS, 12)
        assert seen[3:] == drawn and again.bar.n == 22
        assert (found.first, found.second) == (whole.first, whole.second)


@pytest.mark.parametrize("changed", [
    {"about": "q"}, {"seed": 1}, {"max_tokens": 11}, {"prompts": PROMPTS[1:]},
])  # fmt: skip
def test_what_was_drawn_otherwise_is_not_taken(policy, tmp_path, changed):
    asked = {"about": "p", "seed": 0, "max_tokens": 12, "prompts": PROMPTS}
    for about, seed, max_tokens, prompts in (asked.values(), (asked | changed).values()):
        last = kept(policy, tmp_path / "batches", about)
        found = pairs.sample_pairs(last, prompts, max_tokens, seed)
    exact = pairs.sample_pairs(policy, prompts, max_tokens, seed)
    assert (found.first, found.second) == (exact.first, exact.second)
    assert len(last.rows) == 6  # three of each


def test_a_file_that_cannot_be_written_is_named(policy, tmp_path):
    with pytest.raises(OSError, match="nowhere/batches cannot be written: No such file"):
        pairs.sample_pairs(kept(policy, tmp_path / "nowhere" / "batches"), PROMPTS, 12)
