"""Policies, reward models and tokenizers: any that transformers loads, of a folder or of the hub.

Weights come from safetensors alone and no code of a repository is run. What was loaded is recorded
as a `Source`, whose `resolved` names the exact content, so that a result says what it was made of.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors, snapshot_download
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from lib.lm.unchanged import kept_while_unchanged

logging.disable_progress_bar()  # one for every model loaded would bury the runs' own
# On recent GPUs PyTorch prefers cuDNN's attention, which plans anew, for half a second, at every
# length that a batch has not had before; the others do not.
torch.backends.cuda.enable_cudnn_sdp(False)

# model type -> name of its class
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SCORING = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
                   "added_tokens.json", "chat_template*", "*.model")  # fmt: skip
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors",
               "model*.safetensors.index.json")  # fmt: skip
FILES = MODEL_FILES + TOKENIZER_FILES
HUB_HELP = (
    "Give a local file or folder, or fill the cache while online (load it once, or "
    "`hf download NAME`) and name the same revision again"
)


class LoadError(ValueError):
    """Something that cannot be loaded as it was asked for; the parent of those below."""


class SourceError(LoadError):
    """The folder or name is not one that a model or tokenizer can come from."""


class HubError(LoadError, RuntimeError):
    """The hub does not have it, or cannot be reached and the cache does not have it."""


class WeightsError(LoadError):
    """No safetensors weights, damaged ones, or ones that do not fill the model."""


class ModelTypeError(LoadError):
    """A model type that transformers does not know, or one of another kind."""


class TokenizerError(LoadError):
    """A tokenizer without EOS, or one that does not fit the model."""


@dataclass(frozen=True)
class Source:
    """Where something came from; recorded with every result.

    Args:
        name: the hub's name, or the path as given.
        revision: the revision that was asked for (branch, tag, commit), None for the newest.
        resolved: the commit for a hub name, "sha256:..." of the content otherwise.
    """

    name: str
    revision: str | None
    resolved: str


@dataclass(frozen=True)
class TokenIds:
    """Token ids that sampling and training need.

    Args:
        eos: ids that end a response, the tokenizer's own (the one that is appended) first.
        pad: fills rows of unequal length and means nothing: it may equal an EOS, so masks come
            from lengths and never from comparing tokens with it.
    """

    eos: tuple[int, ...]
    pad: int


def folder_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """"sha256:..." over names and contents of the files that match, hidden ones left out."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {file_digest(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@kept_while_unchanged("path", maxsize=64)
def file_digest(path: Path) -> str:
    """"sha256:..." of a file, as sha256sum prints it."""
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def looks_like_path(name: str) -> bool:
    """Whether `name` can only mean a path: hub names are `name` or `owner/name`."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


@contextmanager
def hub_answers(name: str, revision: str | None) -> Iterator[None]:
    """What the hub answers about `name`, in words. Raises: HubError, SourceError."""
    try:
        yield
    except errors.HFValidationError as error:
        raise SourceError(f"{name!r} is neither here nor a name of the hub: {error}") from None
    except errors.GatedRepoError:
        raise HubError(f"{name!r} is gated: accept its terms on the hub, then log in "
                       "(`hf auth login`)") from None  # fmt: skip
    except errors.RevisionNotFoundError:
        raise HubError(f"{name!r} has no revision {revision!r}: give a branch, tag or commit of it,"
                       " or None for the newest") from None  # fmt: skip
    except errors.RepositoryNotFoundError:
        raise HubError(f"{name!r} is not here, and the hub has no such name (or it is private: "
                       "`hf auth login`)") from None  # fmt: skip


def unreachable(name: str, revision: str | None, error: BaseException) -> HubError:
    """The error for something that the hub may have but that cannot be fetched."""
    at = "" if revision is None else f" at revision {revision!r}"
    return HubError(f"{name!r} is not here, and the hub's {name!r}{at} can neither be fetched nor "
                    f"found in the cache. {HUB_HELP}. ({brief(error)})")  # fmt: skip


def hub_folder(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The hub's files of `name` that match, as a folder of the cache named by their commit.

    Raises: HubError, SourceError.
    """
    with hub_answers(name, revision):
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
        except (errors.HFValidationError, errors.RepositoryNotFoundError,
                errors.RevisionNotFoundError):  # fmt: skip
            raise
        except Exception as error:  # offline, by whichever network library there is
            raise unreachable(name, revision, error) from error


