"""Models that Plait did not train, as the server serves them: conversations, thoughts, forks, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="writes its own weights: needs the train extra")
pytest.importorskip("fastapi", reason="needs the serve extra")
pytest.importorskip("openai", reason="asks as OpenAI's client does")

import tiny_vocabulary
from fake_servers import FakeVllm
from plait.cli import main
from plait.commands.serve import served
from plait.errors import RequestError
from plait.formats.threadweaver import ThreadWeaver
from plait.models import Model, load_model
from plait.server import ServeConfig, Served
from plait.server.answer import PlainAnswer, answer_of
from plait.server.transcript import Piece
from plait.tokenizer.text import TextTokenizer
from plait.types import Context, Merge
from test_doctor import running
from test_server import Running, frames, serving

TAGS = ThreadWeaver.tags()
OPENS = {"<Parallel>", "<Outlines>"}
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + tiny_vocabulary.CHATML
)
QUESTION = "why is the sky blue"
BLOCK = "<Parallel>\n<Outlines>\n<Outline>1: light</Outline>\n<Outline>2: air</Outline>\n</Outlines>"
THREADS = "\n<Thread>\n1: waves\n</Thread><Thread>\n2: scatter\n</Thread>\n"


def script_of(tokenizer: TextTokenizer, opening: str, ending: str) -> Callable[[Context], Sequence[int]]:
    """Says an opening and a block of two threads, then an ending."""

    def script(context: Context) -> Sequence[int]:
        ids = context[-1]
        assert not isinstance(ids, Merge)
        text = tokenizer.decode(ids)
        says = f"{opening}{BLOCK}"
        if text.endswith("1:"):
            says = " waves\n</Thread>"
        elif text.endswith("2:"):
            says = " scatter\n</Thread>"
        elif text.endswith("</Thread>\n"):
            says = f"</Parallel>{ending}<|im_end|>"
        return tokenizer.encode(says, special=True)

    return script


def forking(model: Model, name: str, opening: str, ending: str) -> Served:
    assert isinstance(model.tokenizer, TextTokenizer)
    script = script_of(model.tokenizer, opening, ending)
    return Served(model=replace(model, name=name, script=script), engine_name="scripted", options={"chunk_size": 3})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Model]:
    users = ("<think>", "</think>", *TAGS)
    paths = [
        tiny_vocabulary.write_bytes(folder / "tiny.gguf"),
        tiny_vocabulary.write_bytes(folder / "strict.gguf", template=STRICT),
        tiny_vocabulary.write_bytes(folder / "bare.gguf", template=None),
    ]
    made = {path.stem: load_model(str(path), format="sequential") for path in paths}
    return made | {
        "forks": load_model(str(tiny_vocabulary.write_bytes(folder / "f.gguf", users=users)), format="threadweaver")
    }


@pytest.fixture(scope="module")
def server(models: dict[str, Model]) -> Iterator[Running]:
    real = [
        Served(model=models[name], engine_name="llamacpp", options={"max_seqs": 4})
        for name in ("tiny", "strict", "bare")
    ]
    thinks = forking(models["forks"], "thinks", "\n<think>\nlet me see ", " so </think>\n\nThe sky is blüe.")
    speaks = forking(models["forks"], "speaks", "Let me see. ", "\nThe sky is blue.")
    with serving(*real, thinks, speaks, models=tuple(models)) as running:
        yield running


def said(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"the {role} is <|im_end|> {number}"} for number, role in enumerate(roles)]


# What is reasoning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thinks", "reasoning", "answer"),
    [
        ("The sky.", False, "", "The sky."),
        ("  \nThe sky.", False, "", "  \nThe sky."),
        (" <thin sky", False, "", " <thin sky"),
        ("<thi", False, "", "<thi"),
        ("\n<think>\na < b</think>\n\nThe sky.", False, "\n\na < b", "\n\nThe sky."),
        ("a </thin b</think>The <think> sky", True, "a </thin b", "The <think> sky"),
        ("it never ends </th", True, "it never ends </th", ""),
        (f"See: {BLOCK}</Parallel> So <Parallel", False, f"{BLOCK}</Parallel>", "See:  So <Parallel"),
        ("a <Thread> b</Thread><Thr", False, "", "a  b<Thr"),
    ],
)
@given(cuts=st.lists(st.integers(0, 80), max_size=12))
def test_no_character_is_lost_or_said_twice_however_a_text_is_cut(
    text: str, thinks: bool, reasoning: str, answer: str, cuts: list[int]
) -> None:
    splits = PlainAnswer(thinks=thinks, tags=TAGS, opens=OPENS)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in pairwise(places)]
    put = [splits.put(Piece(thread="0", kind="text", text=part)) for part in parts]
    put.append(splits.put(Piece(thread="0", kind="close")))
    assert ("".join(one[0] for one in put), "".join(one[1] for one in put)) == (reasoning, answer)


def test_plain_text_is_passed_on_at_once_and_so_is_a_thought() -> None:
    splits = PlainAnswer(thinks=False, tags=TAGS, opens=OPENS)
    assert splits.put(Piece(thread="0", kind="text", text="T")) == ("", "T")
    splits = PlainAnswer(thinks=False)
    assert splits.put(Piece(thread="0", kind="text", text="<think>a")) == ("a", "")


def test_a_prompt_may_open_the_thought(models: dict[str, Model]) -> None:
    tokenizer, format = models["tiny"].tokenizer, models["tiny"].format
    for end, expected in (("<think>\n", ("a", "b")), ("<think>\n\n</think>\n\n", ("", "a</think>b"))):
        prompt = tokenizer.encode(f"<|im_start|>assistant\n{end}", special=True)
        splits = answer_of(models["tiny"], format, prompt)
        assert splits.put(Piece(thread="0", kind="text", text="a</think>b")) == expected


# Forks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reasoning", "content"),
    [
        ("thinks", f"\n\nlet me see {BLOCK}{THREADS}</Parallel> so ", "\n\nThe sky is blüe."),
        ("speaks", f"{BLOCK}{THREADS}</Parallel>", "Let me see. \nThe sky is blue."),
    ],
)
def test_a_run_that_forks_is_the_same_whole_and_as_a_stream(
    server: Running, name: str, reasoning: str, content: str
) -> None:
    ask: Any = {"model": name, "messages": [{"role": "user", "content": QUESTION}]}
    chat = server.client().chat.completions
    whole = chat.create(**ask)
    message = whole.choices[0].message
    assert (message.content, (message.model_extra or {})["reasoning"]) == (content, reasoning)
    assert whole.choices[0].finish_reason == "stop"
    usage: Any = whole.usage
    assert usage.plait["threads"] == 2
    chunks = list(chat.create(**ask, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == content
    assert "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas) == reasoning
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens


def test_the_weights_may_be_on_another_server(models: dict[str, Model]) -> None:
    model = models["forks"]
    assert isinstance(model.tokenizer, TextTokenizer)
    script = script_of(model.tokenizer, "<think>", "</think>The sky.")
    vllm = FakeVllm(vocab_size=len(model.tokenizer.tokens), script=script)
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    with running(vllm) as url, serving(Served(model=model, engine_name=url)) as front:
        reply = front.post("/v1/chat/completions", body).json()
    assert reply["choices"][0]["message"]["content"] == "The sky."
    assert reply["choices"][0]["message"]["reasoning"] == f"{BLOCK}{THREADS}</Parallel>"
    assert reply["usage"]["plait"]["threads"] == 2


def test_the_tokens_of_a_thought_are_counted(server: Running, models: dict[str, Model]) -> None:
    body = {"model": "thinks", "messages": [{"role": "user", "content": QUESTION}]}
    usage = server.post("/v1/chat/completions", body).json()["usage"]
    answer = models["forks"].tokenizer.encode("\n\nThe sky is blüe.<|im_end|>", special=True)
    assert usage["completion_tokens"] - usage["completion_tokens_details"]["reasoning_tokens"] == len(answer)


def test_a_stop_string_ends_the_answer_and_not_the_thought(server: Running) -> None:
    body = {"model": "thinks", "messages": [{"role": "user", "content": QUESTION}], "stop": ["see", " is"]}
    (choice,) = server.post("/v1/chat/completions", body).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("\n\nThe sky", "stop")
    assert "let me see" in choice["message"]["reasoning"]


def test_responses_have_an_item_for_each_thought(server: Running) -> None:
    responses = server.client().responses
    whole = responses.create(model="thinks", input=QUESTION)
    assert [item.type for item in whole.output] == ["reasoning"] * 3 + ["message"]
    assert whole.output_text == "\n\nThe sky is blüe."
    spoken = responses.create(model="speaks", input=QUESTION)
    assert [item.type for item in spoken.output] == ["message", *["reasoning"] * 3]
    assert spoken.output_text == "Let me see. \nThe sky is blue."
    last = list(responses.create(model="speaks", input=QUESTION, stream=True))[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == spoken.output_text


def test_the_page_is_told_what_a_plain_question_came_to(server: Running) -> None:
    reply = server.post("/plait/runs", {"model": "thinks", "question": QUESTION})
    said = [data for data in frames(reply.text) if "answer" in data]
    assert said[-1]["answer"] == "The sky is blüe."
    about = {one["id"]: one["plait"] for one in server.get("/v1/models").json()["data"]}
    assert about["thinks"]["plain"] is True
    assert about["thinks"]["families"] == []


# Prompts ------------------------------------------------------------------------------------------------------------


def test_the_whole_conversation_is_read_and_control_tokens_in_it_stay_text(
    server: Running, models: dict[str, Model]
) -> None:
    tokenizer = models["tiny"].tokenizer
    assert isinstance(tokenizer, TextTokenizer)
    roles = ("developer", "user", "assistant", "user")
    given = said(*roles)
    reply: Any = server.client().chat.completions.create(model="tiny", messages=given, max_tokens=3)  # type: ignore[arg-type]
    read = tokenizer.prompt_ids([{**one, "role": one["role"].replace("developer", "system")} for one in given])
    assert reply.usage.prompt_tokens == len(read)
    assert "unread_messages" not in reply.plait
    assert read.count(tokenizer.eos_ids[0]) == len(roles)
    ended = reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 3 if ended else reply.usage.completion_tokens <= 3


def test_instructions_are_the_system_message_and_earlier_thoughts_are_left_out(
    server: Running, models: dict[str, Model]
) -> None:
    tokenizer = models["tiny"].tokenizer
    assert isinstance(tokenizer, TextTokenizer)
    thought = {"type": "reasoning", "id": "rs", "summary": []}
    body = {"model": "tiny", "instructions": "be brief", "input": [*said("user"), thought, *said("user")]}
    reply = server.post("/v1/responses", body | {"max_output_tokens": 2}).json()
    read = tokenizer.prompt_ids([{"role": "system", "content": "be brief"}, *said("user"), *said("user")])
    assert reply["usage"]["input_tokens"] == len(read)
    assert reply["plait"]["unread_messages"] == 1


def test_a_completion_goes_on_with_the_text_as_it_stands(server: Running, models: dict[str, Model]) -> None:
    tokenizer = models["bare"].tokenizer
    for name in ("tiny", "bare"):
        reply = server.post("/v1/completions", {"model": name, "prompt": "the sky", "max_tokens": 2}).json()
        assert reply["usage"]["prompt_tokens"] == len(tokenizer.encode("the sky"))
    ids = {"model": "tiny", "prompt": list(tokenizer.encode("the sky")), "max_tokens": 2}
    again = server.post("/v1/completions", ids).json()
    assert again["choices"][0]["text"] == reply["choices"][0]["text"]


def test_a_run_without_a_limit_goes_as_far_as_the_context(server: Running) -> None:
    body = {"model": "tiny", "prompt": "the sky is blue " * 60}
    reply = server.post("/v1/completions", body).json()
    usage = reply["usage"]
    if reply["choices"][0]["finish_reason"] == "length":
        assert usage["total_tokens"] == tiny_vocabulary.CONTEXT
    assert usage["total_tokens"] <= tiny_vocabulary.CONTEXT
    beyond = server.post("/v1/completions", body | {"prompt": "the sky is blue " * 200})
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("model", "messages", "code", "says"),
    [
        ("strict", said("system", "user"), "unwritable_prompt", "no system here"),
        ("bare", said("user"), "unwritable_prompt", "no chat template"),
        ("tiny", said("tool"), "unsupported_content", "system, developer, user, assistant"),
        ("tiny", [{"role": "user", "content": [{"type": "image_url"}]}], "unsupported_content", "reads text only"),
    ],
)
def test_what_a_model_cannot_read_is_refused_with_the_reason(
    server: Running, folder: Path, model: str, messages: list[Any], code: str, says: str
) -> None:
    reply = server.post("/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 2})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, code)
    assert says in error["message"]
    assert str(folder) not in error["message"]


def test_the_last_message_may_be_anybodys(server: Running) -> None:
    for roles in (("user", "assistant"), ("system",)):
        body = {"model": "tiny", "messages": said(*roles), "max_tokens": 2}
        assert server.post("/v1/chat/completions", body).status_code == 200


def test_a_budget_in_the_prompt_is_refused(server: Running) -> None:
    body = {"model": "tiny", "messages": said("user"), "plait": {"conditioned": True}}
    error = server.post("/v1/chat/completions", body).json()["error"]
    assert "not trained to read a budget" in error["message"]


def test_the_chat_template_can_be_read(server: Running) -> None:
    assert server.get("/tokenizer_info?model=tiny").json()["chat_template"] == tiny_vocabulary.CHATML
    assert server.get("/tokenizer_info?model=bare").json()["chat_template"] is None


# Which models -------------------------------------------------------------------------------------------------------


def test_each_model_has_its_format_and_a_server_may_run_it(folder: Path, models: dict[str, Model]) -> None:
    paths = (str(folder / "tiny.gguf"), str(folder / "f.gguf"))
    one, two = served(ServeConfig(models=paths, formats=("sequential", "threadweaver")))
    assert (one.model.format_name, two.model.format_name) == ("sequential", "threadweaver")
    (away,) = served(ServeConfig(models=paths[1:], formats=("threadweaver",), engine="http://localhost:1"))
    assert (away.engine_label, away.model.format_name, away.twin) == ("http", "threadweaver", None)
    (named,) = served(ServeConfig(engine=f"llamacpp:{paths[0]}", formats=("sequential",)))
    assert (named.name, named.engine_name) == ("tiny", "llamacpp")


def test_a_format_is_asked_for_where_the_weights_name_none(folder: Path, models: dict[str, Model]) -> None:
    told = CliRunner().invoke(main, ["serve", "--engine", f"llamacpp:{folder / 'tiny.gguf'}"])
    assert told.exit_code != 0
    assert "name one with --format" in told.output
    with pytest.raises(RequestError, match="3 formats and 2 models"):
        ServeConfig(models=("a", "b"), formats=("sequential",) * 3)


def test_a_plain_model_has_no_limit_of_tokens_unless_it_is_told() -> None:
    assert ServeConfig().budget(plain=True).max_tokens is None
    assert ServeConfig().budget(plain=False).max_tokens == 4096
    assert ServeConfig(max_tokens=7).budget(plain=True).max_tokens == 7
