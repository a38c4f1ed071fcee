"""The agent loop against verl's own classes: `pytest -m servers` where verl is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import warnings
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    verl_loop = pytest.importorskip("verl.experimental.agent_loop.agent_loop", reason="needs verl")
    import hydra
    import torch
    from omegaconf import OmegaConf
    from verl.protocol import DataProto
    from verl.trainer.ppo.core_algos import AdvantageEstimator
    from verl.trainer.ppo.v1 import agent_loop_tq
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.workers.rollout.replica import TokenOutput

    from plait.train.handoff.verl import PlaitAgentLoop, VerlEngine

from handoff_data import gold_engine, pretrained_tokenizer, question
from plait.errors import EngineError, RequestError, UnsupportedJoin
from plait.tasks.vocabulary import TOKENIZER
from plait.types import SamplingParams

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("default")]
RECIPES = Path(__file__).parent.parent / "configs" / "verl"


class Servers:
    """Stands for `LLMServerClient`: answers as vLLM does, with what an engine of Plait says."""

    def __init__(self, engine: Any, **changes: Any) -> None:
        self.engine, self.changes, self.requests = engine, changes, []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        self.requests.append((request_id, prompt_ids, sampling_params))
        params = SamplingParams(
            max_tokens=sampling_params["max_tokens"],
            temperature=sampling_params["temperature"],
            seed=sampling_params.get("seed", 0),
            stop_ids=tuple(sampling_params["stop_token_ids"]),
            banned_ids=tuple(map(int, sampling_params.get("logit_bias", ()))),
        )
        ids: list[int] = []
        logs: list[float] = []
        async with aclosing(self.engine.generate((tuple(prompt_ids),), params)) as chunks:
            async for chunk in chunks:
                ids += chunk.token_ids
                logs += chunk.logprobs
        fields = {"token_ids": ids, "log_probs": logs, "stop_reason": "completed"} | self.changes
        return TokenOutput(**fields, extra_fields={"global_steps": 7})


def config(**rollout: Any) -> Any:
    settings = {"name": "vllm", "prompt_length": 64, "response_length": 4096, **rollout}
    return OmegaConf.create({"actor_rollout_ref": {"rollout": settings}, "data": {}})


def loop(servers: Any, **changes: Any) -> PlaitAgentLoop:
    """As verl's worker makes it, from the recipe's own file."""
    (entry,) = OmegaConf.load(RECIPES / "agent_loop.yaml")
    entry = OmegaConf.merge(entry, {"grader": "handoff_data:grade", **changes})
    settings = config()
    return hydra.utils.instantiate(
        config=entry,
        trainer_config=verl_loop.DictConfigWrap(config=settings),
        server_manager=servers,
        tokenizer=pretrained_tokenizer(),
        processor=None,
        hf_model_type="llama",
        dataset_cls=RLHFDataset,
        data_config=verl_loop.DictConfigWrap(settings.data),
        tools=verl_loop.ToolListWrap([]),
    )


async def answered(seed: int = 1, **changes: Any) -> tuple[list[Any], Servers]:
    text, truth = question(seed)
    async with gold_engine() as engine:
        servers = Servers(engine)
        outputs = await loop(servers, **changes).run(
            {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True},
            raw_prompt=[{"role": "user", "content": text}],
            reward_model={"ground_truth": truth},
            data_source="tasks",
            index=seed,
            session_id=0,
            global_steps=3,
        )
    return outputs, servers


def test_a_prompt_becomes_a_row_for_each_thread_with_the_root_last() -> None:
    outputs, servers = asyncio.run(answered())
    assert all(isinstance(output, verl_loop.AgentLoopOutput) for output in outputs)
    assert len(outputs) > 2
    for output in outputs:
        assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs)
        assert any(output.response_mask)
        assert output.reward_score == outputs[-1].reward_score
    # Each call's answer is trained once: as many trained tokens as the servers sampled.
    assert (
        sum(sum(output.response_mask) for output in outputs)
        == outputs[0].extra_fields["reward_extra_info"]["sampled_tokens"]
    )
    assert "Answer" in TOKENIZER.decode(outputs[-1].response_ids)
    assert len({request_id for request_id, *_ in servers.requests}) == 1, "one replica for one run"
    assert outputs[0].extra_fields["max_global_steps"] == 7


def test_the_reward_is_of_the_tree() -> None:
    outputs, _ = asyncio.run(answered())
    info = outputs[-1].extra_fields["reward_extra_info"]
    assert info["reward/correctness"] == 1.0
    assert info["reward/acceleration"] > 0
    assert outputs[-1].reward_score == pytest.approx(1 + info["reward/acceleration"])


def test_without_a_reward_it_is_verls_to_give() -> None:
    outputs, _ = asyncio.run(answered(reward=None))
    assert {output.reward_score for output in outputs} == {None}


def test_verls_worker_takes_the_list_and_its_advantage_is_one_a_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    put: dict[str, Any] = {}

    class Queue:
        async def async_kv_batch_put(self, *, keys: Any, fields: Any, tags: Any, partition_id: str) -> None:
            put.update({key: fields[i] for i, key in enumerate(keys)})

    monkeypatch.setattr(agent_loop_tq, "tq", Queue())
    worker_class = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class
    worker = object.__new__(worker_class)
    worker.reward_loop_worker_handles, worker.distillation_enabled, worker.processor = None, False, None
    worker.config, worker.mm_processor_kwargs = config(), {}

    async def both() -> list[float]:
        rewards = []
        for session, seed in enumerate((1, 2)):
            outputs, _ = await answered(seed)
            if session:
                for output in outputs:
                    output.reward_score = 0.25
            rewards.append(outputs[-1].reward_score)
            await worker._agent_loop_postprocess(outputs, False, uid="q", session_id=session, global_steps=3)
        return rewards

    rewards = asyncio.run(both())
    keys = list(put)
    width = max(len(put[key]["responses"]) for key in keys)

    def padded(name: str) -> torch.Tensor:
        rows = [put[key][name].float() for key in keys]
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])

    mask = padded("response_mask")
    data = DataProto.from_dict(
        tensors={"response_mask": mask, "token_level_rewards": padded("rm_scores")},
        non_tensors={"uid": ["q"] * len(keys)},
    )
    scored = compute_advantage_for_multi_trajectories(
        data, keys, AdvantageEstimator.GRPO, norm_adv_by_std_in_grpo=False
    )
    mean = sum(rewards) / 2
    for key, row, trained in zip(keys, scored.batch["advantages"], mask, strict=True):
        worth = rewards[int(key.split("_")[1])] - mean
        assert torch.allclose(row, worth * trained, atol=1e-6)


def test_what_a_server_may_not_do_is_said() -> None:
    async def one(**changes: Any) -> None:
        async with gold_engine() as engine:
            servers = Servers(engine, **changes)
            text, truth = question(1)
            await loop(servers).run(
                {"temperature": 1.0},
                raw_prompt=[{"role": "user", "content": text}],
                reward_model={"ground_truth": truth},
            )

    with pytest.raises(EngineError, match="calculate_log_probs=true"):
        asyncio.run(one(log_probs=None))
    with pytest.raises(EngineError, match="aborted"):
        asyncio.run(one(stop_reason="aborted"))
    with pytest.raises(EngineError, match=r"EngineProtocolError.*neither is a stop id"):
        asyncio.run(one(token_ids=[1, 2], log_probs=[0.0, 0.0]))


def test_what_cannot_work_is_refused_when_the_loop_is_made() -> None:
    with pytest.raises(Exception, match="multiverse format joins by merge") as caught:
        loop(None, format="multiverse")
    assert isinstance(caught.value.__cause__, UnsupportedJoin)
    with pytest.raises(Exception, match="looks at the group") as caught:
        loop(None, reward={"length_penalty": {}})
    assert isinstance(caught.value.__cause__, RequestError)


def test_a_declined_fork_and_each_server_are_asked_for_in_its_own_words() -> None:
    params = SamplingParams(max_tokens=50, temperature=1.0, seed=5, stop_ids=(3,), eos_ids=(4,), banned_ids=(9,))
    vllm = VerlEngine(None, server="vllm", max_context=8)._settings(params, 6)
    sglang = VerlEngine(None, server="sglang", max_context=8)._settings(params, 6)
    assert vllm["logit_bias"] == {9: -100.0}
    assert sglang["logit_bias"] == {"9": -100.0}
    assert vllm["ignore_eos"], "the ids that end a call are the format's"
    assert "ignore_eos" not in sglang, "it would turn the stop ids off"
    assert vllm["stop_token_ids"] == sglang["stop_token_ids"] == [3, 4]
    assert vllm["max_tokens"] == 6


def test_the_recipe_is_a_config_of_verls_trainer() -> None:
    script = (RECIPES / "pgrpo_8gpu.sh").read_text().partition("verl.trainer.main_ppo")[2]
    words = [w for w in script.split() if "=" in w]
    overrides = [re.sub(r'"\$.*', "/somewhere", w) for w in words]
    folder = Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "config"
    with hydra.initialize_config_dir(config_dir=str(folder), version_base=None):
        composed = hydra.compose(config_name="ppo_trainer", overrides=overrides)
    assert composed.actor_rollout_ref.rollout.agent.default_agent_loop == "plait"
    assert composed.algorithm.norm_adv_by_std_in_grpo is False
    assert len(overrides) > 30
