"""Real inference servers for the `servers` lane and the benchmarks, each in a process of its own, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import plait
from plait.models.serving import write_served

_LLAMA_SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx = int(sys.argv[2]), int(sys.argv[3])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.warmup, params.endpoint_metrics, params.verbosity = False, True, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
"""llama.cpp's own HTTP server, which the wheel of the embedded engine carries."""


VLLM_PYTHON = os.environ.get("PLAIT_VLLM_PYTHON")
"""The interpreter of an environment with vLLM, which has a torch and a transformers of its own."""

SGLANG_PYTHON = os.environ.get("PLAIT_SGLANG_PYTHON")
"""The interpreter of an environment with SGLang, whose kernels are not needed."""


def served_gguf(folder: Path, model: str) -> Path:
    """The weights of a model that ships, with a vocabulary beside them, which llama-server needs."""
    weights = folder / f"{model}.gguf"
    return weights if weights.exists() else write_served(plait.load_model(model), weights)


@contextmanager
def llama_server(
    weights: Path, *, slots: int = 4, context: int = 2048, threads: int = 1
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve a GGUF file that has a vocabulary; the address, and the process to kill."""
    args = [sys.executable, "-c", _LLAMA_SERVER, str(weights), str(slots), str(slots * context), str(threads)]
    process = subprocess.Popen(
        args,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with _ending(process):
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), f"llama-server did not start: {url!r}"
        yield url, process


@contextmanager
def vllm_server(
    weights: Path, *, native: bool = False, dtype: str = "float32", seqs: int = 16, context: int = 2048, kv_gib: int = 1
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve a folder of transformers weights with vLLM's CPU build, which takes a minute to start.

    Args:
        native: With the route that takes and returns token ids alone.
    """
    assert VLLM_PYTHON is not None
    port = _free_port()
    settings = ["--max-model-len", str(context), "--max-num-seqs", str(seqs), "--dtype", dtype, "--enforce-eager"]
    caching = ["--enable-prefix-caching", "--block-size", "32", "--enable-prompt-tokens-details"]
    where = ["--host", "127.0.0.1", "--port", str(port), *(["--enable-scale-out"] if native else [])]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "PATH": os.pathsep.join((str(Path(VLLM_PYTHON).parent), os.environ.get("PATH", ""))),
    }
    args = [VLLM_PYTHON, "-m", "vllm.entrypoints.cli.main", "serve", str(weights), *where, *settings, *caching]
    with _serving("vllm", args, environment, port) as served:
        yield served


@contextmanager
def sglang_server(weights: Path, *, seqs: int = 16, context: int = 2048) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve a folder of transformers weights with SGLang without its kernels (`sglang_cpu`); half a minute to start."""
    assert SGLANG_PYTHON is not None
    port = _free_port()
    settings = {
        "model-path": weights,
        "host": "127.0.0.1",
        "port": port,
        "context-length": context,
        "max-running-requests": seqs,
        "max-total-tokens": seqs * context,
        "dtype": "float32",
        "device": "cpu",
        "attention-backend": "torch_native",
        "sampling-backend": "pytorch",
        "grammar-backend": "none",
        "cuda-graph-backend-decode": "disabled",
        "cuda-graph-backend-prefill": "disabled",
    }
    flags = ["disable-overlap-schedule", "skip-tokenizer-init", "sleep-on-idle", "enable-metrics"]
    flags.append("enable-deterministic-inference")
    given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    args = [SGLANG_PYTHON, "-P", str(Path(__file__).with_name("sglang_cpu.py")), *given, *(f"--{n}" for n in flags)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
    }
    environment.pop("PYTHONPATH", None)
    with _serving("sglang", args, environment, port) as served:
        yield served


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def _serving(
    name: str, args: list[str], environment: dict[str, str], port: int
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            args, stdout=output, stderr=output, text=True, env=environment, start_new_session=True
        )
        with _ending(process):
            _wait_for(name, f"http://127.0.0.1:{port}", process, output)
            yield f"http://127.0.0.1:{port}", process


@contextmanager
def _ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a server and the processes that it started."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _wait_for(name: str, url: str, process: subprocess.Popen[str], output: IO[str], seconds: float = 600.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            output.seek(0)
            raise AssertionError(f"{name} ended with {process.returncode} before it was ready: {output.read()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(1)
    raise AssertionError(f"{name} was not ready after {seconds:.0f} s")
