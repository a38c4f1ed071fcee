"""A trained model as a file: found by name or path, checked, ready to open in an engine.

Weights carry what they were trained in (format, join, tokenizer, data) under `plait.config`; loading them under
another format is refused, because the join is part of the function that a model computes. Runs nothing itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait import tasks
from plait.engines import Engine, is_address, open_engine, options_of
from plait.engines.scripted import Script
from plait.errors import ModelError, RequestError, nearest, without_password
from plait.formats import FORMATS, BudgetLevels, TrajectoryFormat, open_format
from plait.models.folder import describe_folder
from plait.models.header import read_header
from plait.settings import of_type, one_of
from plait.tokenizer import FixedTokenizer, Tokenizer, Vocabulary
from plait.tokenizer.fast import FastTokenizer
from plait.tokenizer.text import TextTokenizer
from plait.tree import Tree
from plait.types import JoinKind, Request

DEFAULT = "plait-tiny"
NAMES = (DEFAULT, "plait-tiny-sequential")
"""The adaptive model, and its sequential twin: same size, data and tokens seen, traces serialised."""
WEIGHTS = Path(__file__).with_name("weights")
TWIN = "-sequential"
"""Where a model is called X, its twin is called X and this."""
_SUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Weights on disk and what they say of themselves; nothing is loaded into memory yet."""

    name: str
    path: Path | None
    """A GGUF file, or a folder as transformers saves it. None: no weights, a script."""
    digest: str
    """SHA-256 of the file."""
    format_name: str
    """The only trajectory format these weights can be run in."""
    join: JoinKind
    tokenizer: Vocabulary
    max_context: int
    num_weights: int
    dtype: str
    train: Mapping[str, Any]
    """The config it was trained with."""
    scores: Mapping[str, Any]
    """What its training measured."""
    script: Script | None = None
    """What the scripted engine says in place of weights."""
    plain: bool = False
    """Weights that Plait's trainer did not make: they are asked in plain words, not in its notation."""

    @property
    def id(self) -> str:
        """Name and content: two files of the same name and different weights differ."""
        return f"{self.name}@{self.digest[:8]}" if self.digest else self.name

    @property
    def forks(self) -> bool:
        """Whether its format has threads at all."""
        return self.join != "none"

    @property
    def engine(self) -> str:
        """Name of the engine that runs it where none is asked for."""
        if self.script is not None:
            return "scripted"
        return "torch" if self.path is not None and self.path.is_dir() else "llamacpp"

    @property
    def families(self) -> tuple[str, ...]:
        """Problem families it was trained on; empty where the weights do not say."""
        mixture: Mapping[str, float] = self.train.get("data", {}).get("mixture", {})
        return tuple(name for name, weight in mixture.items() if weight > 0)

    @property
    def format(self) -> TrajectoryFormat:
        """That format, over this model's vocabulary."""
        return open_format(self.format_name, self.tokenizer, **({"levels": self.levels} if self.levels else {}))

    @property
    def levels(self) -> BudgetLevels | None:
        """What these weights were trained to read of a budget in their prompt; None: they were not."""
        said: Mapping[str, Any] | None = self.train.get("data", {}).get("budget")
        if said is None:
            return None
        return BudgetLevels(threads=tuple(said.get("threads", ())), tokens=tuple(said.get("tokens", ())))

    def open_engine(self, name: str | None = None, **options: Any) -> Engine:
        """An engine over these weights, not started.

        Args:
            name: An engine, or the address of a server that has loaded the same weights.

        Raises:
            RequestError: No engine has this name, it has no such option, or it takes no weights.
            EngineUnavailable: A library it needs is not installed.
        """
        name = name or self.engine
        if is_address(name) and self.script is None:
            return open_engine("http", urls=name, vocab_size=len(self.tokenizer.tokens), **options)
        if self.script is not None and name == "scripted":
            return open_engine(name, script=self.script, **options)
        if self.path is None or name == "scripted":
            raise RequestError(f"the {name} engine cannot run {self.name}; it runs in {self.engine}")
        if self.path.is_dir() and name == "llamacpp":
            raise RequestError(f"the llamacpp engine reads GGUF files; {self.path} is a folder: use the torch engine")
        if "path" in options:
            raise RequestError(f"the weights of {self.name} are {self.path}: leave out the option path")
        # One that takes no weights has its own.
        return open_engine(name, **({"path": self.path} if "path" in options_of(name) else {}), **options)

    def request(self, question: str | Sequence[Mapping[str, str]], **settings: Any) -> Request:
        """A question in plain words as a request.

        Args:
            question: Of a plain model also a conversation: messages with `role` and `content`.
            settings: Of the `Request`: budget, temperature, seed and so on. `conditioned` is by default as the weights
                were trained.

        Raises:
            RequestError: No family that this model was trained on has such questions; the message says which have. Or
                the prompt is to say the budget, which these weights were not trained to read.
        """
        if not self.plain:
            of_type(str, question, name="the question")
        for name in settings:
            one_of(name, [other for other in Request.__slots__ if other != "prompt_ids"], "setting of a request")
        if settings.setdefault("conditioned", self.levels is not None) and self.levels is None and self.script is None:
            raise RequestError(f"{self.name} was not trained to read a budget in its prompt; leave out `conditioned`")
        if self.plain:
            assert isinstance(self.tokenizer, TextTokenizer)
            return Request(prompt_ids=self.tokenizer.prompt_ids(question), **settings)
        problem = tasks.parse(str(question), self.families)
        if self.script is None and self.families and problem.family not in self.families:
            raise RequestError(
                f"{self.name} was not trained on {problem.family} problems, only on {', '.join(self.families)}"
            )
        return Request(prompt_ids=prompt_ids(self.tokenizer, problem.prompt), **settings)

    def text(self, tree: Tree) -> str:
        """What the root thread sampled: where the answer is looked for. Threads and prompt do not count."""
        return response_text(tree, self.tokenizer)

    def answer(self, tree: Tree) -> str | None:
        """The answer that a run gives; None where it gives none."""
        return tasks.answer_of(self.text(tree))


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    """A canonical question as a model reads it: what the trainer puts in front of a trace."""
    return (*tokenizer.bos_ids, *tokenizer.encode(tasks.spelled(prompt)))


