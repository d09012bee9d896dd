"""Equality with TRL 1.16 on whole batches: its own DPOTrainer and RewardTrainer take one step, and so do we.

Everything is compared that both report: the loss, the rewards, accuracies, margins and log-probabilities, and the norm
of the gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config.supervised import DPOLossConfig
from rlhf_ray.data.examples import LabelledAnswer, TokenizedExample, TokenizedPair
from rlhf_ray.models.classifiers import load_classifier
from rlhf_ray.models.loading import load_policy
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import char_tokenizer
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.kto import KTO, KTOTrainer
from rlhf_ray.roles.objectives import BradleyTerry
from rlhf_ray.roles.preferences import DPO, ReferenceFree
from rlhf_ray.roles.supervised import SupervisedTrainer

pytestmark = pytest.mark.slow  # importing TRL takes ten seconds

TIGHT = {"rel": 1e-6, "abs": 1e-6}
PROMPTS = ["ab", "c", "abc", "ba"]
CHOSEN = ["0123", "9", "45", "777777"]
REJECTED = ["98", "1234", "54321", "0"]


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer("abc0123456789")


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer) -> str:
    """A small policy whose logits are scaled up, so that the two answers of a pair differ."""
    folder = tmp_path_factory.mktemp("policy")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_scratch("qwen2", vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2, max_length=32,
                          tie_embeddings=False, **ids)  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(30.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": len(PROMPTS), "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "max_grad_norm": 1e9, "learning_rate": 1e-3,
    }  # fmt: skip


def first_logs(trainer: Any) -> dict[str, float]:
    trainer.train()
    return trainer.state.log_history[0]


def pairs(tokenizer) -> list[TokenizedPair]:
    def example(prompt: str, answer: str) -> TokenizedExample:
        start, ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        whole = (*start, *ids, tokenizer.eos_token_id)
        return TokenizedExample(whole, tuple(place >= len(start) for place in range(len(whole))))

    rows = zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    return [TokenizedPair(example(prompt, good), example(prompt, bad)) for prompt, good, bad in rows]


def dataset():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo(trl, tokenizer, policy, tmp_path, kind):
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 32}
    reference = build_scratch("qwen2", vocab_size=len(tokenizer), seed=5, **shape)
    reference.save_pretrained(tmp_path / "reference")
    config = trl.DPOConfig(**options(tmp_path), beta=0.3, loss_type=[kind], precompute_ref_log_probs=False)
    theirs = first_logs(trl.DPOTrainer(
        model=load_policy(policy), ref_model=load_policy(tmp_path / "reference"), args=config, train_dataset=dataset(),
        processing_class=tokenizer,
    ))  # fmt: skip
    objective = DPO(tokenizer.pad_token_id, DPOLossConfig(beta=0.3, kind=kind))
    trainer = SupervisedTrainer(
        TorchEngine(load_policy(policy), max_grad_norm=1e9), objective,
        {"train": pairs(tokenizer)}, tokens_per_microbatch=10_000, tokenizer=tokenizer,
    )  # fmt: skip
    trainer.set_reference(trainer.reference_logprobs(str(tmp_path / "reference")))
    ours = trainer.step(range(len(PROMPTS)), lr=1e-3)
    names = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
             "logps/rejected", "loss", "grad_norm"]  # fmt: skip
    assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, **TIGHT)
    assert abs(theirs["rewards/margins"]) > 0.01 and theirs["grad_norm"] > 0.01


@pytest.mark.parametrize("paired", [False, True])
def test_kto(trl, tokenizer, policy, tmp_path, paired):
    """The KL from mismatched answers included; of pairs TRL makes all good rows and then all bad ones.

    The policy is flat and the reference sharp, so that the KL of random answers is above 0.
    """
    from datasets import Dataset

    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 32}
    build_scratch("qwen2", vocab_size=len(tokenizer), seed=5, **shape).save_pretrained(tmp_path / "flat")
    labels = [True, False, True, True]
    data, rows = dataset(), []
    if paired:
        rows = [(p.chosen, True) for p in pairs(tokenizer)] + [(p.rejected, False) for p in pairs(tokenizer)]
    else:
        data = Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN, "label": labels})
        rows = [(p.chosen, label) for p, label in zip(pairs(tokenizer), labels, strict=True)]
    config = trl.KTOConfig(**{**options(tmp_path), "per_device_train_batch_size": len(rows)}, beta=0.3,
                           desirable_weight=1.2, undesirable_weight=0.7, max_length=32,
                           precompute_ref_log_probs=False)  # fmt: skip
    theirs = first_logs(trl.KTOTrainer(
        model=load_policy(tmp_path / "flat"), ref_model=load_policy(policy), args=config, train_dataset=data,
        processing_class=tokenizer,
    ))  # fmt: skip
    loss = DPOLossConfig(kind="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    trainer = KTOTrainer(
        TorchEngine(load_policy(tmp_path / "flat"), max_grad_norm=1e9), KTO(tokenizer.pad_token_id, loss),
        {"train": [LabelledAnswer(row.token_ids, row.learned, good=good) for row, good in rows]},
        tokens_per_microbatch=40, tokenizer=tokenizer, max_length=32,
    )  # fmt: skip
    trainer.set_reference(trainer.reference_logprobs(policy, [range(len(rows))]))
    ours = trainer.step(range(len(rows)), lr=1e-3)
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl", "loss",
             "grad_norm"]  # fmt: skip
    assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, **TIGHT)
    assert abs(theirs["rewards/margins"]) > 0.01 and theirs["grad_norm"] > 0.01 and theirs["kl"] > 0.01


@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL calls this trainer experimental
def test_simpo(trl, tokenizer, policy, tmp_path):
    """ORPO's trainer is not comparable: its supervised part is over prompt and answer, the paper's over the answer."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(
        **options(tmp_path), beta=1.5, loss_type="simpo", simpo_gamma=0.7, cpo_alpha=0.0, max_length=32,
        disable_dropout=True,
    )  # fmt: skip
    theirs = first_logs(CPOTrainer(model=load_policy(policy), args=config, train_dataset=dataset(),
                                   processing_class=tokenizer))  # fmt: skip
    objective = ReferenceFree(tokenizer.pad_token_id, DPOLossConfig(kind="simpo", beta=1.5, gamma=0.7))
    trainer = SupervisedTrainer(
        TorchEngine(load_policy(policy), max_grad_norm=1e9), objective,
        {"train": pairs(tokenizer)}, tokens_per_microbatch=10_000, tokenizer=tokenizer,
    )  # fmt: skip
    ours = trainer.step(range(len(PROMPTS)), lr=1e-3)
    names = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
             "logps/rejected", "loss", "grad_norm"]  # fmt: skip
    assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, **TIGHT)
    assert abs(theirs["rewards/margins"]) > 0.01 and theirs["grad_norm"] > 0.01


