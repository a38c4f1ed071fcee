"""llama.cpp by ctypes, out of the `xllamacpp` wheel: a model, a context, one decode a step. Knows nothing of calls.

The wheel's extension module exports llama.cpp's C API, which its authors do not promise to keep. So the version is
pinned, and the structs that cross the border by value are checked against the documented defaults before use.
"""

from __future__ import annotations

import ctypes as C
import importlib.metadata
import importlib.util
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.errors import EngineUnavailable, ModelError

VERSION = "2026.10.11549"
INSTALL = f"pip install xllamacpp=={VERSION}"
MAX_SEQS = 256
"""llama.cpp's own limit of sequences in a context."""

_i32, _u32, _bool, _f32, _ptr, _size = C.c_int32, C.c_uint32, C.c_bool, C.c_float, C.c_void_p, C.c_size_t
_ERROR_LEVEL = 4
_NO_VOCABULARY, _SENTENCEPIECE = 0, 1
_TRUTH, _SPACE_PREFIX = 2, "tokenizer.ggml.add_space_prefix"
_CONTROL, _USERS = 1 << 3, 1 << 4
_LONGEST_PIECE = 256
_LOG = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)


class _ModelParams(C.Structure):
    _fields_ = [
        *[(n, _ptr) for n in ("devices", "tensor_buft_overrides")],
        *[(n, _i32) for n in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")],
        *[(n, _ptr) for n in ("tensor_split", "progress_callback", "progress_data", "kv_overrides")],
        *[(n, _bool) for n in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")],
    ]


class _Override(C.Structure):
    """A key of a file's header, read as another value; here always a truth value."""

    _fields_ = [
        *[("kind", _i32), ("key", C.c_char * 128), ("unused", _i32)],
        *[("value", _bool), ("room", C.c_char * 127)],
    ]


class _ContextParams(C.Structure):
    _fields_ = [
        *[(n, _u32) for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")],
        *[(n, _u32) for n in ("n_outputs_max", "n_outputs_max_per_seq")],
        *[(n, _i32) for n in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type")],
        *[(n, _i32) for n in ("attention_type", "flash_attn_type")],
        *[(n, _f32) for n in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")],
        *[(n, _f32) for n in ("yarn_beta_fast", "yarn_beta_slow")],
        ("yarn_orig_ctx", _u32),
        ("defrag_thold", _f32),
        *[(n, _ptr) for n in ("cb_eval", "cb_eval_data")],
        *[(n, _i32) for n in ("type_k", "type_v")],
        ("moe_cache_size", _size),
        *[(n, _ptr) for n in ("abort_callback", "abort_data")],
        *[(n, _bool) for n in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")],
        ("samplers", _ptr),
        ("n_samplers", _size),
        ("ctx_other", _ptr),
    ]


class _Batch(C.Structure):
    _fields_ = [
        ("n_tokens", _i32),
        *[(n, _ptr) for n in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")],
    ]


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _ptr, _ptr),
    "llama_model_default_params": (_ModelParams,),
    "llama_context_default_params": (_ContextParams,),
    "llama_model_load_from_file": (_ptr, C.c_char_p, _ModelParams),
    "llama_model_free": (None, _ptr),
    "llama_model_meta_val_str": (_i32, _ptr, C.c_char_p, C.c_char_p, _size),
    "llama_model_n_ctx_train": (_i32, _ptr),
    "llama_model_n_layer": (_i32, _ptr),
    "llama_model_n_head": (_i32, _ptr),
    "llama_model_n_head_kv": (_i32, _ptr),
    "llama_model_n_embd": (_i32, _ptr),
    "llama_model_is_recurrent": (_bool, _ptr),
    "llama_model_is_hybrid": (_bool, _ptr),
    "llama_model_is_diffusion": (_bool, _ptr),
    "llama_model_has_encoder": (_bool, _ptr),
    "llama_model_n_swa": (_i32, _ptr),
    "llama_model_get_vocab": (_ptr, _ptr),
    "llama_vocab_n_tokens": (_i32, _ptr),
    "llama_vocab_type": (_i32, _ptr),
    "llama_vocab_get_text": (C.c_char_p, _ptr, _i32),
    "llama_vocab_get_attr": (_i32, _ptr, _i32),
    "llama_vocab_is_eog": (_bool, _ptr, _i32),
    "llama_vocab_bos": (_i32, _ptr),
    "llama_vocab_eos": (_i32, _ptr),
    "llama_vocab_get_add_bos": (_bool, _ptr),
    "llama_tokenize": (_i32, _ptr, C.c_char_p, _i32, _ptr, _i32, _bool, _bool),
    "llama_token_to_piece": (_i32, _ptr, _i32, _ptr, _i32, _i32, _bool),
    "llama_init_from_model": (_ptr, _ptr, _ContextParams),
    "llama_free": (None, _ptr),
    "llama_n_ctx": (_u32, _ptr),
    "llama_set_n_threads": (None, _ptr, _i32, _i32),
    "llama_get_memory": (_ptr, _ptr),
    "llama_memory_clear": (None, _ptr, _bool),
    "llama_memory_seq_cp": (None, _ptr, _i32, _i32, _i32, _i32),
    "llama_memory_seq_rm": (_bool, _ptr, _i32, _i32, _i32),
    "llama_memory_seq_pos_max": (_i32, _ptr, _i32),
    "llama_decode": (_i32, _ptr, _Batch),
    "llama_get_logits": (_ptr, _ptr),
    "llama_adapter_lora_init": (_ptr, _ptr, C.c_char_p),
    "llama_set_adapters_lora": (_i32, _ptr, C.POINTER(_ptr), _size, C.POINTER(_f32)),
}

_errors: deque[str] = deque(maxlen=8)


@_LOG
def _log(level: int, text: bytes | None, _data: object) -> None:
    """Keep llama.cpp off the terminal; its last errors go into our own messages."""
    if level == _ERROR_LEVEL and text:
        _errors.append(text.decode("utf-8", "replace").strip())


def _last_error() -> str:
    text = "; ".join(_errors)
    _errors.clear()
    return f": {text}" if text else ""


@cache
def library() -> Any:
    """Open the wheel's library and check that it is the one this binding was written for.

    Raises:
        EngineUnavailable: It is not installed, or its version or struct layout is another.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise EngineUnavailable(f"the llama.cpp engine needs the package xllamacpp; install it with: {INSTALL}")
    version = importlib.metadata.version("xllamacpp")
    if version != VERSION:
        raise EngineUnavailable(f"xllamacpp is {version}, but this Plait was written for {VERSION}: {INSTALL}")
    folder = Path(spec.origin).parent
    files = [p for pattern in ("xllamacpp*.so", "xllamacpp*.pyd") for p in folder.glob(pattern)]
    try:
        lib = C.CDLL(str(files[0]))
        for name, (result, *args) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, args
    except (IndexError, OSError, AttributeError) as exc:
        raise EngineUnavailable(f"the library of xllamacpp {version} does not load ({exc}); try: {INSTALL}") from exc
    if not layout_fits(lib.llama_model_default_params(), lib.llama_context_default_params()):
        raise EngineUnavailable(f"the structs of xllamacpp {version} are not those of {VERSION}; install it: {INSTALL}")
    lib.llama_log_set(C.cast(_log, _ptr), None)
    lib.llama_backend_init()
    return lib


def layout_fits(model: Any, context: Any) -> bool:
    """Whether the defaults read through our structs are llama.cpp's documented ones: a shifted field shows here."""
    return (
        (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max) == (512, 2048, 512, 1)
        and (context.rope_scaling_type, context.pooling_type, context.attention_type) == (-1, -1, -1)
        and (context.type_k, context.type_v) == (1, 1)
        and bool(context.offload_kqv)
        and not (context.kv_unified or context.embeddings or context.samplers or context.ctx_other)
        and bool(model.use_extra_bufts)
        and not model.vocab_only
    )


class File:
    """A GGUF file that llama.cpp has opened."""

    def __init__(self, path: str | Path, params: Any = None) -> None:
        """Open a file.

        Args:
            params: A `_ModelParams`; by default llama.cpp's.

        Raises:
            ModelError: It is missing, not readable, not a GGUF, or cut off.
            EngineUnavailable: llama.cpp is not installed in the right version.
        """
        path = Path(path)
        _check_header(path)
        self._lib = library()
        _errors.clear()
        params = params or self._lib.llama_model_default_params()
        self._handle = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._handle:
            raise ModelError(f"llama.cpp cannot load {path}{_last_error()}")

    @property
    def handle(self) -> Any:
        assert self._handle, "the model is closed"
        return self._handle

    def meta(self, key: str) -> str | None:
        """A string of the file's header, None if it has no such key."""
        size = self._lib.llama_model_meta_val_str(self.handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = C.create_string_buffer(size + 1)
        self._lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Free the weights; again is fine."""
        if self._handle:
            self._lib.llama_model_free(self._handle)
            self._handle = None


class Vocabulary(File):
    """The vocabulary of one GGUF file; its weights are not read.

    Raises:
        ModelError: As of every file; or it has none.
    """

    def __init__(self, path: str | Path) -> None:
        params = library().llama_model_default_params()
        params.vocab_only = True
        # What is to be written follows something, mostly: nothing is put before it unasked.
        overrides = (_Override * 2)(_Override(kind=_TRUTH, key=_SPACE_PREFIX.encode(), value=False))
        params.kv_overrides = C.cast(overrides, _ptr)
        super().__init__(path, params)
        self._vocab = self._lib.llama_model_get_vocab(self._handle)
        kind = self._lib.llama_vocab_type(self._vocab)
        if kind == _NO_VOCABULARY:
            self.close()
            raise ModelError(f"{path} holds no vocabulary")
        self.space_prefix = self.meta(_SPACE_PREFIX) == "true" if self.meta(_SPACE_PREFIX) else kind == _SENTENCEPIECE
        """Whether a text begins with a space that nobody wrote."""

    def __len__(self) -> int:
        return self._lib.llama_vocab_n_tokens(self._vocab)

    def text(self, id: int) -> str:
        """A token as the vocabulary spells it."""
        return self._lib.llama_vocab_get_text(self._vocab, id).decode("utf-8", "replace")

    def piece(self, id: int) -> bytes:
        """What a token adds to a text; of a character's bytes, perhaps not all."""
        buffer = C.create_string_buffer(_LONGEST_PIECE)
        size = self._lib.llama_token_to_piece(self._vocab, id, buffer, _LONGEST_PIECE, 0, True)
        if size < 0:
            buffer = C.create_string_buffer(-size)
            size = self._lib.llama_token_to_piece(self._vocab, id, buffer, -size, 0, True)
        return buffer.raw[:size]

    def is_control(self, id: int) -> bool:
        """Whether a token is for control, and never read in a text."""
        return bool(self._lib.llama_vocab_get_attr(self._vocab, id) & _CONTROL)

    def is_users(self, id: int) -> bool:
        """Whether a token was added by users of the vocabulary, and is read wherever its text stands."""
        return bool(self._lib.llama_vocab_get_attr(self._vocab, id) & _USERS)

    def ends(self) -> list[int]:
        """Tokens that end a text, the main one first."""
        main = self._lib.llama_vocab_eos(self._vocab)
        others = [id for id in range(len(self)) if id != main and self._lib.llama_vocab_is_eog(self._vocab, id)]
        return [main, *others] if main >= 0 else others

    def opening(self) -> list[int]:
        """Tokens that begin every text."""
        bos = self._lib.llama_vocab_bos(self._vocab)
        return [bos] if bos >= 0 and self._lib.llama_vocab_get_add_bos(self._vocab) else []

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text. Nothing is put before it."""
        data = text.encode("utf-8", "surrogatepass")
        ids = np.empty(len(data) + 1, np.int32)
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids.ctypes.data, len(ids), False, False)
        return ids[:count].tolist()


class Model(File):
    """The weights of one GGUF file."""

    def __init__(self, path: str | Path) -> None:
        """Load a file.

        Raises:
            ModelError: It is missing, not readable, not a GGUF, cut off, or of a kind that cannot be continued.
            EngineUnavailable: llama.cpp is not installed in the right version.
        """
        super().__init__(path)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._handle))
        self.trained_context: int = self._lib.llama_model_n_ctx_train(self._handle)
        unfit = self._unfit()
        if unfit:
            self.close()
            raise ModelError(f"{path} {unfit}")
        self.windowed: bool = self._lib.llama_model_n_swa(self._handle) > 0
        """Whether some layers attend to the latest positions only."""

    def cell_numbers(self) -> int:
        """Numbers that keys and values of one token are, in all layers; an estimate where layers differ."""
        lib, handle = self._lib, self._handle
        usual = lib.llama_model_n_embd(handle) // max(1, lib.llama_model_n_head(handle))
        about = f"{self.meta('general.architecture')}.attention"
        sizes = [int(self.meta(f"{about}.{what}_length") or usual) for what in ("key", "value")]
        return lib.llama_model_n_layer(handle) * lib.llama_model_n_head_kv(handle) * sum(sizes)

    def _unfit(self) -> str | None:
        """Why no context of tokens can be continued with it, if so: llama.cpp would abort, or sample nonsense."""
        lib, handle = self._lib, self._handle
        if lib.llama_model_is_recurrent(handle) or lib.llama_model_is_hybrid(handle):
            return (
                "has recurrent layers, whose state cannot be forked at any point or merged; serve it with llama-server"
                " or vLLM and give its URL as the engine"
            )
        causal = self.meta(f"{self.meta('general.architecture')}.attention.causal") != "false"
        if lib.llama_model_has_encoder(handle) or lib.llama_model_is_diffusion(handle) or not causal:
            return "is no causal language model: it embeds, translates or fills in, and cannot continue a text"
        return None

    def load_lora(self, path: str | Path) -> Any:
        """A LoRA adapter for these weights; freed with them.

        Raises:
            ModelError: The file is missing, no GGUF, no LoRA adapter, or for other weights.
        """
        path = Path(path)
        _check_header(path)
        _errors.clear()
        adapter = self._lib.llama_adapter_lora_init(self.handle, str(path).encode())
        if not adapter:
            raise ModelError(f"llama.cpp cannot load {path} as a LoRA adapter of these weights{_last_error()}")
        return adapter


def _check_header(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise ModelError(f"cannot read the weight file {path}: {exc.strerror or exc}") from exc
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF weight file (it starts with {magic!r})")


class Decoder:
    """One llama.cpp context: a pool of cells, shared by sequences, and the arrays of one batch.

    Rows are written straight into `tokens`, `positions`, `seq_ids`, `num_seqs` and `outputs`. A row may belong to
    several sequences (`seq_ids[row, :num_seqs[row]]`): its cell is then shared, and it attends as the last of them.
    """

    sequences_each = 1
    """Of llama.cpp's sequences, for one of ours."""

    def __init__(
        self, model: Model, *, cells: int, max_seqs: int, max_rows: int, flash: bool, wide_cache: bool
    ) -> None:
        self._lib, self._model = model._lib, model
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells, max_seqs * self.sequences_each
        params.n_batch = params.n_ubatch = max_rows
        params.n_threads = params.n_threads_batch = 1
        self._threads = (1, 1)
        params.swa_full = True  # a fork may begin before what a sliding window still shows
        params.kv_unified = True  # one pool of cells: a fork sets a bit per cell, a part of a sequence can be copied
        params.flash_attn_type = int(flash)
        params.type_k = params.type_v = 0 if wide_cache else 1
        params.no_perf = True
        _errors.clear()
        self._handle = self._lib.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise ModelError(f"llama.cpp cannot make a context of {cells} cells{_last_error()}")
        self.cells = int(self._lib.llama_n_ctx(self._handle))
        self._memory = self._lib.llama_get_memory(self._handle)
        self._shadows = max_seqs
        self.tokens = np.zeros(max_rows, np.int32)
        self.positions = np.zeros(max_rows, np.int32)
        self.seq_ids = np.zeros((max_rows, max_seqs), np.int32)
        self.num_seqs = np.ones(max_rows, np.int32)
        self.outputs = np.zeros(max_rows, np.int8)
        self._rows = self.seq_ids.ctypes.data + np.arange(max_rows, dtype=np.uint64) * (4 * max_seqs)
        self._batch = _Batch(
            0,
            self.tokens.ctypes.data,
            None,
            self.positions.ctypes.data,
            self.num_seqs.ctypes.data,
            self._rows.ctypes.data,
            self.outputs.ctypes.data,
        )
        self._views: dict[int, npt.NDArray[np.float32]] = {}
        self._decode, self._get_logits = self._lib.llama_decode, self._lib.llama_get_logits

    def set_lora(self, adapter: Any, scale: float) -> None:
        """Add an adapter's matrices, times `scale`, to the weights of every step from now on."""
        code = self._lib.llama_set_adapters_lora(self._handle, (_ptr * 1)(adapter), 1, (_f32 * 1)(scale))
        if code:
            raise ModelError(f"llama.cpp cannot use the LoRA adapter (code {code}){_last_error()}")

    def set_threads(self, rows: int, threads: int) -> None:
        """CPU threads of the steps that follow, which have so many rows."""
        self._threads = (threads, self._threads[1]) if rows == 1 else (self._threads[0], threads)
        self._lib.llama_set_n_threads(self._handle, *self._threads)

    def decode(self, rows: int) -> int:
        """Run the first `rows` rows. Returns llama.cpp's code: 0 is well, 1 no room, below 0 an invalid batch."""
        batch = self._batch
        batch.n_tokens = rows
        return self._decode(self._handle, batch)

    def logits(self, count: int) -> npt.NDArray[np.float32]:
        """Logits [count, vocabulary] of the rows with `outputs`, in order. A view, overwritten by the next decode."""
        address = self._get_logits(self._handle)
        view = self._views.get(address)
        if view is None:
            # The buffer moves only when it grows, so there are few addresses; rows beyond `count` are never touched.
            shape = (len(self.tokens), self._model.vocab_size)
            raw = (_f32 * (shape[0] * shape[1])).from_address(address)
            view = self._views[address] = np.ctypeslib.as_array(raw).reshape(shape)
        return view[:count]

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let `target` share the cells of `source` at positions start <= p < end. No data moves."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, start, end)

    def remove(self, seq: int) -> None:
        """Take all cells from a sequence."""
        self._lib.llama_memory_seq_rm(self._memory, seq, -1, -1)

    def truncate(self, seq: int, start: int) -> None:
        """Take the cells at positions start <= p from a sequence."""
        self._lib.llama_memory_seq_rm(self._memory, seq, start, -1)

    def last_position(self, seq: int) -> int:
        """The largest position a sequence holds, -1 if it holds none."""
        return self._lib.llama_memory_seq_pos_max(self._memory, seq)

    def clear(self) -> None:
        """Empty every cell."""
        self._lib.llama_memory_clear(self._memory, False)

    def last_error(self) -> str:
        """What llama.cpp last complained about, for an error message."""
        return _last_error()

    def close(self) -> None:
        """Free the context; again is fine."""
        if self._handle:
            self._lib.llama_free(self._handle)
            self._handle = None


class WindowedDecoder(Decoder):
    """The same for a model with sliding windows.

    llama.cpp takes a cell for free when no window of its only sequence shows it any more, but a fork may begin before
    it. So each sequence has a shadow that holds the same cells: none has only one.
    """

    sequences_each = 2

    def decode(self, rows: int) -> int:
        code = super().decode(rows)
        if not code:
            owned = np.arange(self.seq_ids.shape[1]) < self.num_seqs[:rows, None]
            for seq in np.unique(self.seq_ids[:rows][owned]).tolist():
                own = (owned & (self.seq_ids[:rows] == seq)).any(1)
                positions = self.positions[:rows][own]
                self._shade(seq, seq, int(positions.min()), int(positions.max()) + 1)
        return code

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        super().copy(source, target, start, end)
        self._shade(source, target, start, end)

    def remove(self, seq: int) -> None:
        super().remove(seq)
        super().remove(seq + self._shadows)

    def truncate(self, seq: int, start: int) -> None:
        super().truncate(seq, start)
        super().truncate(seq + self._shadows, start)

    def _shade(self, source: int, target: int, start: int, end: int) -> None:
        super().copy(source, target + self._shadows, start, end)
