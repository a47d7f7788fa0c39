"""Log-probabilities against transformers, micro-batches against the whole, state against itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconH1Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
)

from lib.footprint import stored
from lib.lm import network as network_module
from lib.lm import policy as policy_module
from lib.lm.batches import padded
from lib.lm.network import Network
from lib.lm.pairs import Pairs
from lib.lm.policy import CausalPolicy, Rows, Scorer
from lib.lm.reward import RewardModel, tiny_reward_model, train
from lib.methods import METHODS
from lib.rollouts import Rollout
from tests.tiny_lm import (
    SIZE,
    save_tiny_policy,
    save_tiny_reward_model,
    tiny_config,
    tiny_tokenizer,
)

EOS, PAD = 256, 257
SMALL = {"vocab_size": SIZE, "hidden_size": 16}
PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90], [5, 256, 7, 8], [1, 2], [9, 9, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), initializer_range=0.3)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def rollout(pad=PAD, count=3, side="left", seed=0):
    """Completions of 1 to 12 tokens; some end in EOS, others were capped."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(len(PROMPTS) * count):
        n = int(torch.randint(1, 12, (1,), generator=generator))
        rows.append(torch.randint(0, 250, (n,), generator=generator).tolist() + [EOS] * (i % 2))
    ids, mask = padded(rows, pad, "right")
    prompts, prompt_mask = padded(PROMPTS, pad, side)
    shape = (len(PROMPTS), count, ids.shape[1])
    return Rollout(
        prompts=prompts, prompt_mask=prompt_mask, completions=ids.view(shape),
        mask=mask.view(shape), logp=torch.zeros(shape), ref=None,
        rewards=torch.rand(shape[:2], generator=generator), scale=torch.tensor(20.0),
    )  # fmt: skip


def rows_of(batch):
    """(prompt, completion) token lists of every completion."""
    for i in range(batch.groups):
        prompt = batch.prompts[i][batch.prompt_mask[i]].tolist()
        for j in range(batch.mask.shape[1]):
            yield prompt, batch.completions[i, j][batch.mask[i, j]].tolist()