@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 1.0, 2.0]])
def test_reward_model(trl, tokenizer, policy, tmp_path, margins):
    model = load_classifier(policy, labels=["score"], pad_token_id=tokenizer.pad_token_id, seed=3)
    with torch.no_grad():
        model.score.weight.mul_(30.0)
    model.save_pretrained(tmp_path / "start")
    data = dataset()
    if margins is not None:
        data = data.add_column("margin", margins)
    config = trl.RewardConfig(**options(tmp_path), disable_dropout=True)
    theirs = first_logs(
        trl.RewardTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    )
    rows = [TokenizedPair(p.chosen, p.rejected, m) for p, m in zip(pairs(tokenizer), margins or [0.0] * 4, strict=True)]
    ours_model = load_classifier(tmp_path / "start", labels=["score"], pad_token_id=tokenizer.pad_token_id, seed=4)
    trainer = SupervisedTrainer(
        # TRL's rows end with EOS, and so do ours here.
        TorchEngine(ours_model, max_grad_norm=1e9), BradleyTerry(tokenizer.pad_token_id),
        {"train": rows}, tokens_per_microbatch=10_000, tokenizer=tokenizer,
    )  # fmt: skip
    ours = trainer.step(range(len(PROMPTS)), lr=1e-3)
    names = ["accuracy", "margin", "mean_reward", "min_reward", "max_reward", "loss", "grad_norm"]
    assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, **TIGHT)
    assert theirs["max_reward"] - theirs["min_reward"] > 0.01 and theirs["grad_norm"] > 0.01
