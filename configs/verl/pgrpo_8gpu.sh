#!/usr/bin/env bash
# P-GRPO with verl 0.9.1 on one node of 8 GPUs of 80 GB: Qwen3-8B with ThreadWeaver's tags, vLLM beside FSDP.
#
#   pip install plait 'verl[vllm]==0.9.1'
#   MODEL=/models/qwen3-8b-threadweaver TRAIN=train.parquet VAL=val.parquet configs/verl/pgrpo_8gpu.sh
#
# MODEL is a folder whose tokenizer holds the tags as tokens: `plait train sft` with a [base] leaves one. The data are
# verl's own: `prompt` (messages), `reward_model.ground_truth`, `data_source`. More settings may follow as arguments.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
exec python3 -m verl.trainer.main_ppo \
  trainer.use_v1=true \
  data.train_files="${TRAIN:?}" data.val_files="${VAL:?}" data.train_batch_size=128 \
  data.max_prompt_length=1024 data.max_response_length=16384 data.return_raw_chat=true data.truncation=error \
  actor_rollout_ref.model.path="${MODEL:?}" actor_rollout_ref.model.enable_gradient_checkpointing=true \
  actor_rollout_ref.model.use_remove_padding=true \
  actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.ppo_mini_batch_size=128 \
  actor_rollout_ref.actor.use_dynamic_bsz=true actor_rollout_ref.actor.ppo_max_token_len_per_gpu=36864 \
  actor_rollout_ref.actor.loss_agg_mode=token-mean \
  actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 \
  actor_rollout_ref.actor.use_kl_loss=false actor_rollout_ref.actor.entropy_coeff=0 \
  actor_rollout_ref.actor.fsdp_config.param_offload=true actor_rollout_ref.actor.fsdp_config.optimizer_offload=true \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.mode=async actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.gpu_memory_utilization=0.7 \
  actor_rollout_ref.rollout.temperature=1.0 actor_rollout_ref.rollout.top_p=1.0 \
  actor_rollout_ref.rollout.enable_prefix_caching=true actor_rollout_ref.rollout.calculate_log_probs=true \
  actor_rollout_ref.rollout.agent.default_agent_loop=plait \
  actor_rollout_ref.rollout.agent.agent_loop_config_path="$here/agent_loop.yaml" \
  algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=false algorithm.use_kl_in_reward=false \
  trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.total_epochs=1 trainer.save_freq=20 trainer.test_freq=20 \
  trainer.project_name=plait trainer.experiment_name=pgrpo "$@"
