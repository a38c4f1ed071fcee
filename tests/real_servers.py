"""Real inference servers for the `servers` lane, each in a process of its own, on loopback, with the embedded model."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import plait
from plait.models.serving import write_served

_LLAMA_SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx = int(sys.argv[2]), int(sys.argv[3])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.warmup, params.endpoint_metrics, params.verbosity = False, True, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
"""llama.cpp's own HTTP server, which the wheel of the embedded engine carries."""


@contextmanager
def llama_server(
    folder: Path, *, model: str = "plait-tiny-sequential", slots: int = 4, context: int = 2048
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve a model that ships, with a vocabulary; its address, and the process to kill."""
    weights = folder / f"{model}.gguf"
    if not weights.exists():
        write_served(plait.load_model(model), weights)
    args = [sys.executable, "-c", _LLAMA_SERVER, str(weights), str(slots), str(slots * context)]
    process = subprocess.Popen(
        args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    with _ending(process):
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), f"llama-server did not start: {url!r}"
        yield url, process


@contextmanager
def vllm_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve a folder of transformers weights with the vLLM that is installed (its CPU build needs minutes to start)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shutil.which("vllm")
    assert command is not None
    settings = ["--max-model-len", "2048", "--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager"]
    caching = ["--enable-prefix-caching", "--block-size", "32", "--enable-prompt-tokens-details"]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    args = [command, "serve", str(folder), *where, *settings, *caching]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=environment)
    with _ending(process):
        _wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}", process


@contextmanager
def _ending(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _wait_for(url: str, process: subprocess.Popen[str], seconds: float = 600.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, f"vllm ended with {process.returncode} before it was ready"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(1)
    raise AssertionError(f"vllm was not ready after {seconds:.0f} s")
