"""Loading policies, reward models and tokenizers: what is accepted, recorded and refused."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from lib.lm import models
from lib.lm.models import (
    HubError,
    LoadError,
    ModelTypeError,
    Source,
    SourceError,
    TokenizerError,
    WeightsError,
)
from tests.tiny_lm import (
    EOS,
    PAD,
    SIZE,
    TEMPLATE,
    TURN,
    save_tiny_policy,
    save_tiny_reward_model,
    tiny_config,
    tiny_tokenizer,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    return save_tiny_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def copy(policy, tmp_path) -> Path:
    """A folder of its own that a test may damage."""
    return Path(shutil.copytree(policy, tmp_path / "copy"))


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """The hub switched off, and an empty cache, which is returned."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def edit(folder: Path, file: str, **fields) -> None:
    """Sets fields of a JSON file; None takes one out."""
    content = json.loads((folder / file).read_text()) | fields
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / file).write_text(json.dumps(kept))


def put_in_cache(cache: Path, name: str, folder: Path, commit: str = COMMIT) -> None:
    """What the hub's client leaves in its cache after a download."""
    stored = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)


def test_policy_of_a_folder(policy):
    model, source = models.load_policy(policy)
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert not model.training and model.dtype == torch.float32
    assert source == Source(str(policy), None, source.resolved)
    assert len(source.resolved) == len("sha256:") + 64
    weights = load_file(policy / "model.safetensors")
    assert torch.equal(weights["gpt_neox.embed_in.weight"], model.get_input_embeddings().weight)
    assert torch.equal(weights["embed_out.weight"], model.get_output_embeddings().weight)


def test_reward_model_gives_one_score(reward_model):
    model, _ = models.load_reward_model(reward_model)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 1)


def test_dtype_and_sharded_weights(policy, tmp_path):
    model, _ = models.load_policy(policy, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again, _ = models.load_policy(tmp_path / "shards", dtype="bfloat16")
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_tied_embeddings_lack_nothing(tmp_path):
    folder = save_tiny_policy(tmp_path, tie_word_embeddings=True)
    model, _ = models.load_policy(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_resolved_follows_the_content_alone(policy, copy):
    before = models.load_policy(policy)[1].resolved
    (copy / "notes.md").write_text("not part of the model")
    assert models.load_policy(copy)[1].resolved == before
    assert models.load_tokenizer(copy)[1].resolved == before
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert models.load_policy(copy)[1].resolved != before


@pytest.mark.parametrize("source", ["./none", "/none/at/all", "~/none-at-all", "a/b/c", "", "a b"])
@pytest.mark.parametrize("load", [models.load_policy, models.load_reward_model,
                                  models.load_tokenizer])  # fmt: skip
def test_missing_folder(source, load):
    with pytest.raises(SourceError) as raised:
        load(source)
    assert repr(source) in str(raised.value)


def test_a_file_is_not_a_folder(policy):
    with pytest.raises(SourceError, match="is a file: give the folder"):
        models.load_policy(policy / "config.json")


def test_a_folder_has_no_revision(policy):
    with pytest.raises(SourceError, match="'v1' was given for the folder"):
        models.load_policy(policy, "v1")


def test_folder_without_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(SourceError, match="no config.json: save the model"):
        models.load_policy(copy)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="adapter alone: merge it"):
        models.load_policy(copy)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_damaged_config(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(SourceError, match="config.json of .* cannot be read"):
        models.load_policy(copy)


def test_pickled_weights_are_not_read(copy):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"only \['pytorch_model.bin'\].*save_pretrained"):
        models.load_policy(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match=r"has no model\*.safetensors"):
        models.load_policy(copy)


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_cut_off_weights(copy, keep):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(WeightsError, match="cut off"):
        models.load_policy(copy)


def test_git_lfs_pointer_in_place_of_weights(copy):
    pointer = "version git-lfs/spec/v1\noid sha256:0\nsize 9\n"
    (copy / "model.safetensors").write_text(pointer)
    with pytest.raises(WeightsError, match="git-lfs pointer"):
        models.load_policy(copy)


def test_weights_of_another_size(copy):
    edit(copy, "config.json", hidden_size=32)
    with pytest.raises(WeightsError, match="do not load as a causal language model"):
        models.load_policy(copy)


def test_weights_that_lack_the_head(copy):
    weights = load_file(copy / "model.safetensors")
    head = [name for name in weights if "embed_out" in name or "lm_head" in name]
    save_file({n: v for n, v in weights.items() if n not in head}, copy / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(WeightsError, match=r"would be random: \['lm_head.weight'\]"):
        models.load_policy(copy)


@pytest.mark.parametrize("kind", ["no_such_type", None])
def test_unknown_model_type(copy, kind):
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(copy, "config.json", model_type=kind, auto_map=code)
    (copy / "evil.py").write_text("raise SystemExit('code of the repository was run')")
    with pytest.raises(ModelTypeError, match=f"{kind!r}, which this version .* never run"):
        models.load_policy(copy)


def test_code_of_a_known_type_is_not_run(copy):
    edit(copy, "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    edit(copy, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (copy / "evil.py").write_text("raise SystemExit('code of the repository was run')")
    assert type(models.load_policy(copy)[0]).__module__.startswith("transformers.")
    assert type(models.load_tokenizer(copy)[0]).__module__.startswith("transformers.")


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "T5Model", "GPTNeoXModel"])
def test_not_a_causal_model(copy, kind):
    edit(copy, "config.json", architectures=[kind])
    with pytest.raises(ModelTypeError, match=f"is a {kind}, not a causal language model"):
        models.load_policy(copy)


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_a_type_without_causal_model(copy, kind):
    edit(copy, "config.json", model_type=kind, architectures=None)
    with pytest.raises(ModelTypeError, match=f"{kind!r}, of which there is no causal"):
        models.load_policy(copy)


def test_reward_model_is_no_policy_and_the_other_way_round(policy, reward_model):
    with pytest.raises(ModelTypeError, match="SequenceClassification, not a causal"):
        models.load_policy(reward_model)
    with pytest.raises(ModelTypeError, match="not a reward model; new_head=True"):
        models.load_reward_model(policy)
    model, _ = models.load_reward_model(policy, new_head=True)
    assert model.config.num_labels == 1
    body = load_file(policy / "model.safetensors")["gpt_neox.embed_in.weight"]
    assert torch.equal(model.get_input_embeddings().weight, body)


def test_classifier_of_two_classes_is_no_reward_model(tmp_path):
    config = tiny_config(num_labels=2)
    transformers.GPTNeoXForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="do not load as a reward model"):
        models.load_reward_model(tmp_path)


