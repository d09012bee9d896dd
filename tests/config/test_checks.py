"""Every contradiction, beside the nearest settings that are fine."""

import sys

import pytest

from rlhf_ray.errors import ConfigError

SCRATCH = ("model.path=scratch:qwen2", "model.tokenizer.path=scratch:char", "data.max_prompt_tokens=8",
           "rollout.max_new_tokens=8", "data.path=task:arithmetic")  # fmt: skip
PTX = ("algorithm.sft_coef=0.1", "sft_data.path=x.jsonl")
LSTM = (*SCRATCH, "model.path=scratch:lstm")
RAY = ("executor=ray",)
LATE = (*RAY, "rollout.max_staleness=1", "algorithm.correction=truncate")
VLLM = (*RAY, "generator.engine=vllm")
SHARED = (*VLLM, "ray.colocate=true", "device=cuda")
DEEPSPEED = (*RAY, "learner.engine=deepspeed")

# (settings that contradict each other, the start of the message, what it must name as a way out, a way out)
CASES = {
    "group of one": (["rollout.group_size=1"], "grpo: rollout.group_size=1 makes every advantage 0",
                     "set rollout.group_size >= 2", ["rollout.group_size=2"]),
    "adaptive from 0": (["algorithm.kl_controller=adaptive"], "algorithm.kl_controller=adaptive multiplies",
                        "set a positive kl_coef", ["algorithm.kl_controller=adaptive", "algorithm.kl_coef=0.1"]),
    "adaptive with an end": (
        ["algorithm.kl_controller=adaptive", "algorithm.kl_coef=0.1", "algorithm.kl_coef_end=0.2"],
        "algorithm.kl_controller=adaptive decides the coefficient from the KL it sees", "or set kl_controller=fixed",
        ["algorithm.kl_coef=0.1", "algorithm.kl_coef_end=0.2"]),
    "stop of one": (["learner.stop_kl=0.1"], "learner.stop_kl=0.1 ends a step's further passes", "learner.epochs",
                    ["learner.stop_kl=0.1", "learner.epochs=2"]),
    "two temperatures": (["rollout.temperature_end=0.5", "rollout.temperatures=[0.5,1]"],
                         "rollout.temperature_end moves rollout.temperature", "set one of the two",
                         ["rollout.temperature_end=0.5"]),
    "ptx without rows": (["algorithm.sft_coef=0.1"], "algorithm.sft_coef=0.1 has no rows to learn",
                         "set sft_data.path", ["algorithm.sft_coef=0.1", "sft_data.path=x.jsonl"]),
    "ptx rows without a coefficient": (["sft_data.path=x.jsonl"], "algorithm.sft_coef is 0, so the rows of sft_data",
                                       "remove sft_data", ["algorithm.sft_coef=0.1", "sft_data=[x.jsonl, y.jsonl]"]),
    "ptx rows held out": ([*PTX, "sft_data.eval_size=4"], "sft_data.eval_path and sft_data.eval_size hold rows out",
                          "remove them", PTX),
    "two chat templates": ([*PTX, "sft_data.chat_template=zephyr"], "sft_data.chat_template=zephyr: a model has one",
                           "set data.chat_template for both",
                           [*PTX, "sft_data.chat_template=zephyr", "data.chat_template=zephyr"]),
    "long ptx rows": ([*SCRATCH, *PTX, "sft_data.max_length=129"], "sft_data.max_length=129 exceeds",
                      "lower the data's", [*SCRATCH, *PTX, "sft_data.max_length=128"]),
    "ptx template": ([*PTX, "sft_data.template=none", "sft_data.system_prompt=x"], "sft_data.template=none uses no",
                     "set sft_data.template=chat", [*PTX, "sft_data.system_prompt=x"]),
    "no reward": (["rewards=[]"], "no reward: every advantage would be 0", "set rewards or reward_model.path",
                  ["rewards=[]", "reward_model.path=x"]),
    "reward name": (["rewards.0.function=my.py:mean"], "rewards.0: the name mean is taken", "set rewards.0.name",
                    ["rewards.0.function=my.py:mean", "rewards.0.name=quality"]),
    "reinforce twice": (["algorithm.name=reinforce", "learner.epochs=2"],
                        "algorithm.policy_loss=policy_gradient has no importance ratio", "learner.epochs=1",
                        ["algorithm.name=reinforce", "learner.epochs=2", "algorithm.policy_loss=clipped"]),
    "minibatches": (["rollout.prompts_per_step=6", "learner.minibatches=4"],
                    "rollout.prompts_per_step=6 is not divisible by learner.minibatches=4", "make it a multiple",
                    ["rollout.prompts_per_step=8", "learner.minibatches=4"]),
    "critic minibatches": (["algorithm.name=ppo", "rollout.prompts_per_step=6", "critic.minibatches=4"],
                           "rollout.prompts_per_step=6 is not divisible by critic.minibatches=4",
                           "make it a multiple", ["rollout.prompts_per_step=6", "critic.minibatches=4"]),
    "too many ranks": ([*DEEPSPEED, "learner.world_size=5", "rollout.prompts_per_step=2", "rollout.group_size=2"],
                       "learner.world_size=5 ranks share 4 samples", "use fewer ranks or more samples",
                       [*DEEPSPEED, "learner.world_size=4", "rollout.prompts_per_step=2", "rollout.group_size=2"]),
    "too long": ([*SCRATCH, "model.scratch.max_length=15"],
                 "data.max_prompt_tokens + rollout.max_new_tokens = 16 exceeds model.scratch.max_length=15",
                 "raise max_length", [*SCRATCH, "model.scratch.max_length=16"]),
    "eval size": (["eval.size=10", "data.eval_size=9"], "eval.size=10 exceeds data.eval_size=9",
                  "raise data.eval_size", ["eval.size=9", "data.eval_size=9"]),
    "unknown scratch": ([*SCRATCH, "model.path=scratch:bert"], "model.path=scratch:bert is not a built-in model",
                        "use scratch:qwen2", [*SCRATCH, "model.path=scratch:gpt2"]),
    "heads": ([*SCRATCH, "model.scratch.hidden_size=10"], "model.scratch.hidden_size=10 is not divisible by",
              "make it a multiple", [*LSTM, "model.scratch.hidden_size=10"]),
    "odd heads": ([*SCRATCH, "model.scratch.hidden_size=12"], "model.scratch.hidden_size/heads=3 is odd",
                  "choose an even head size", [*SCRATCH, "model.path=scratch:gpt2", "model.scratch.hidden_size=12"]),
    "no tokenizer": ([*SCRATCH, "model.tokenizer.path=null"], "a model from scratch has no tokenizer of its own",
                     "set model.tokenizer.path", [*SCRATCH, "model.tokenizer.path=some/folder"]),
    "unknown tokenizer": ([*SCRATCH, "model.tokenizer.path=scratch:wrod"],
                          "model.tokenizer.path=scratch:wrod is not a built-in tokenizer", "use scratch:char",
                          [*SCRATCH, "model.tokenizer.path=scratch:word"]),
    "new tokenizer": (["model.tokenizer.path=scratch:bpe"], "model.tokenizer.path=scratch:bpe makes a new vocabulary",
                      "remove model.tokenizer.path", ["model.tokenizer.path=other/folder"]),
    "lstm mlp": ([*LSTM, "model.scratch.intermediate_size=9"], "model.scratch.intermediate_size: scratch:lstm",
                 "remove it", [*SCRATCH, "model.scratch.intermediate_size=9"]),
    "lstm vllm": ([*LSTM, "generator.engine=vllm"], "generator.engine=vllm cannot serve scratch:lstm",
                  "set generator.engine=hf", [*SCRATCH, "generator.engine=vllm"]),
    "lstm lora": ([*LSTM, "model.lora.r=2"], "model.lora: scratch:lstm has no linear layer", "remove model.lora",
                  [*SCRATCH, "model.lora.r=2"]),
    "lstm sharing prompts": ([*LSTM, "learner.share_prompts=true"],
                             "learner.share_prompts: the state of scratch:lstm", "set it to false",
                             [*SCRATCH, "learner.share_prompts=true"]),
    "lstm checkpointing": ([*LSTM, "learner.gradient_checkpointing=true"],
                           "learner.gradient_checkpointing has nothing to recompute", "set it to false",
                           [*SCRATCH, "learner.gradient_checkpointing=true"]),
    "torch ranks": ([*RAY, "learner.world_size=2"], "learner.engine=torch runs in one process",
                    "set learner.engine=deepspeed", [*DEEPSPEED, "learner.world_size=2"]),
    "local ranks": (["learner.engine=deepspeed", "learner.world_size=2"],
                    "executor=local is one process, learner.world_size=2 is not", "set executor=ray",
                    [*DEEPSPEED, "learner.world_size=2"]),
    "offload": (["learner.offload=optimizer"], "learner.offload=optimizer is DeepSpeed's",
                "set learner.engine=deepspeed", ["learner.engine=deepspeed", "learner.offload=optimizer"]),
    "offload parameters": ([*DEEPSPEED, "learner.offload=parameters"], "learner.offload=parameters needs",
                           "learner.zero_stage=3", [*DEEPSPEED, "learner.offload=parameters", "learner.zero_stage=3"]),
    "deepspeed on mps": (["learner.engine=deepspeed", "device=mps"], "learner.engine=deepspeed has no MPS backend",
                         "set learner.engine=torch", ["device=mps"]),
    "critic on mps": (["algorithm.name=ppo", "critic.engine=deepspeed", "device=mps"],
                      "critic.engine=deepspeed has no MPS backend", "set critic.engine=torch",
                      ["critic.engine=deepspeed", "device=mps"]),
    "generators": (["generator.count=2"], "executor=local has one generator, generator.count=2",
                   "set executor=ray", [*RAY, "generator.count=2"]),
    "rewards": (["reward.count=2"], "executor=local is one process, reward.count=2 is not", "set executor=ray",
                [*RAY, "reward.count=2"]),
    "references": (["reference.count=2", "algorithm.kl_coef=0.1"], "executor=local is one process, reference.cou",
                   "set executor=ray", [*RAY, "reference.count=2", "algorithm.kl_coef=0.1"]),
    "no reference": ([*RAY, "reference.count=2"], "reference.count=2, and this run holds no reference (algorithm.kl",
                     "remove it", [*RAY, "reference.count=2", "algorithm.kl_coef_end=0.1"]),
    "functions over ranks": ([*RAY, "reward.world_size=2"], "reward.world_size=2 ranks hold reward_model and safety",
                             "reward.count for more", [*RAY, "reward.world_size=2", "safety.path=x"]),
    "a reference over ranks": (["reference.world_size=2", "algorithm.kl_coef=0.1"],
                               "executor=local is one process, reference.world_size=2 is not", "set executor=ray",
                               [*RAY, "reference.world_size=2", "algorithm.kl_coef=0.1"]),
    "lstm over ranks": ([*LSTM, *RAY, "reference.world_size=2", "algorithm.kl_coef=0.1"],
                        "reference.world_size=2: ZeRO-3 cannot take the layers of scratch:lstm", "set it to 1",
                        [*LSTM, *RAY, "reference.count=2", "algorithm.kl_coef=0.1"]),
    "ranks on mps": ([*RAY, "reference.world_size=2", "algorithm.kl_coef=0.1", "device=mps"],
                     "reference.world_size=2 needs DeepSpeed", "set it to 1",
                     [*RAY, "reference.count=2", "algorithm.kl_coef=0.1", "device=mps"]),
    "reference on a shared gpu": (
        [*VLLM, "reference.world_size=2", "algorithm.kl_coef=0.1", "ray.gpus_per_worker=0.5", "device=cuda"],
        "reference.world_size=2 is a group that needs whole GPUs", "or reference.world_size=1",
        [*VLLM, "reference.count=2", "algorithm.kl_coef=0.1", "ray.gpus_per_worker=0.5", "device=cuda"]),
    "colocated reference": (
        [*SHARED, "reference.world_size=2", "algorithm.kl_coef=0.1"],
        "ray.colocate: reference.count * reference.world_size=2 exceeds learner.world_size=1", "lower it",
        [*SHARED, "reference.world_size=2", "algorithm.kl_coef=0.1", "device=cpu"]),
    "its own reference": ([*RAY, "reference.count=2", "algorithm.kl_coef=0.1", "model.lora.r=2"],
                          "reference.count=2, and this run holds no reference (a LoRA policy", "remove it",
                          [*RAY, "algorithm.kl_coef=0.1", "model.lora.r=2"]),
    "vllm on mps": (["generator.engine=vllm", "device=mps"], "generator.engine=vllm does not run on a Mac",
                    "set generator.engine=hf", ["generator.engine=vllm", "device=cuda"]),
    "tensor parallel": (["generator.tensor_parallel=2"], "generator.tensor_parallel is vLLM's",
                        "set generator.engine=vllm", [*RAY, "generator.tensor_parallel=2"]),
    "tensor parallel on cpu": ([*RAY, "generator.tensor_parallel=2", "device=cpu"],
                               "generator.tensor_parallel is vLLM's", "set generator.engine=vllm",
                               [*VLLM, "generator.tensor_parallel=2", "device=cpu"]),
    "hot vllm": (["generator.engine=vllm", "rollout.temperature=2.5"],
                 "generator.engine=vllm samples at temperatures up to 2.0, not rollout.temperature=2.5",
                 "set generator.engine=hf", ["rollout.temperature=2.5"]),
    "hot evaluation": (["generator.engine=vllm", "eval.temperature=2.5"],
                       "generator.engine=vllm samples at temperatures up to 2.0, not eval.temperature=2.5",
                       "set generator.engine=hf", ["eval.temperature=2.5"]),
    "local overlap": (["rollout.max_staleness=1", "algorithm.correction=mask"],
                      "rollout.max_staleness overlaps generation with learning", "set executor=ray", [*LATE]),
    "colocated overlap": ([*LATE, "ray.colocate=true"], "ray.colocate lets generator and learner take turns",
                          "choose one", [*RAY, "ray.colocate=true"]),
    "uncorrected": ([*RAY, "rollout.max_staleness=1"], "rollout.max_staleness=1 learns from answers that older",
                    "set algorithm.correction=truncate", [*LATE]),
    "in process on ray": ([*RAY, "sync.transport=in_process"], "sync.transport=in_process passes tensors by reference",
                          "use shared_memory", [*RAY, "sync.transport=shared_memory"]),
    "nccl on cpu": ([*RAY, "sync.transport=nccl", "device=cpu"], "sync.transport=nccl moves CUDA memory",
                    "use shared_memory", [*VLLM, "sync.transport=nccl", "device=cuda"]),
    "nccl to hf": ([*RAY, "generator.engine=hf", "sync.transport=nccl", "device=cuda"],
                   "sync.transport=nccl ends in vLLM, and generator.engine=hf receives by shared_memory only",
                   "set sync.transport=shared_memory", [*RAY, "sync.transport=shared_memory", "device=cuda"]),
    "ipc between gpus": ([*VLLM, "sync.transport=cuda_ipc"], "sync.transport=cuda_ipc shares the memory of one GPU",
                         "set ray.colocate=true", [*VLLM, "sync.transport=cuda_ipc", "ray.colocate=true"]),
    "nccl on a shared gpu": ([*VLLM, "sync.transport=nccl", "ray.gpus_per_worker=0.5"],
                             "sync.transport=nccl cannot have two processes on one GPU", "set it to 1",
                             [*VLLM, "sync.transport=nccl", "ray.gpus_per_worker=2"]),
    "ranks on a shared gpu": (
        [*VLLM, "learner.engine=deepspeed", "learner.world_size=2", "ray.gpus_per_worker=0.5", "device=cuda"],
        "learner.world_size=2 is a group that needs whole GPUs", "set it to 1",
        [*VLLM, "learner.engine=deepspeed", "learner.world_size=2", "device=cuda"]),
    "tensor parallel on a shared gpu": (
        [*VLLM, "generator.tensor_parallel=2", "ray.gpus_per_worker=0.5", "device=cuda"],
        "generator.tensor_parallel=2 is a group that needs whole GPUs", "or generator.tensor_parallel=1",
        [*VLLM, "ray.gpus_per_worker=0.5", "device=cuda"]),
    "nccl on one gpu": ([*VLLM, "sync.transport=nccl", "ray.colocate=true"],
                        "sync.transport=nccl cannot have two processes on one GPU", "set sync.transport=cuda_ipc",
                        [*VLLM, "sync.transport=nccl"]),
    "colocated generators": ([*SHARED, "generator.count=2"],
                             "ray.colocate: 2 generators of 1 GPUs share the GPUs of learner.world_size=1",
                             "raise learner.world_size",
                             [*SHARED, "generator.count=2", "learner.engine=deepspeed", "learner.world_size=2"]),
    "colocated tensor parallel": (
        [*SHARED, "learner.engine=deepspeed", "learner.world_size=3", "generator.tensor_parallel=2"],
        "ray.colocate: 1 generators of 2 GPUs share the GPUs of learner.world_size=3", "a multiple of tensor_parallel",
        [*SHARED, "learner.engine=deepspeed", "learner.world_size=4", "generator.tensor_parallel=2"]),
    "colocated critic": (
        [*SHARED, "algorithm.name=ppo", "critic.engine=deepspeed", "critic.world_size=2"],
        "ray.colocate: critic.world_size=2 exceeds learner.world_size=1", "lower it",
        [*SHARED, "algorithm.name=ppo", "critic.engine=deepspeed", "critic.world_size=2", "device=cpu"]),
    "colocated rewards": (
        [*SHARED, "reward_model.path=x", "reward.count=2"],
        "ray.colocate: reward.count * reward.world_size=2 exceeds learner.world_size=1", "lower it",
        [*SHARED, "reward.count=2"]),  # functions need no GPU
    "packed shards": (["model.lora.quantize=nf4", "learner.engine=deepspeed"],
                      "model.lora.quantize=nf4 packs the weights, and ZeRO would cut", "set learner.engine=torch",
                      ["model.lora.quantize=nf4"]),
    "packed on mps": (["model.lora.quantize=nf4", "device=mps"], "model.lora.quantize=nf4 needs bitsandbytes",
                      "set device=cpu", ["model.lora.quantize=none", "device=mps"]),
    "bfloat16 on mps": (["device=mps", "dtype=bfloat16"], "dtype=bfloat16 on MPS loses log-probabilities",
                        "set dtype=float32 or auto", ["device=mps", "dtype=auto"]),
    "resampling without groups": (
        ["algorithm.name=remax", "algorithm.resample_rounds=2"], "algorithm.resample_rounds=2 replaces groups",
        "set algorithm.resample_rounds=0", ["algorithm.name=dapo", "algorithm.resample_rounds=2"]),
    "only references": (
        ["rollout.group_size=4", "rollout.reference_answers=4"], "rollout.reference_answers=4 leaves none",
        "lower reference_answers", ["rollout.group_size=4", "rollout.reference_answers=3"]),
    "idle temperatures": (
        ["rollout.group_size=3", "rollout.reference_answers=1", "rollout.temperatures=[1,1,2]"],
        "rollout.temperatures has 3 entries for 2 sampled", "shorten it",
        ["rollout.group_size=3", "rollout.reference_answers=1", "rollout.temperatures=[1,2]"]),
    "scheduled to nowhere": (
        ["algorithm.kl_controller=scheduled", "algorithm.kl_coef=0.1"],
        "algorithm.kl_controller=scheduled moves the target", "set both or neither",
        ["algorithm.kl_controller=scheduled", "algorithm.kl_coef=0.1", "algorithm.kl_target_end=2"]),
    "a target end alone": (["algorithm.kl_target_end=2"], "algorithm.kl_controller=scheduled moves the target",
                           "set both or neither", []),
    "two baselines": (
        ["algorithm.moving_baseline=true"], "algorithm.moving_baseline belongs to advantage=reinforce",
        "set algorithm.moving_baseline=false", ["algorithm.name=reinforce", "algorithm.moving_baseline=true"]),
    "normalised alone": (
        ["algorithm.name=ppo", "rollout.group_size=1", "algorithm.normalize_rewards=group"],
        "algorithm.normalize_rewards=group compares", "set normalize_rewards=running",
        ["algorithm.name=ppo", "rollout.group_size=2", "algorithm.normalize_rewards=group"]),
    "normalised without the greedy one": (
        ["algorithm.name=remax", "algorithm.normalize_rewards=group"], "algorithm.normalize_rewards=group rescales",
        "set normalize_rewards=running", ["algorithm.name=remax", "algorithm.normalize_rewards=running"]),
    "answers of cut texts": (
        ["warm_start.completion=answer", "data.prompt_words=4"], "warm_start.completion=answer names a column",
        "remove it", ["warm_start.completion=answer"]),
    "chat without a chat template": (
        ["data.template=alpaca", "data.system_prompt=x"], "data.template=alpaca uses no chat template",
        "set data.template=chat", ["data.template=chat", "data.system_prompt=x"]),
    "ipc locally": (["sync.transport=cuda_ipc"], "sync.transport=cuda_ipc connects processes", "use in_process",
                    ["sync.transport=in_process"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_contradiction_says_what_why_and_what_to_do(load, case):
    settings, start, remedy, way_out = CASES[case]
    with pytest.raises(ConfigError) as error:
        load(*settings)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"  - {start}") and remedy in lines[0]
    load(*way_out)


def test_vllm_on_a_mac(load, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="generator.engine=vllm does not run on a Mac"):
        load("generator.engine=vllm")


@pytest.mark.parametrize("name", ["ppo", "reinforce", "reinforce_pp", "remax"])
def test_one_answer_a_prompt_is_enough_without_a_group_baseline(load, name):
    load(f"algorithm.name={name}", "rollout.group_size=1")


def test_a_task_has_held_out_problems_of_its_own(load):
    load("data.path=task:arithmetic", "eval.size=500", "data.eval_size=1")
    load("data.eval_path=other.jsonl", "eval.size=500", "data.eval_size=1")


def test_the_critic_is_only_looked_at_where_there_is_one(load):
    load("critic.minibatches=5", "critic.world_size=64")


def test_what_a_config_says_about_its_roles(load):
    assert not load().uses_reference and not load().uses_critic and not load().uses_old_logprobs
    ppo = load("algorithm.name=ppo")
    assert ppo.uses_reference and ppo.uses_critic and ppo.uses_old_logprobs
    assert load("algorithm.kl_coef=0.1").uses_reference
    assert load("learner.minibatches=2").uses_old_logprobs and load("learner.epochs=2").uses_old_logprobs
    assert load("rollout.prompts_per_step=3", "rollout.group_size=5").samples_per_step == 15