def test_sequence_scores_are_transformers_own_loss(model):
    """Its loss is the mean negative log-probability of the labelled tokens."""
    batch = rollout()
    scores = Scorer(Network(model), (EOS,), PAD).score(batch)
    assert (scores[~batch.mask] == 0).all()
    for (prompt, completion), score in zip(rows_of(batch), scores.flatten(0, 1), strict=True):
        tokens = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        loss = model(input_ids=tokens, labels=labels).loss
        assert -score.sum().item() / len(completion) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_scores_at_a_temperature_are_those_of_the_scaled_logits(model, temperature):
    batch = rollout()
    scores = Scorer(Network(model, temperature), (EOS,), PAD).score(batch).flatten(0, 1)
    for (prompt, completion), score in zip(rows_of(batch), scores, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        logp = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logp.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(score[: len(completion)], expected, atol=1e-5, rtol=1e-5)


def test_scores_do_not_move_with_buckets_padding_or_neighbours(model):
    batch, network = rollout(), Network(model)
    scores = Scorer(network, (EOS,), PAD).score(batch)
    torch.testing.assert_close(Scorer(network, (EOS,), PAD, budget=1).score(batch), scores)
    same = rollout(pad=EOS)
    torch.testing.assert_close(Scorer(network, (EOS,), EOS).score(same), scores)
    alone = Scorer(network, (EOS,), PAD).score(batch.narrow(2, 1))
    torch.testing.assert_close(alone, scores[2:3], atol=1e-5, rtol=1e-5)


def test_prompts_that_are_padded_on_the_right_are_refused(model):
    """Their completions would follow padding: other tokens, other log-probabilities."""
    batch, scorer = rollout(side="right"), Scorer(Network(model), (EOS,), PAD)
    with pytest.raises(ValueError, match="padded on the left"):
        scorer.score(batch)
    with pytest.raises(ValueError, match="padded on the left"):
        scorer.sample(batch.prompts, batch.prompt_mask, torch.rand(len(PROMPTS), 3))


def test_no_more_logits_are_held_than_the_budget(model, monkeypatch):
    """Scored and learned from in chunks, each computed again in the backward pass."""
    batch, network = rollout(), Network(model)
    budget, held, softmax = 8 * network.vocabulary, [], torch.Tensor.log_softmax
    monkeypatch.setattr(network_module, "LOGIT_BUDGET", budget)
    monkeypatch.setattr(torch.Tensor, "log_softmax",
                        lambda x, dim: held.append(x.numel()) or softmax(x, dim))  # fmt: skip
    policy, method = CausalPolicy(network, (EOS,), PAD, 1e-3), METHODS["rwr"]
    scored = policy.score(batch)
    batch = batch.labelled(method.prepare(batch, method.hyper))
    logp, _ = policy.update(batch, method, method.hyper, method.items(batch))
    torch.testing.assert_close(logp, scored, atol=1e-5, rtol=1e-5)
    assert len(held) > 6 and max(held) == budget


def test_reward_scores_do_not_move_with_buckets_padding_or_neighbours(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_reward_model(tmp_path))
    batch, reward = rollout(), RewardModel(model)
    scores = reward.score(batch)
    torch.testing.assert_close(RewardModel(model, budget=1).score(batch), scores)
    torch.testing.assert_close(reward.score(rollout(pad=EOS)), scores)
    torch.testing.assert_close(reward.score(rollout(side="right")), scores)
    torch.testing.assert_close(reward.score(batch.narrow(1, 1)), scores[1:2])
    # without padding transformers finds the last token itself
    prompt, completion = next(rows_of(batch))
    plain = model(input_ids=torch.tensor([prompt + completion])).logits[0, 0]
    torch.testing.assert_close(scores[0, 0], plain)


def test_reward_scores_keep_no_keys_and_values(tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_reward_model(tmp_path))
    forward, caches = type(model.base_model).forward, []

    def watched(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        caches.append(out.past_key_values)
        return out

    monkeypatch.setattr(type(model.base_model), "forward", watched)
    RewardModel(model).score(rollout())
    assert caches and set(caches) == {None}


def test_a_reward_model_trains_with_checkpoints_on_a_gpu_alone(tmp_path, monkeypatch):
    import trl

    class Asked(Exception):
        pass

    def trainer(model, args, **_):
        raise Asked(args.gradient_checkpointing)

    monkeypatch.setattr(trl, "RewardTrainer", trainer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    pairs = Pairs([[1, 2]], [[3, 4]], [[5]], (EOS,))
    model, tokenizer = tiny_reward_model(264, 64, PAD), tiny_tokenizer()
    for device, expected in (("cpu", False), ("cuda", True)):
        splits = {split: pairs for split in ("train", "validation")}
        preferred = {split: np.array([[1, 0]]) for split in splits}
        with pytest.raises(Asked, match=str(expected)):
            train(model, tokenizer, splits, preferred, tmp_path, device=device)


def test_a_language_model_is_no_reward_model(model):
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM is no reward model"):
        RewardModel(model)


def test_a_model_that_does_more_to_its_logits_is_refused(model, monkeypatch):
    forward = type(model).forward

    def capped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = torch.tanh(out.logits) * 2
        return out

    monkeypatch.setattr(type(model), "forward", capped)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM does more to its logits"):
        Network(model)


@pytest.mark.parametrize("config", [
    Mamba2Config(num_hidden_layers=1, num_heads=4, head_dim=8, **SMALL),
    FalconH1Config(num_hidden_layers=1, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                   num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, **SMALL),
    Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"],
               num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, **SMALL),
], ids=lambda config: config.model_type)  # fmt: skip
def test_a_model_with_states_of_its_own_is_refused(config):
    with pytest.raises(ValueError, match="ForCausalLM has layers with a state of their own"):
        Network(AutoModelForCausalLM.from_config(config))


def test_chunks_give_the_same_log_probabilities_and_gradients(model, monkeypatch):
    network = Network(model)
    hidden = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    targets, results = torch.arange(20), []
    for budget in (2**26, 264 * 6):
        monkeypatch.setattr(network_module, "LOGIT_BUDGET", budget)
        leaf = hidden.clone().requires_grad_()
        logp = network.logp(leaf, targets)
        (logp * torch.arange(20)).sum().backward()
        results.append((logp.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_head_is_cast_once_for_all_chunks(model, monkeypatch, dtype):
    """And so are its gradients: near those of one chunk."""
    hidden = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    casts, results, head = [], [], model.get_output_embeddings().weight
    to = torch.Tensor.to

    def counted(self, *args, **kwargs):
        casts.append(self is head)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    for budget in (2**26, 264 * 6):
        monkeypatch.setattr(network_module, "LOGIT_BUDGET", budget)
        leaf, head.grad = hidden.clone().requires_grad_(), None
        logp = Network(model, dtype=dtype).logp(leaf, torch.arange(20))
        (logp * torch.arange(20)).sum().backward()
        results.append((logp.detach(), leaf.grad, head.grad))
    assert sum(casts) == 2
    torch.testing.assert_close(results[0][:2], results[1][:2])
    assert (results[0][2] - results[1][2]).norm() < 0.02 * results[0][2].norm() > 0


def prepared(policy, method, batch):
    logp = policy.score(batch)
    # A reference of its own: equal ones give margins of 0, whose signs rounding decides.
    away = torch.linspace(-0.5, 0.5, logp.numel()).view_as(logp) * batch.mask
    batch = replace(batch, logp=logp, ref=logp + away)
    if "value_head" in method.needs:
        batch = replace(batch, values=torch.zeros_like(batch.logp))
    return batch.labelled(method.prepare(batch, method.hyper))


def updated(folder, method, budget=8192, steps=2, batch=None, **options):
    torch.manual_seed(0)
    network = Network(AutoModelForCausalLM.from_pretrained(folder),
                      value_head="value_head" in method.needs, **options)  # fmt: skip
    if network.value is not None:  # at zero no gradient of it would reach the shared layers
        torch.nn.init.normal_(network.value.weight, generator=torch.Generator().manual_seed(1))
    policy = CausalPolicy(network, (EOS,), PAD, 1e-2, budget=budget)
    data = prepared(policy, method, rollout() if batch is None else batch)
    results = [policy.update(data, method, method.hyper, method.items(data)) for _ in range(steps)]
    return policy, data, results


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_nothing(folder, name):
    whole, _, seen = updated(folder, METHODS[name], steps=1)
    parts, _, same = updated(folder, METHODS[name], steps=1, budget=1)
    (logp, metrics), (logp1, metrics1) = seen[0], same[0]
    torch.testing.assert_close(logp, logp1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics, metrics1, atol=1e-5, rtol=1e-4)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_one_step_is_torch_adam_on_the_mean_loss_of_all_completions(folder, name):
    """Skipping completions without loss, and the split of head and states, change no gradient."""
    method = METHODS[name]
    policy, data, results = updated(folder, method, steps=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.zeros_(head.bias)
    logp, values = torch.zeros_like(data.logp), torch.zeros_like(data.logp)
    for k, (prompt, completion) in enumerate(rows_of(data)):
        out = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
        before = slice(len(prompt) - 1, -1)
        scored = out.logits[0].log_softmax(-1)[before]
        own = scored.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        i, j = divmod(k, data.mask.shape[1])
        at = (torch.tensor(i), torch.tensor(j), torch.arange(len(own)))
        logp = logp.index_put(at, own)
        values = values.index_put(at, head(out.hidden_states[-1][0, before])[:, 0])
    items = method.items(data)
    loss = method.loss(data, logp, method.hyper)[0].sum() / items
    assert results[0][1]["loss"].item() == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    trained = list(model.parameters())
    if method.critic is not None:
        loss = loss + method.critic(data, values, method.hyper).sum() / items
        trained += head.parameters()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.testing.assert_close(results[0][1]["grad_norm"], norm, atol=1e-5, rtol=1e-3)
    torch.optim.Adam(trained, lr=1e-2).step()
    expected = torch.cat([p.flatten() for p in trained])
    got = torch.cat([p.detach().flatten() for p in policy.parameters])
    # Adam's first step is the gradient's sign where it is not tiny
    assert ((got - expected).abs() < 1e-4).float().mean() > 0.98


def test_tokens_that_carry_no_loss_do_not_pass_through_the_network(folder, monkeypatch):
    method, seen = METHODS["best_of_n"], []
    hidden = Network.hidden
    policy, data, _ = updated(folder, method, steps=0)

    def counted(self, tokens, mask, cache=None):
        seen.append(len(tokens))
        return hidden(self, tokens, mask, cache)

    monkeypatch.setattr(Network, "hidden", counted)
    policy.update(data, method, method.hyper, method.items(data))
    assert sum(seen) == len(PROMPTS)  # one of three completions each


@pytest.mark.parametrize("name", ["dpo", "ipo", "rwr", "ppo_token"])
def test_prompts_read_once_change_no_gradient_and_pass_fewer_tokens(folder, name):
    """Even where completions of a prompt differ in length, and prompts do."""
    method, read = METHODS[name], {}
    for once in (False, True):
        policy, data, _ = updated(folder, method, steps=0)
        policy.network.continues = once
        seen = []
        embedding = policy.network.model.get_input_embeddings()
        handle = embedding.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        logp, metrics = policy.update(data, method, method.hyper, method.items(data))
        handle.remove()
        gradients = [p.grad for p in policy.parameters]
        read[once] = (logp, metrics, gradients, sum(x.numel() for x in seen))
    torch.testing.assert_close(read[True][:3], read[False][:3], atol=1e-6, rtol=1e-5)
    width = data.prompts.shape[1]
    assert read[False][3] - read[True][3] == 2 * len(PROMPTS) * width


def test_scores_are_the_same_where_prompts_are_read_once(model):
    batch = rollout(count=4)
    batch = replace(batch, mask=torch.ones_like(batch.mask))  # as long: they stand together
    scorer = Scorer(Network(model), (EOS,), PAD)
    assert scorer.network.continues
    once = scorer.score(batch)
    scorer.network.continues = False
    torch.testing.assert_close(once, scorer.score(batch), atol=1e-5, rtol=1e-5)


SMALL = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "continues"),
    [
        (LlamaConfig(**SMALL, num_key_value_heads=1), True),
        (GPT2Config(vocab_size=264, n_embd=16, n_layer=2, n_head=2), True),
        (OPTConfig(vocab_size=264, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32,
                   num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64), True),
        (BloomConfig(vocab_size=264, hidden_size=16, n_layer=2, n_head=2), True),
        (MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=8), False),
    ],
    ids=lambda x: x.model_type if isinstance(x, PreTrainedConfig) else str(x),
)  # fmt: skip
def test_prompts_are_read_once_by_models_whose_caches_allow_it(config, continues):
    """Rotary, learned and linear (ALiBi) positions; not by layers with a window."""
    torch.manual_seed(0)
    network = Network(AutoModelForCausalLM.from_config(config))
    assert network.continues is continues
    batch, scorer = rollout(count=4), Scorer(network, (EOS,), PAD)
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    scores = scorer.score(batch)
    network.continues = False
    torch.testing.assert_close(scores, scorer.score(batch), atol=1e-5, rtol=1e-4)


def test_a_model_that_continues_otherwise_reads_whole_rows(model, monkeypatch):
    continued = Network.continued
    monkeypatch.setattr(Network, "continued", lambda self, *x: continued(self, *x) + 1.0)
    assert not Network(model).continues
    monkeypatch.undo()
    assert Network(model).continues and not Network(model, checkpointing=True).continues


def test_whether_a_model_continues_is_tried_in_float32(model, monkeypatch):
    """As far as its weights allow: what 16 bits round off is no sign of another answer."""
    tried, continued = [], Network.continued
    monkeypatch.setattr(
        Network, "continued", lambda self, *x: tried.append(self.dtype) or continued(self, *x)
    )
    network = Network(model, dtype="bfloat16")
    assert network.continues and network.dtype == "bfloat16"
    model.get_input_embeddings().to(torch.bfloat16)
    assert Network(model, dtype="bfloat16").dtype == "bfloat16"
    assert tried == ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pairs_that_are_all_tied_leave_the_policy_as_it_is(folder, dtype):
    method = METHODS["dpo"]
    batch = replace(rollout(), rewards=torch.ones(len(PROMPTS), 3))
    policy, _, results = updated(folder, method, batch=batch, steps=1, dtype=dtype)
    for (_, p), q in zip(AutoModelForCausalLM.from_pretrained(folder).named_parameters(),
                         policy.parameters, strict=True):  # fmt: skip
        assert torch.equal(p, q)
    assert results[0][1]["loss"] == 0 and policy.alive


def test_a_step_that_is_not_finite_is_not_taken_and_none_after_it(folder):
    method = METHODS["reinforce"]
    policy, data, _ = updated(folder, method, steps=1)
    before = [p.clone() for p in policy.parameters]
    bad = data.labelled({"advantage": torch.full_like(data.rewards, torch.inf)})
    policy.update(bad, method, method.hyper, method.items(bad))
    assert not policy.alive
    policy.update(data, method, method.hyper, method.items(data))
    assert all(map(torch.equal, before, policy.parameters))
    assert not policy.alive


@pytest.mark.parametrize("name", ["dpo", "ppo_token"])
@pytest.mark.parametrize("budget", [8192, 1])
def test_checkpointing_changes_no_gradient(folder, name, budget):
    """Layers run twice in an update, and once where no gradient is wanted."""
    plain, _, expected = updated(folder, METHODS[name], budget, steps=1)
    policy, data, results = updated(folder, METHODS[name], budget, steps=1, checkpointing=True)
    for p, q in zip(plain.parameters, policy.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(expected[0][0], results[0][0], atol=1e-6, rtol=1e-6)
    method, plain.network.continues = METHODS[name], False
    once, twice = (
        calls(p.network, lambda p=p: p.update(data, method, method.hyper, method.items(data)))
        for p in (plain, policy)
    )
    assert twice == 2 * once > 0
    scored = [calls(p.network, lambda p=p: p.score(data)) for p in (plain, policy)]
    assert scored[0] == scored[1] > 0


def calls(network, what):
    """How often `what` runs the first layer's MLP."""
    seen = []
    layer = network.model.gpt_neox.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(1))
    what()
    handle.remove()
    return len(seen)


def test_checkpointing_turns_no_dropout_on(folder):
    """Nothing of a model is in training mode, its layers neither."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, hidden_dropout=0.5, attention_dropout=0.5)
    network = Network(model, checkpointing=True)
    tokens = torch.arange(12).view(2, 6)
    one, two = (network.hidden(tokens, tokens >= 0) for _ in range(2))
    assert one.requires_grad and torch.equal(one, two)
    assert not any(m.training for m in model.modules())


def test_checkpointing_turns_no_dropout_on_that_a_layer_applies_itself():
    """OPT's layers read their own mode, and its decoder drops layers in training."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=264, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32,
                       num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512,
                       dropout=0.5, attention_dropout=0.5, layerdrop=0.5)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    tokens, found = torch.arange(12).view(2, 6), []
    for checkpointing in (False, True):
        network = Network(model, checkpointing=checkpointing)
        hidden = network.hidden(tokens, tokens >= 0)
        found.append((hidden, *torch.autograd.grad(hidden.square().sum(), network.parameters())))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    assert stored(network) < stored(Network(model))


def test_checkpointing_keeps_less(folder):
    deep = [AutoModelForCausalLM.from_config(tiny_config(layers=8)) for _ in range(2)]
    kept = [stored(Network(m, checkpointing=c)) for m, c in zip(deep, (False, True), strict=True)]
    assert kept[1] < 0.3 * kept[0]


def test_a_model_without_layers_to_checkpoint_is_refused(model, monkeypatch):
    monkeypatch.setattr(network_module, "GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM has no layers that transformers can"):
        Network(model, checkpointing=True)


def test_state_is_saved_and_put_back(folder):
    method = METHODS["ppo_token"]
    policy, data, _ = updated(folder, method, steps=2)
    saved = {k: v.clone() for k, v in policy.state().items()}
    (after, _) = policy.update(data, method, method.hyper, method.items(data))
    final = [p.clone() for p in policy.parameters]
    other, _, _ = updated(folder, method, steps=0)
    other.load_state(saved)
    (again, _) = other.update(data, method, method.hyper, method.items(data))
    assert torch.equal(after, again)
    assert all(map(torch.equal, final, other.parameters))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_in_16_bits_keep_float32_weights_and_are_near(folder, dtype):
    policy, data, results = updated(folder, METHODS["dpo"], dtype=dtype)
    exact, _, expected = updated(folder, METHODS["dpo"])
    assert {p.dtype for p in policy.parameters} == {torch.float32}
    difference = (results[0][0] - expected[0][0]).abs().max()
    assert 0 < difference < policy.tolerance * 20
    norm, other = (found[0][1]["grad_norm"].item() for found in (results, expected))
    assert norm == pytest.approx(other, rel=0.05)


def test_in_16_bits_the_mean_of_recomputed_log_probabilities_is_held_closer(folder):
    """Off by a tenth of a nat a token: less than one token may be, and too much for all."""
    method = METHODS["best_of_n"]
    policy, data, _ = updated(folder, method, steps=0, dtype="bfloat16")
    how = method, method.hyper, method.items(data)
    off = replace(data, logp=data.logp + 0.1 * data.mask)
    assert 0.1 < policy.tolerance * (1 + data.scale)
    with pytest.raises(AssertionError, match="best_of_n: identity 'recomputed' is off by 0.1"):
        policy.frozen().update(off, *how)
    policy.frozen().update(data, *how)
    policy.update(off, *how)  # learned since: nothing to compare
    exact, _, _ = updated(folder, method, steps=0)
    exact.frozen().update(off, *how)  # `lib.finetune` holds float32 to 1e-4


def test_float16_has_the_gradients_of_a_loss_too_small_for_it(folder, monkeypatch):
    """A millionth of the loss; without its scale most of the gradient would be 0."""
    small = replace(METHODS["reinforce"])
    loss = small.loss
    object.__setattr__(small, "loss", lambda *args: (1e-6 * loss(*args)[0], {}))
    exact, _, _ = updated(folder, small, steps=1)
    scaled, _, _ = updated(folder, small, steps=1, dtype="float16")
    monkeypatch.setattr(policy_module, "LOSS_SCALE", 1.0)
    bare, _, _ = updated(folder, small, steps=1, dtype="float16")

    def off(policy):
        pairs = zip(policy.parameters, exact.parameters, strict=True)
        return torch.cat([(p.grad - q.grad).flatten() for p, q in pairs]).norm()

    size = torch.cat([p.grad.flatten() for p in exact.parameters]).norm()
    assert off(scaled) < 0.05 * size and off(bare) > 0.2 * size


def test_in_float16_a_step_that_overflows_is_left_out_and_the_next_is_taken(folder):
    method = METHODS["reinforce"]
    policy, data, _ = updated(folder, method, steps=1, dtype="float16")
    before, scale = [p.detach().clone() for p in policy.parameters], policy.loss_scale
    bad = data.labelled({"advantage": torch.full_like(data.rewards, torch.inf)})
    policy.update(bad, method, method.hyper, method.items(bad))
    assert policy.alive and policy.loss_scale == scale / 2
    assert all(map(torch.equal, before, policy.parameters))
    saved = policy.state()
    policy.update(data, method, method.hyper, method.items(data))
    assert not all(map(torch.equal, before, policy.parameters))
    other, _, _ = updated(folder, method, steps=0, dtype="float16")
    other.load_state(saved)
    assert other.loss_scale == scale / 2
    policy.loss_scale = torch.tensor(1.0)
    policy.update(bad, method, method.hyper, method.items(bad))
    assert not policy.alive


# --- what the host knows of a batch ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "ppo_token", "best_of_n"])
def test_a_minibatch_of_a_planned_sampling_is_learned_as_one_of_its_own(folder, name):
    method, found = METHODS[name], []
    for planned in (False, True):
        policy, data, _ = updated(folder, method, budget=64, steps=0)
        batch = (policy.planned(data, method) if planned else data).narrow(1, 3)
        found.append(policy.update(batch, method, method.hyper, method.items(batch)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["dpo", "pref_ft"])
def test_micro_batches_hold_the_budget_and_are_no_smaller_than_they_must_be(folder, name):
    policy, data, _ = updated(folder, METHODS[name], budget=64, steps=0)
    batch = policy.planned(data, METHODS[name])
    active, pieces = batch.host["active"], policy._micro_batches(batch)
    longest = (batch.host["completion"] * active).max(-1) + batch.host["prompt"]
    assert sorted(np.concatenate(pieces)) == np.flatnonzero(active.any(-1)).tolist()
    for i, piece in enumerate(pieces):
        tokens = longest[piece[0]] * active.sum(-1).max()
        assert len(piece) == 1 or len(piece) * tokens <= 64
        assert i + 1 == len(pieces) or (len(piece) + 1) * tokens > 64


def test_micro_batches_are_cut_by_what_is_active():
    host = {"prompt": np.array([2, 2, 2]), "completion": np.array([[3, 9], [3, 3], [5, 1]]),
            "active": np.array([[True, False], [True, True], [True, False]])}  # fmt: skip
    found = CausalPolicy._micro_batches(SimpleNamespace(budget=20), SimpleNamespace(host=host))
    assert [x.tolist() for x in found] == [[2], [0, 1]]


def test_buckets_are_by_length_of_prompt_and_completion():
    rows = SimpleNamespace(prompt_sizes=np.array([1, 8]), of=np.array([0, 1]),
                           sizes=np.array([5, 2]))  # fmt: skip
    assert [x.tolist() for x in Rows.buckets(rows, 10)] == [[1], [0]]


def test_picked_rows_keep_no_column_that_is_padding_in_all():
    rows = Rows.of_rollout(rollout())
    for index in (np.array([0]), np.array([4, 1]), np.arange(6, 9)):
        part = rows.pick(index)
        assert part.prompt_mask[:, 0].any() and part.mask[:, -1].any()
        assert (part.prompt_sizes == part.prompt_mask.sum(-1).numpy()).all()
        assert (part.sizes == part.mask.sum(-1).numpy()).all()


def test_equal_lengths_keep_their_order():
    found = policy_module._falling(np.arange(300) // 100).tolist()
    assert found == [*range(200, 300), *range(100, 200), *range(100)]


def test_divergences_stand_at_their_own_tokens(model):
    one = Scorer(Network(model), (EOS,), PAD, 40)
    other = Scorer(Network(model, 2.0), (EOS,), PAD)
    batch = rollout()
    whole = one.divergences(batch, other)
    for group in range(batch.groups):
        alone = one.divergences(batch.pick(np.array([group])), other)
        for x, y in zip(whole, alone, strict=True):
            torch.testing.assert_close(x[group], y[0])
            assert ((x[group] != 0) <= batch.mask[group]).all()
