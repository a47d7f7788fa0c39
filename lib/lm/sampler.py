"""A policy that answers many prompts once: as many at a time as fit, and kept as they are drawn."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lib.lm.batches import padded, unpadded
from lib.lm.decode import Samples
from lib.lm.models import TokenIds
from lib.lm.network import Network
from lib.lm.policy import Scorer

ROOM = 4 * 2**30  # bytes of keys and values at once on a CPU; on a GPU half of what is free


class Sampler(Scorer):
    """A policy that draws as many completions at once as there is room for keys and values.

    Random numbers are those of the whole batch: what is drawn depends on the pieces as little as on
    a batch.
    Args: tokens: of prompt and response together, at most. options: dtype, decoder.
    """

    def __init__(
        self, model: Any, found: TokenIds, tokens: int, options: argparse.Namespace,
        temperature: float = 1.0,
    ):  # fmt: skip
        network = Network(model, temperature, dtype=options.dtype)
        # a compiled step would have to be made for each size of a batch, and each is drawn once
        super().__init__(network, found.eos, found.pad, decoder=options.decoder or "growing")
        # rotary positions leave keys in float32 where the cache does not cast them
        size = 4 if options.dtype == "float32" or self.decoder == "growing" else 2
        fits = room(network.device) // (size * tokens * keys_and_values(model.config))
        self.rows = 1 << max(0, int(fits).bit_length() - 1)  # a power of 2: few shapes to compile

    def sample(self, prompts: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> Samples:
        """See `Scorer.sample`."""
        count = len(uniforms) // len(prompts)
        piece = max(1, self.rows // count)
        inputs = (prompts.split(piece), prompt_mask.split(piece), uniforms.split(piece * count))
        parts = [Scorer.sample(self, *x) for x in zip(*inputs, strict=True)]
        cat = (torch.cat([getattr(p, name) for p in parts])
               for name in ("completions", "mask", "logp"))  # fmt: skip
        return Samples(*cat, None, torch.stack([p.scale for p in parts]).amax())


class KeptSamples:
    """The completions of a sampler, each batch in a file once it is drawn: what is asked for again,
    also by a later process, is read there. A batch is known by all that it depends on.

    Args: file: of JSON lines, made at the first batch. policy: what names the sampler's content.
        bar: counts completions, once each.
    """

    def __init__(self, sampler: Sampler, file: Path, policy: str, bar: tqdm):
        self.sampler, self.file, self.bar = sampler, file, bar
        self.network, self.eos, self.pad = sampler.network, sampler.eos, sampler.pad
        how = (self.network.temperature, self.network.dtype, sampler.decoder, self.eos.tolist())
        self.about = f"{policy} {how}"
        self.rows: dict[str, list[list[int]]] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            with suppress(json.JSONDecodeError):  # half a line, of a process that was killed
                self.rows |= json.loads(line)
        self.counted: set[str] = set()

    def sample(self, prompts: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> Samples:
        """See `Scorer.sample`; without log-probabilities.

        Raises: OSError that names the file if it cannot be written; what it has stays.
        """
        key = sha256(self.about.encode())
        for tensor in (prompts, prompt_mask, uniforms):
            key.update(str(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
        if (name := key.hexdigest()) not in self.rows:
            drawn = self.sampler.sample(prompts, prompt_mask, uniforms)
            self.rows[name] = unpadded(drawn.completions, drawn.mask)
            self._append({name: self.rows[name]})
        if name not in self.counted:
            self.counted.add(name)
            self.bar.update(len(uniforms))
        ids, mask = padded(self.rows[name], self.pad, "right", str(self.network.device))
        return Samples(ids, mask, torch.zeros(mask.shape), None, torch.zeros(()))

    def _append(self, batch: dict[str, list[list[int]]]) -> None:
        """A new line before each batch: it ends the half one that a killed process left."""
        try:
            with self.file.open("a") as file:
                file.write("\n" + json.dumps(batch, separators=(",", ":")))
        except OSError as error:
            raise OSError(f"{self.file} cannot be written: {error.strerror or error}") from None


def room(device: torch.device) -> int:
    """Bytes that keys and values may take at once."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else ROOM


def keys_and_values(config: Any) -> int:
    """Numbers of keys and values per token of a transformers configuration."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = size * (getattr(config, "num_key_value_heads", None) or heads)
    return 2 * config.num_hidden_layers * keys