def response_text(tree: Tree, tokenizer: Tokenizer) -> str:
    """What the root thread sampled, but for what ends a text: every vocabulary spells that in its own way.

    Raises:
        RequestError: It is no tree.
    """
    if not isinstance(tree, Tree):
        raise RequestError(f"the tree is {tree!r:.60}; it must be a Tree: `await plait.run(...)` gives one")
    own = (id for s in tree.segments.values() if s.thread == "0" for id in s.sampled_ids)
    return tokenizer.decode([id for id in own if id not in tokenizer.eos_ids])


def load_model(name_or_path: str = DEFAULT, *, format: str | None = None) -> Model:
    """Find a model, check its file, read what it says of itself.

    Args:
        name_or_path: One of `NAMES`, the path of a GGUF file, or of a folder as transformers saves it.
        format: The format it is wanted in; None takes the one it was trained in. Weights that Plait did not train
            name none, so it must be given.

    Raises:
        RequestError: No model has this name, or it was trained in another format.
        ModelError: The file is missing, corrupt, or no model of Plait's.
    """
    of_type(str | Path, name_or_path, name="the model")
    of_type(str | None, format, name="the format")
    path, name = _find(str(name_or_path))
    model = (_folder if path.is_dir() else _file)(path, name, format)
    if format is not None and format != model.format_name:
        FORMATS.require(format)
        raise RequestError(
            f"{model.name} was trained in the {model.format_name} format and cannot be run in {format}: "
            f"a {model.join} join is part of what it learned. Leave out the format, or name weights trained in {format}"
        )
    return model


def twin_name(model: Model) -> str:
    """Name or path of a model's sequential twin, by convention."""
    if model.path is None or model.path.parent == WEIGHTS:
        return f"{model.name}{TWIN}"
    folder = model.path.parent
    if model.path.stem == "model" and folder.name:
        return str(folder.with_name(f"{folder.name}{TWIN}") / model.path.name)
    return str(model.path.with_name(f"{model.path.stem}{TWIN}{model.path.suffix}"))