def resolve(
    source: str | Path, revision: str | None = None, patterns: tuple[str, ...] = FILES
) -> tuple[Path, Source]:
    """The folder of `source` (for a hub name, in the cache) and what it resolves to.

    Raises: SourceError for a missing folder, a file, or a revision of a folder; HubError.
    """
    name, folder = str(source), Path(source).expanduser()
    if name and folder.is_dir():
        if revision is not None:
            raise SourceError(f"revision {revision!r} was given for the folder {name!r}: only names"
                              " of the hub have revisions")  # fmt: skip
        return folder, Source(name, None, folder_digest(folder, FILES))
    if name and folder.exists():
        raise SourceError(f"{name!r} is a file: give the folder that holds it")
    if not name or looks_like_path(name):
        raise SourceError(f"there is no folder {name!r}: give a folder in the hub's format, "
                          "or a name of the hub (owner/name)")  # fmt: skip
    cached = hub_folder(name, revision, patterns)
    return cached, Source(name, revision, cached.name)


def load_tokenizer(
    source: str | Path, revision: str | None = None, *, eos: str | None = None
) -> tuple[PreTrainedTokenizerBase, Source]:
    """The tokenizer of a folder or hub name.

    Args:
        eos: the token that ends a response, for a tokenizer that names none or another one.
    Raises: TokenizerError if there is none or no EOS; SourceError; HubError.
    """
    folder, origin = resolve(source, revision, ("config.json", *TOKENIZER_FILES))
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise TokenizerError(f"{origin.name!r} holds no tokenizer: save one there "
                             "(tokenizer.save_pretrained), or name its own source")  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its reader does
        raise TokenizerError(
            f"the tokenizer of {origin.name!r} cannot be loaded: {brief(error)}"
        ) from error
    _set_eos(tokenizer, eos, origin.name)
    return tokenizer, origin


def load_policy(
    source: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, Source]:
    """A causal language model in evaluation mode.

    Args:
        dtype: one of `DTYPES`.
    Raises: the kinds of `LoadError`; among them ModelTypeError for another kind of model, such as a
        reward model, whose language-model head would be random numbers.
    """
    return _load(AutoModelForCausalLM, "causal language model", source, revision, dtype, device)


def load_reward_model(
    source: str | Path,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    new_head: bool = False,
) -> tuple[PreTrainedModel, Source]:
    """A model with one score per sequence, in evaluation mode.

    Args:
        new_head: start from a language model, with a random score head to be trained.
    Raises: the kinds of `LoadError`; among them ModelTypeError for a language model unless
        `new_head`, since its scores would be random numbers.
    """
    auto = AutoModelForSequenceClassification
    return _load(auto, "reward model", source, revision, dtype, device, new_head, num_labels=1)


def stored_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenIds:
    """`ids` of a stored language model whose weights are not read.

    Raises: as `ids`; SourceError, ModelTypeError.
    """
    _check_config(folder, str(folder), AutoModelForCausalLM, "causal language model", False)
    config = stored_config(folder)
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig.from_model_config(config)
    return _ids(tokenizer, generation, config.get_text_config().vocab_size)


def ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TokenIds:
    """EOS and pad ids of a tokenizer and its model, which are checked to fit together.

    EOS: the tokenizer's, then those of the model's generation config. No pad: EOS is used.
    Raises: TokenizerError for no EOS, an EOS that is an ordinary token, or a tokenizer with an
        entry beyond the embedding's rows, but for added ones that its chat template does not write.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    return _ids(tokenizer, getattr(model, "generation_config", None), rows)


def _ids(
    tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None, rows: int
) -> TokenIds:
    """See `ids`. rows: of the embedding."""
    _set_eos(tokenizer, None, tokenizer.name_or_path)
    generation = getattr(config, "eos_token_id", None)
    more = generation if isinstance(generation, (list, tuple)) else [generation]
    eos = dict.fromkeys([tokenizer.eos_token_id, *(i for i in more if i is not None)])
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Gemma 3's text models have no row for the token of images, which their template never writes
    template, given = str(tokenizer.chat_template), {*eos, pad, tokenizer.bos_token_id}
    idle = {i for i, token in tokenizer.added_tokens_decoder.items() if str(token) not in template}
    idle = idle - given if tokenizer.chat_template else set()  # else a prompt may be anything
    largest = max({*tokenizer.get_vocab().values(), *eos, pad} - idle)
    if largest >= rows:
        raise TokenizerError(
            f"the tokenizer has token id {largest}, the model's embedding only {rows} rows: give "
            "the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)), "
            "train the new rows and save both"
        )
    special = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    for token in eos:
        if token not in special:
            raise TokenizerError(
                f"the model's generation config ends responses at token {token}, which is the "
                f"ordinary token {tokenizer.convert_ids_to_tokens(token)!r}: set "
                f"eos_token_id in generation_config.json ({tokenizer.eos_token_id} is the "
                "tokenizer's), or give the model's own tokenizer"
            )
    return TokenIds(tuple(eos), pad)


def _set_eos(tokenizer: PreTrainedTokenizerBase, eos: str | None, name: str) -> None:
    """Names `eos` as the tokenizer's EOS. Raises: TokenizerError if there is then none."""
    if eos is not None:
        if eos not in tokenizer.get_vocab():
            raise TokenizerError(f"eos={eos!r} is no token of {name!r}: give one of its special "
                                 f"tokens {_special(tokenizer)}")  # fmt: skip
        tokenizer.eos_token = eos
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer of {name!r} has no EOS: a response could not end. Name it with --eos "
            f"(in Python: load_tokenizer(..., eos=TOKEN)), one of its special tokens "
            f"{_special(tokenizer)}"
        )


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values()]


