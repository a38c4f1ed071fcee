"""A file of questions as a taskset of verifiers: put this folder on PYTHONPATH; `prime_rl_8gpu.toml` says the rest.

A line is `{"prompt", "answer"}`, as for `plait train rl`. Rewards: right, and fast if right (the acceleration of
ThreadWeaver's paper), from what the harness noted of the run under `plait` in the trace's info.
"""

import verifiers.v1 as vf

from plait.train.handoff.scoring import exact
from plait.train.pretrained.records import Records
from plait.train.rewards import Group, Outcome, acceleration


class QuestionData(vf.TaskData):
    answer: str


class Question(vf.Task[QuestionData]):
    def _right(self, trace: vf.Trace) -> bool:
        return exact(trace.root_reply or "", self.data.answer)

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(self._right(trace))

    @vf.reward(weight=1.0)
    async def fast(self, trace: vf.Trace) -> float:
        noted = trace.info.get("plait", {})
        outcome = Outcome(
            correct=self._right(trace),
            response_tokens=noted.get("response_tokens", 0),
            token_latency=noted.get("token_latency", 0),
        )
        return acceleration(outcome, Group(outcomes=[outcome], step=0, done=0.0), variant="paper")


class QuestionsConfig(vf.TasksetConfig):
    path: str = "questions.jsonl"


class Questions(vf.Taskset[Question, QuestionsConfig]):
    def load(self) -> list[Question]:
        records = Records(self.config.path).split("train")
        return [Question(QuestionData(prompt=r["prompt"], answer=str(r["answer"])), self.config.task) for r in records]


__all__ = ["Questions"]
