"""P-GRPO with TRL 1.16 on 8 GPUs: vLLM on two of them, the trainer on six.

    pip install plait 'trl[vllm]==1.16.0'
    CUDA_VISIBLE_DEVICES=6,7 VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --data-parallel-size 2 --port 8000 \
        --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs
    CUDA_VISIBLE_DEVICES=0,1,2,3,4,5 accelerate launch --config_file configs/trl/fsdp_6gpu.yaml \
        configs/trl/pgrpo_8gpu.py MODEL train.jsonl runs/trl

MODEL is a folder whose tokenizer holds the format's tags as tokens. train.jsonl has a line `{"prompt", "answer"}` a
question; see `plait.train.pretrained.records`. Only the main process samples, as TRL's own worker does.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from plait.engines import open_engine
from plait.train.handoff.scoring import exact
from plait.train.handoff.trl import PlaitRolloutWorker
from plait.train.pretrained.records import Records
from plait.train.pretrained.tokenizer import open_tokenizer
from plait.types import Budget

SERVER, SEED = "http://127.0.0.1:8000", 1


def config(out: str, **more: Any) -> AsyncGRPOConfig:
    return AsyncGRPOConfig(
        **more,
        output_dir=out,
        vllm_server_base_url=SERVER,
        learning_rate=1e-6,
        num_generations=8,
        max_steps=350,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=16,
        gradient_checkpointing=True,
        bf16=True,
        max_completion_length=16384,
        max_staleness=2,
        epsilon=0.2,
        epsilon_high=0.28,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=20,
    )


def main(model: str, data: str, out: str) -> None:
    fast, tokenizer = open_tokenizer(model)
    records = Records(data)
    worker = PlaitRolloutWorker(
        lambda number: records.prompt(records.at(number, seed=SEED), tokenizer=tokenizer, grade=exact),
        engine=lambda: open_engine("http", urls=SERVER, kind="vllm", share_prefill=True),
        format="threadweaver",
        tokenizer=tokenizer,
        group_size=8,
        groups=32,
        budget=Budget(max_tokens=16384, max_threads=32),
        reward={"correctness": {}, "acceleration": {"variant": "paper"}, "format_validity": {}},
        seed=SEED,
    )
    trainer = AsyncGRPOTrainer(
        model=model,
        args=config(out),
        processing_class=fast,
        # The worker asks; TRL counts epochs by it.
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in records.split("train")]),
        rollout_worker=worker,
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