def _find(name_or_path: str) -> tuple[Path, str]:
    if name_or_path in NAMES:
        path = WEIGHTS / f"{name_or_path}.gguf"
        if not path.exists():
            raise ModelError(f"the weights of {name_or_path} are missing ({path}); install the package again")
        return path, name_or_path
    path = Path(name_or_path).expanduser()
    if path.is_dir() and (path / "config.json").exists():
        return path, path.resolve().name
    if path.is_file():
        # A run folder holds `model.gguf`: the folder says which.
        return path, path.parent.name if path.stem == "model" and path.parent.name else path.stem
    if path.suffix == ".gguf" or len(path.parts) > 1:
        raise ModelError(f"there is no model file {without_password(str(path))}")
    unknown = nearest(name_or_path, list(NAMES), "model")
    raise RequestError(f"{unknown}; or give a path: a GGUF file, or a folder with a transformers checkpoint")


def _folder(path: Path, name: str, format: str | None) -> Model:
    described = describe_folder(path)
    config: Mapping[str, Any] = described["config"]
    about: Mapping[str, Any] | None = described["plait"]
    tokenizer = FastTokenizer.of_folder(path)
    about = about or _asked_for(path, format, tokenizer)
    try:
        max_context = int(config["max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ModelError(f"{path / 'config.json'} lacks max_position_embeddings") from exc
    return Model(
        name=name,
        path=path,
        digest=described["digest"],
        format_name=about["format"],
        join=about["join"],
        tokenizer=tokenizer,
        max_context=max_context,
        num_weights=described["num_weights"],
        dtype=described["dtype"],
        train=about.get("train", {}),
        scores=about.get("scores", {}),
        plain=described["plait"] is None,
    )


def _file(path: Path, name: str, format: str | None) -> Model:
    header = read_header(path)
    said = header.metadata.get("plait.config")
    if said is None and header.metadata.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        raise ModelError(
            f"{path} holds neither a plait.config nor a vocabulary: nothing says what its token ids mean. "
            "`plait train sft` writes files that do, and so does llama.cpp's converter"
        )
    try:
        about: Mapping[str, Any] = {} if said is None else json.loads(said)
        tokenizer = _inside(path) if said is None else FixedTokenizer.from_dict(about["tokenizer"])
        about = about or _asked_for(path, format, tokenizer)
        architecture = header.metadata["general.architecture"]
        return Model(
            name=name,
            path=path,
            digest=_digest(path),
            format_name=about["format"],
            join=about["join"],
            tokenizer=tokenizer,
            max_context=int(header.metadata[f"{architecture}.context_length"]),
            num_weights=header.num_weights,
            dtype=header.dtype,
            train=about.get("train", {}),
            scores=about.get("scores", {}),
            plain=said is None,
        )
    except json.JSONDecodeError as exc:
        raise ModelError(f"the plait.config of {path} cannot be read: {exc}; export the model again") from exc
    except (KeyError, TypeError, AttributeError, AssertionError) as exc:
        raise ModelError(f"the header of {path} is incomplete ({exc}); export the model again") from exc


def _inside(path: Path) -> Vocabulary:
    from plait.engines.llamacpp.vocabulary import GgufTokenizer  # loads llama.cpp, which most models can do without

    return GgufTokenizer(path)


def _asked_for(path: Path, format: str | None, tokenizer: Tokenizer) -> Mapping[str, Any]:
    """What Plait's trainer would have written, of weights that it did not make."""
    if format is None:
        raise RequestError(
            f"{path} does not say which format its weights were trained in; name one with --format "
            f"(sequential: they do not fork)"
        )
    return {"format": format, "join": open_format(format, tokenizer).join_kind}


def _digest(path: Path) -> str:
    """SHA-256 of the file, held against the sums beside it where there are any."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    sums = path.with_name(_SUMS)
    if sums.exists():
        for line in sums.read_text().splitlines():
            expected, _, name = line.partition("  ")
            if name.strip() == path.name and expected != digest:
                raise ModelError(f"the model file {path} is corrupt (see {_SUMS}); install the package again")
    return digest
