"""Programs of others against the server, unchanged: `pytest -m servers`. Each is skipped where it is not installed.

`pip install schemathesis 'lm-eval[api]' litellm` brings all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")

import plait
from plait.server import Served
from test_server import Running, gold, serving

pytestmark = [
    pytest.mark.servers,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:litellm"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TWIN = "plait-tiny-sequential"


def program(name: str) -> str:
    """A command, beside this interpreter or on the path."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str, cwd: Path, **environ: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    models = [Served(model=plait.load_model(name), engine_name="llamacpp") for name in (TWIN, "plait-tiny")]
    with serving(*models, gold(), max_tokens=1500) as running:
        yield running


SCHEMATHESIS = """
[checks.negative_data_rejection]
# Its own statuses, and 413: a list with too many items may be a body that is too large before it is read.
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx"]
"""


def test_schemathesis_finds_no_failure(server: Running, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    said = run(
        *(program("schemathesis"), "run", f"{server.url}/openapi.json", "--no-color", "--seed", "1"),
        *("--max-examples", "10", "--request-timeout", "60"),
        # What is a question, and which texts a vocabulary has, no JSON schema can say: those are refused with a 400.
        *("--exclude-checks", "positive_data_acceptance"),
        cwd=tmp_path,
    )
    cases = re.search(r"(\d+) generated, (\d+) passed", said)
    assert cases is not None, said[-3000:]
    assert cases[1] == cases[2]
    assert int(cases[1]) > 500
    assert "Tested: 17" in said


TASK = """
task: plait_small
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
{more}
"""
GENERATE = """
output_type: generate_until
generation_kwargs: {until: ["<eos>"], max_gen_toks: 1200, do_sample: false}
filter_list:
  - {name: answer, filter: [{function: regex, regex_pattern: "(?:Answer: )?([0-9]+)$"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def lm_eval(server: Running, folder: Path, more: str, rows: list[dict[str, Any]], *args: str, **settings: Any) -> Any:
    """Run a small task of our own. Results by metric, and what was logged of every row."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK.format(data=data, more=more))
    kind = settings.pop("kind", "local-completions")
    route = "chat/completions" if "chat" in kind else "completions"
    about = {"base_url": f"{server.url}/v1/{route}", "max_retries": 1, **settings}
    run(
        *(program("lm_eval"), "run", "--model", kind, "--tasks", str(folder / "task.yaml"), *args),
        *("--log_samples", "--output_path", str(folder / "out")),
        *("--model_args", ",".join(f"{name}={value}" for name, value in about.items())),
        cwd=folder,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HOME=str(folder / "huggingface"),
    )
    (results,) = folder.glob("out/**/results_*.json")
    (samples,) = folder.glob("out/**/samples_*.jsonl")
    found = json.loads(results.read_text())["results"]["plait_small"]
    return found, [json.loads(line) for line in samples.read_text().splitlines()]


QUESTIONS = [
    {"context": "What is 347 * 526?", "target": "182522"},
    {"context": "What is 12 * 34?", "target": "408"},
    {"context": "What is 7 * 9?", "target": "63"},
]


def test_lm_eval_generates_through_completions(server: Running, tmp_path: Path) -> None:
    found, samples = lm_eval(server, tmp_path, GENERATE, QUESTIONS, model="plait-tiny", tokenizer_backend="none")
    assert found["exact_match,answer"] == 1.0
    assert "<Path>" in samples[0]["resps"][0][0]


def test_lm_eval_generates_through_chat(server: Running, tmp_path: Path) -> None:
    found, samples = lm_eval(
        *(server, tmp_path, GENERATE, QUESTIONS, "--apply_chat_template"),
        kind="local-chat-completions",
        model="plait-tiny",
        num_concurrent=2,
    )
    assert found["exact_match,answer"] == 1.0
    assert [sample["resps"][0][0] for sample in samples] == [row["target"] for row in QUESTIONS]


SHORT = [{"context": "What is 3 + 4?", "target": "7"}, {"context": "What is 7 * 9?", "target": "63"}]
"""Every token of a scored text is a call of the engine."""


def test_lm_eval_compares_log_likelihoods(server: Running, tmp_path: Path) -> None:
    model = plait.load_model(TWIN)
    rows: list[dict[str, Any]] = []
    for row in SHORT:
        # What the model itself wrote up to its answer; a wrong one goes on from the same text.
        body = {"model": TWIN, "prompt": row["context"], "temperature": 0}
        text = server.post("/v1/completions", body).json()["choices"][0]["text"]
        prompt = model.tokenizer.decode(model.request(row["context"]).prompt_ids[1:])
        context = prompt + text.partition("\nAnswer: ")[0]
        answers = (str(int(row["target"]) + 1), row["target"])
        rows.append({"context": context, "choices": [f"\nAnswer: {n}" for n in answers], "target": 1})
    found, samples = lm_eval(server, tmp_path, CHOOSE, rows, model=TWIN, tokenizer_backend="remote")
    assert found["acc,none"] == 1.0
    # The same by hand, from the engine's own numbers.
    (first,) = [sample for sample in samples if sample["doc"]["context"] == rows[0]["context"]]
    (likelihood, greedy) = first["filtered_resps"][1]
    context, choice = rows[0]["context"], rows[0]["choices"][1]
    body = {"model": TWIN, "prompt": context + choice, "echo": True, "logprobs": 1, "max_tokens": 0}
    logprobs = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    after = [p for p, at in zip(logprobs["token_logprobs"], logprobs["text_offset"], strict=True) if at >= len(context)]
    assert len(after) == len(model.tokenizer.encode(choice))
    assert float(likelihood) == pytest.approx(sum(after), abs=0.05)
    assert str(greedy) == "True"


def test_litellm_reads_reasoning_and_streams(server: Running) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        litellm = pytest.importorskip("litellm", reason="litellm is not installed")
        asked: dict[str, Any] = {
            "model": "hosted_vllm/plait-tiny",
            "api_base": f"{server.url}/v1",
            "api_key": "none",
            "messages": [{"role": "user", "content": "What is 347 * 526?"}],
        }
        whole = litellm.completion(**asked)
        stream = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    message = whole.choices[0].message
    assert message.content == "182522", str(whole)
    assert message.reasoning_content.count("<Path>") == 3
    assert whole.choices[0].finish_reason == "stop"
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "182522"
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == message.reasoning_content
    assert whole.usage.completion_tokens == stream[-1].usage.completion_tokens > 100