def _load(
    auto: Any,
    kind: str,
    source: str | Path,
    revision: str | None,
    dtype: str,
    device: str,
    new_head: bool = False,
    **more: Any,
) -> tuple[PreTrainedModel, Source]:
    """A model of `kind` by its auto class; everything that can be checked is checked first."""
    if dtype not in DTYPES:
        raise LoadError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}")
    place = _device(device)
    folder, origin = resolve(source, revision)
    _check_config(folder, origin.name, auto, kind, new_head)
    _check_weights(folder, origin.name)
    try:
        model, info = auto.from_pretrained(
            folder, dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **more,
        )  # fmt: skip
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"the weights of {origin.name!r} do not load as a {kind}: {brief(error)}. They must be"
            " safetensors files that fit config.json (one that is cut off, or a git-lfs pointer "
            "in its place, must be fetched again)"
        ) from error
    if info["missing_keys"] and not new_head:
        raise WeightsError(f"{origin.name!r} lacks weights of a {kind}, which would be random: "
                           f"{sorted(info['missing_keys'])[:5]}")  # fmt: skip
    return model.to(place).eval(), origin


def stored_config(folder: Path) -> PreTrainedConfig:
    """A stored model's configuration, without its weights."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def positions(config: PreTrainedConfig) -> float:
    """The most tokens of a prompt and its response together that a model was made for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def _device(name: str) -> torch.device:
    """Raises: LoadError for a device that torch does not know or that is not here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"device {name!r} cannot be used here: {brief(error)}; "
                        "'cpu' always can") from None  # fmt: skip
    return torch.device(name)


def _check_config(folder: Path, name: str, auto: Any, kind: str, new_head: bool) -> None:
    """Raises: SourceError for no config, ModelTypeError for an unknown type or another kind."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it holds an adapter alone: merge it (peft: merge_and_unload) and save the model" \
            if adapter else "save the model there with model.save_pretrained"  # fmt: skip
        raise SourceError(f"{name!r} has no config.json: {hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept, kind_of = config.get("architectures") or [], config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise SourceError(f"config.json of {name!r} cannot be read: {brief(error)}") from None
    if kind_of not in CONFIG_MAPPING:
        raise ModelTypeError(
            f"{name!r} is of model type {kind_of!r}, which this version of transformers does not "
            "know; code that comes with a model is never run: give a model of a type it knows"
        )
    policy = auto is AutoModelForCausalLM
    if kind_of not in (CAUSAL if policy else SCORING):
        raise ModelTypeError(f"{name!r} is of model type {kind_of!r}, of which there is no {kind}")
    allowed = {*(CAUSAL if policy or new_head else {}).values()}
    allowed |= {*({} if policy else SCORING).values()}
    if kept and not allowed & set(kept):
        hint = "" if policy else "; new_head=True starts one from a language model"
        raise ModelTypeError(f"{name!r} is a {', '.join(kept)}, not a {kind}{hint}")


def _check_weights(folder: Path, name: str) -> None:
    """Raises: WeightsError without model*.safetensors, saying how to convert pickled weights."""
    if any(folder.glob("model*.safetensors")):
        return
    others = sorted(f.name for p in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(p))
    raise WeightsError(
        f"{name!r} has no model*.safetensors{f', only {others[:3]}' if others else ''}. Pickled "
        "weights (.bin, .pt) can run code and are not read: if you trust them, load them once with "
        "transformers and call model.save_pretrained(folder), which writes safetensors"
    )


def brief(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
