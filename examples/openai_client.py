"""OpenAI's own client, with the threads of an answer as they think.

    pip install '.[serve]' openai
    plait serve &
    python examples/openai_client.py [http://127.0.0.1:8000/v1] ["What is 4631 * 8274?"]

Any client works unchanged: reasoning comes in the order of the finished text. `"stream": "interleaved"` is what adds
to each delta the thread that said it, so several threads can be shown at once.
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(base_url: str = "http://127.0.0.1:8000/v1", question: str = "What is 4631 * 8274?") -> None:
    client = OpenAI(base_url=base_url, api_key="none")
    stream = client.chat.completions.create(
        model="plait-tiny",
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"plait": {"stream": "interleaved", "max_tokens": 1500}},
    )
    said: dict[str, str] = {}
    answer = closing = ""
    for chunk in stream:
        if chunk.usage is not None:
            usage = (chunk.usage.model_extra or {})["plait"]
            closing = f"{chunk.usage.completion_tokens} tokens, {usage['critical_path_tokens']} on the critical path"
        for choice in chunk.choices:
            extra = choice.delta.model_extra or {}
            match extra.get("plait"):
                case {"ev": "open", "thread": thread, "parent": str(parent), "outline": outline}:
                    print(f"thread {thread} of {parent} is told {outline!r}")
                case {"ev": "delta", "thread": thread}:
                    said[thread] = said.get(thread, "") + extra.get("reasoning", "")
                case {"ev": "close", "thread": thread}:
                    print(f"thread {thread} said {said[thread].strip()}")
            answer += choice.delta.content or ""
    print(f"answer: {answer}\n{closing}")


if __name__ == "__main__":
    main(*sys.argv[1:])
