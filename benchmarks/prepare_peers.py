"""Write one checkpoint in the formats of the peers that `engine.py` measures.

    python benchmarks/prepare_peers.py MODEL PEERS --llama-bin DIR --peer-python PYTHON

MODEL is a checkpoint of this package; a .gguf file is taken for the Q4_K_M of the comparison. What
is in PEERS already is left alone; what cannot be made is named, and the rest is made. Getting the
peers, with the versions that were measured here:

llama.cpp, from the source package of llama-cpp-python, for the server is not in its wheels:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release \\
        -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_SERVER=ON
    cmake --build build --target llama-server llama-quantize     (DIR is build/bin)

onnxruntime-genai and openvino-genai, and what its model builder needs, in an environment of their
own, whose PYTHON that is:

    python -m venv peers
    peers/bin/pip install onnxruntime-genai==0.18.0 openvino-genai==2026.4.1.0 \\
        onnx onnx_ir transformers torch==2.13.0

OpenVINO's 8-bit weights are nncf's (per channel, asymmetric), which are faster than what
openvino-genai makes of Q8_0.gguf. optimum-intel wants an older transformers, so it has a third
environment, `--openvino-python`; without it a link to Q8_0.gguf is made:

    python -m venv export
    export/bin/pip install torch==2.13.0 "optimum-intel[openvino]" nncf openvino==2026.4.1
    export/bin/pip uninstall torchvision     (if it is not made for that torch)
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qwen2.common.progress import say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, a .gguf file or a hub name")
    parser.add_argument("peers", type=Path, help="the folder to write to")
    parser.add_argument("--llama-bin", type=Path, help="the folder of llama-quantize")
    parser.add_argument("--peer-python", help="a Python with onnxruntime-genai")
    parser.add_argument("--openvino-python", type=Path, help="a Python with optimum-intel")
    chosen = parser.parse_args()
    chosen.peers.mkdir(parents=True, exist_ok=True)
    Preparation(chosen).run()


class Preparation:
    """What is made, by name in the folder, in an order in which the later may need the earlier."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.peers = chosen, chosen.peers

    def run(self) -> None:
        """Make what is missing; exit with 1 if something could not be made."""
        makers: dict[str, Callable[[Path], None]] = {
            "hf": self.folder,
            "BF16.gguf": self.gguf,
            "Q8_0.gguf": self.quantised,
            "Q4_K_M.gguf": self.four_bits,
            "onnx-int8": self.onnx,
            "onnx-int4": self.onnx,
            "openvino-int8": self.openvino,
        }
        failed = []
        for name, make in makers.items():
            path = self.peers / name
            if path.exists():
                say(f"{name}: is there")
                continue
            say(f"{name} ...")
            try:
                make(path)
            except (OSError, subprocess.CalledProcessError) as error:
                failed.append(name)
                say(f"{name}: {error}")
                if path.is_dir():  # half a folder would pass for a whole one
                    shutil.rmtree(path)
        if failed:
            sys.exit(f"not made: {', '.join(failed)}")

    def folder(self, path: Path) -> None:
        """The model as transformers has it, which the other tools read."""
        qwen2("convert", self.chosen.model, path, "--dtype", "bf16")

    def gguf(self, path: Path) -> None:
        """llama.cpp's bf16."""
        qwen2("convert", self.chosen.model, path, "--dtype", "bf16")

    def quantised(self, path: Path) -> None:
        """Q8_0 and the like, by llama.cpp itself."""
        if self.chosen.llama_bin is None:
            raise OSError("give --llama-bin")
        tool = self.chosen.llama_bin / "llama-quantize"
        run(tool, self.peers / "BF16.gguf", path, path.stem)

    def four_bits(self, path: Path) -> None:
        """The model's own file, or what llama.cpp makes."""
        if Path(self.chosen.model).suffix == ".gguf":
            path.symlink_to(Path(self.chosen.model).resolve())
        else:
            self.quantised(path)

    def onnx(self, path: Path) -> None:
        """Blocks of 32 weights; activations in 8 bits (accuracy level 4), the builder's choice for
        the CPU and its fastest.
        """
        if self.chosen.peer_python is None:
            raise OSError("give --peer-python")
        run(
            self.chosen.peer_python, "-m", "onnxruntime_genai.models.builder",
            "--input", self.peers / "hf", "--output", path, "--cache_dir", self.peers / "cache",
            "--execution_provider", "cpu", "--precision", path.name.split("-")[1],
            "--extra_options", "hf_token=false", "prune_lm_head=true",
        )  # fmt: skip

    def openvino(self, path: Path) -> None:
        """Per-channel 8 bits by nncf."""
        if self.chosen.openvino_python is None:
            path.with_suffix(".gguf").symlink_to("Q8_0.gguf")
            return
        tool = self.chosen.openvino_python.with_name("optimum-cli")
        run(
            tool, "export", "openvino", "--model", self.peers / "hf",
            "--task", "text-generation-with-past", "--weight-format", "int8", path,
        )  # fmt: skip


def qwen2(*arguments: object) -> None:
    """A command of this package."""
    run(sys.executable, "-m", "qwen2.cli", *arguments)


def run(*command: object) -> None:
    """A command, whose output goes to stderr."""
    subprocess.run([str(word) for word in command], stdout=sys.stderr, check=True)


if __name__ == "__main__":
    main()