@pytest.mark.parametrize("generation", [{"eos_token_id": [256, 258]}, {}, None])
def test_special_tokens_of_a_stored_model_are_those_of_the_loaded_one(tmp_path, generation):
    folder = save_tiny_policy(tmp_path)
    file = folder / "generation_config.json"
    if generation is None:
        file.unlink()
    else:
        file.write_text(json.dumps(generation))
    tokenizer, _ = models.load_tokenizer(folder)
    expected = models.ids(tokenizer, models.load_policy(folder)[0])
    (folder / "model.safetensors").unlink()
    assert models.stored_ids(tokenizer, folder) == expected
    assert expected.eos == ((256, 258) if generation else (256,))


def test_a_stored_model_too_small_for_its_tokenizer_is_refused(tmp_path):
    folder = save_tiny_policy(tmp_path, vocab=258, eos_token_id=256)
    with pytest.raises(models.TokenizerError, match="token id 258, the model's embedding only 258"):
        models.stored_ids(tiny_tokenizer(template=TEMPLATE), folder)
    with pytest.raises(ModelTypeError, match="is a GPTNeoXForSequenceClassification"):
        models.stored_ids(tiny_tokenizer(), save_tiny_reward_model(tmp_path / "reward"))


def test_bad_dtype_and_device(policy):
    with pytest.raises(LoadError, match=r"'float8'|\('float32', 'bfloat16', 'float16'\)"):
        models.load_policy(policy, dtype="float8")
    with pytest.raises(LoadError, match="device 'abacus' cannot be used"):
        models.load_policy(policy, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(LoadError, match="device 'cuda' cannot be used"):
            models.load_policy(policy, device="cuda")


def test_tokenizer_missing_or_damaged(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        models.load_tokenizer(copy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        models.load_tokenizer(copy)


def test_tokenizer_without_eos(tmp_path):
    tiny_tokenizer(eos=None).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="has no EOS.*eos=TOKEN.*'<eos>'"):
        models.load_tokenizer(tmp_path)
    tokenizer, _ = models.load_tokenizer(tmp_path, eos=EOS)
    assert tokenizer.eos_token_id == 256
    with pytest.raises(TokenizerError, match="eos='</s>' is no token"):
        models.load_tokenizer(tmp_path, eos="</s>")
    assert len(tokenizer) == 259  # naming one adds no entry


def test_ids(policy):
    model, _ = models.load_policy(policy)
    assert models.ids(tiny_tokenizer(), model) == models.TokenIds((256,), 257)
    assert models.ids(tiny_tokenizer(pad=None), model) == models.TokenIds((256,), 256)
    assert models.ids(tiny_tokenizer(pad=EOS), model) == models.TokenIds((256,), 256)
    with pytest.raises(TokenizerError, match="no EOS"):
        models.ids(tiny_tokenizer(eos=None), model)


def test_ids_of_a_reward_model(reward_model):
    assert models.ids(tiny_tokenizer(), models.load_reward_model(reward_model)[0]).eos == (256,)


@pytest.mark.parametrize(
    ("given", "eos"), [([258, 256], (256, 258)), ([258], (256, 258)), (None, (256,)), (256, (256,))]
)
def test_several_eos_ids(copy, given, eos):
    edit(copy, "generation_config.json", eos_token_id=given)
    edit(copy, "config.json", eos_token_id=None)
    model, _ = models.load_policy(copy)
    model.generation_config.eos_token_id = given
    assert models.ids(tiny_tokenizer(), model).eos == eos


def test_several_eos_ids_of_the_generation_config_are_read(copy):
    edit(copy, "generation_config.json", eos_token_id=[258, 256])
    assert models.ids(tiny_tokenizer(), models.load_policy(copy)[0]).eos == (256, 258)


def test_ordinary_token_as_eos(copy):
    edit(copy, "generation_config.json", eos_token_id=[0, 256])
    model, _ = models.load_policy(copy)
    with pytest.raises(TokenizerError, match="at token 0, which is the ordinary token '!'"):
        models.ids(tiny_tokenizer(), model)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    model, _ = models.load_policy(save_tiny_policy(tmp_path, vocab=258, eos_token_id=256))
    with pytest.raises(TokenizerError, match="token id 258, the model's embedding only 258 rows"):
        models.ids(tiny_tokenizer(template=TEMPLATE), model)  # which writes token 258
    with pytest.raises(TokenizerError, match="token id 258, the model's embedding only 258 rows"):
        models.ids(tiny_tokenizer(eos=TURN), model)
    with pytest.raises(TokenizerError, match="token id 258, the model's embedding only 258 rows"):
        models.ids(tiny_tokenizer(), model)  # a prompt may hold it
    other = tiny_tokenizer(template=TEMPLATE.replace("<turn>", "|"))
    assert models.ids(other, model).eos == (256,)  # as Gemma 3's token for images
    assert SIZE > 259  # rows to spare, as real models have, are no error


def test_chat_template_comes_along(tmp_path):
    save_tiny_policy(tmp_path, tokenizer=tiny_tokenizer(template=TEMPLATE, side="left"))
    tokenizer, _ = models.load_tokenizer(tmp_path)
    assert (tokenizer.chat_template, tokenizer.pad_token) == (TEMPLATE, PAD)


def test_hub_offline_without_cache(offline):
    for load in (models.load_policy, models.load_reward_model, models.load_tokenizer):
        with pytest.raises(HubError, match="'owner/none' can neither.*local file or folder.*cache"):
            load("owner/none")
    assert issubclass(HubError, RuntimeError) and issubclass(HubError, ValueError)


def test_hub_offline_from_the_cache(offline, policy):
    put_in_cache(offline, "owner/tiny", policy)
    model, source = models.load_policy("owner/tiny")
    assert source == Source("owner/tiny", None, COMMIT)
    assert models.load_policy("owner/tiny", "main")[1] == Source("owner/tiny", "main", COMMIT)
    assert models.load_policy("owner/tiny", COMMIT)[1].resolved == COMMIT
    tokenizer, source = models.load_tokenizer("owner/tiny")
    assert source.resolved == COMMIT and models.ids(tokenizer, model).eos == (256,)
    with pytest.raises(HubError, match="at revision|'v9'"):
        models.load_policy("owner/tiny", "v9")


def test_hub_has_pickled_weights_alone(offline, copy):
    (copy / "model.safetensors").unlink()
    put_in_cache(offline, "owner/old", copy)
    with pytest.raises(WeightsError, match="'owner/old' has no model"):
        models.load_policy("owner/old")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GatedRepoError, "is gated"),
        (RevisionNotFoundError, "has no revision 'v9'"),
        (RepositoryNotFoundError, "the hub has no such name"),
        (ConnectionError, "can neither be fetched"),
        (TimeoutError, "can neither be fetched"),
    ],
)
def test_answers_of_the_hub(monkeypatch, error, says):
    def refuse(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(models, "snapshot_download", refuse)
    with pytest.raises(HubError, match=says) as raised:
        models.load_policy("owner/tiny", "v9")
    assert "owner/tiny" in str(raised.value)


def test_only_needed_files_are_fetched(monkeypatch, policy):
    asked = {}

    def fetch(name, *, revision, allow_patterns):
        asked[name] = allow_patterns
        return str(policy)

    monkeypatch.setattr(models, "snapshot_download", fetch)
    models.load_tokenizer("owner/tokenizer")
    models.load_policy("owner/policy")
    assert not any("safetensors" in pattern for pattern in asked["owner/tokenizer"])
    matched = huggingface_hub.utils.filter_repo_objects(
        ["pytorch_model.bin", "consolidated.safetensors", "modeling.py", "model.safetensors"],
        allow_patterns=asked["owner/policy"],
    )
    assert list(matched) == ["model.safetensors"]
