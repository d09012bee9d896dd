"""Equality with TRL 1.16, by running its trainers' own methods.

The losses are computed inside trainer methods, so these are called with a stand-in for the trainer that holds the
options they read. The advantages are taken from a real trainer's first step.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlhf_ray.algo import advantages
from rlhf_ray.algo.aggregation import loss_totals, loss_weights
from rlhf_ray.algo.kl import kl_loss
from rlhf_ray.algo.logprobs import token_entropy, token_logprobs
from rlhf_ray.algo.policy_losses import cispo_loss, clipped_loss, gspo_loss
from rlhf_ray.algo.preference import bradley_terry_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss

pytestmark = pytest.mark.slow  # importing TRL takes ten seconds

TIGHT = {"rtol": 1e-6, "atol": 1e-9}


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)


class OneProcess:
    """What the loss methods ask of accelerate, in a single process."""

    num_processes, device = 1, torch.device("cpu")

    def gather(self, x, **_):
        return x

    gather_for_metrics = reduce = gather


def trainer(**options):
    defaults = {
        "accelerator": OneProcess(), "_metrics": {"train": defaultdict(list)},
        "model": SimpleNamespace(training=True), "aux_loss_enabled": False, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "beta": 0.0, "importance_sampling_level": "token", "use_vllm": False,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "epsilon_low": 0.2,
        "epsilon_high": 0.28, "max_completion_length": 50,
    }  # fmt: skip
    args = SimpleNamespace(delta=options.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1)
    return SimpleNamespace(args=args, **{**defaults, **options})


def grpo_loss_of(trl, rollout, **options):
    mask_BT = rollout.mask_BT.double()
    self = trainer(**options)
    self._get_per_token_logps_and_entropies = lambda *_, **__: (rollout.logp_BT, torch.zeros_like(mask_BT), None)
    inputs = {
        "prompt_ids": torch.zeros(12, 1), "prompt_mask": torch.ones(12, 1), "completion_ids": mask_BT.long(),
        "completion_mask": mask_BT, "advantages": rollout.adv_B, "old_per_token_logps": rollout.old_BT,
        "ref_per_token_logps": rollout.ref_BT, "num_items_in_batch": mask_BT.sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(self, None, inputs)


def mean_loss(loss_BT: torch.Tensor, mask_BT: torch.Tensor, mode: str) -> torch.Tensor:
    tokens, sequences = loss_totals(mask_BT).tolist()
    weight_BT = loss_weights(mask_BT, mode, total_tokens=tokens, total_sequences=sequences, constant=50)
    return (loss_BT * weight_BT).sum()


def same_loss(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **TIGHT)
    (our_grad,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs, leaf)
    assert our_grad.abs().max() > 0
    torch.testing.assert_close(our_grad, their_grad, **TIGHT)


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [("grpo", "seq_mean"), ("bnpo", "token_mean"), ("dapo", "token_mean"), ("dr_grpo", "seq_sum_const")],
)
@pytest.mark.parametrize("delta", [None, 1.5])
def test_clipped_loss_two_sided_clip_and_aggregation(trl, rollout, loss_type, mode, delta):
    expected = grpo_loss_of(trl, rollout, loss_type=loss_type, delta=delta)
    loss_BT = clipped_loss(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, rollout.mask_BT,
                           clip_low=0.2, clip_high=0.28, dual_clip=delta)  # fmt: skip
    same_loss(mean_loss(loss_BT, rollout.mask_BT, mode), expected, rollout.logp_BT)


def test_kl_in_the_loss_is_k3_with_its_own_gradient(trl, rollout):
    expected = grpo_loss_of(trl, rollout, loss_type="grpo", beta=0.3)
    loss_BT = clipped_loss(
        rollout.logp_BT, rollout.old_BT, rollout.adv_BT, rollout.mask_BT, clip_low=0.2, clip_high=0.28
    )
    loss_BT = loss_BT + 0.3 * kl_loss(rollout.logp_BT, rollout.ref_BT, "k3", unbiased_gradient=False)
    same_loss(mean_loss(loss_BT, rollout.mask_BT, "seq_mean"), expected, rollout.logp_BT)


def test_gspo(trl, rollout):
    options = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    expected = grpo_loss_of(trl, rollout, **options, epsilon_low=0.05, epsilon_high=0.1)
    loss_BT = gspo_loss(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, rollout.mask_BT, clip_low=0.05, clip_high=0.1)
    same_loss(mean_loss(loss_BT, rollout.mask_BT, "seq_mean"), expected, rollout.logp_BT)


def test_cispo_whose_epsilon_high_is_the_cap_itself_in_trl(trl, rollout):
    expected = grpo_loss_of(trl, rollout, loss_type="cispo", epsilon_high=1.2)
    loss_BT = cispo_loss(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, rollout.mask_BT, clip_high=0.2)
    same_loss(mean_loss(loss_BT, rollout.mask_BT, "token_mean"), expected, rollout.logp_BT)


def test_log_probs_and_entropy(trl):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    torch.manual_seed(0)
    logits_BTV = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    tokens_BT = torch.randint(0, 7, (3, 5))
    for ours, theirs in (
        (token_logprobs(logits_BTV, tokens_BT, 0.7), selective_log_softmax(logits_BTV[:, :-1] / 0.7, tokens_BT[:, 1:])),
        (token_entropy(logits_BTV, 0.7), entropy_from_logits(logits_BTV[:, :-1] / 0.7)),
    ):
        same_loss((ours[:, 1:] ** 2).sum(), (theirs**2).sum(), logits_BTV)
        torch.testing.assert_close(ours[:, 1:], theirs, **TIGHT)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo(trl, rollout, kind):
    """TRL takes [chosen, rejected] halves of one batch; its IPO divides each sum by the number of its tokens."""
    mask_BT = rollout.mask_BT
    self = trainer(
        loss_types=[kind], loss_weights=[1.0], beta=0.3, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", use_weighting=False, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    logp_BT = rollout.logp_BT * mask_BT
    padded_mask_BT = torch.nn.functional.pad(mask_BT, (1, 0))  # a prompt of one token
    outputs = SimpleNamespace(log_probs=logp_BT, entropy=logp_BT, mean_logits=logp_BT, is_top1=mask_BT)
    ref_B = (rollout.ref_BT * mask_BT).sum(1)
    inputs = {"input_ids": padded_mask_BT.long(), "completion_mask": padded_mask_BT.long(),
              "attention_mask": padded_mask_BT.long(), "ref_chosen_logps": ref_B[:6],
              "ref_rejected_logps": ref_B[6:]}  # fmt: skip
    expected = trl.DPOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)
    length_B = mask_BT.sum(1) if kind == "ipo" else 1
    policy_B, ref_B = logp_BT.sum(1) / length_B, ref_B / length_B
    loss_B, chosen_B, _ = dpo_loss(policy_B[:6], policy_B[6:], ref_B[:6], ref_B[6:], 0.3, kind=kind)
    same_loss(loss_B.mean(), expected, rollout.logp_BT)
    if kind == "sigmoid":
        assert chosen_B.mean().item() == pytest.approx(self._metrics["train"]["rewards/chosen"][0])


def test_reward_model_loss_with_margin(trl):
    score_B = torch.randn(8, 1, dtype=torch.float64, requires_grad=True)
    margin_B = torch.rand(4).double()
    self = trainer(_total_train_tokens=0, _tp_size=1)
    self.args.center_rewards_coefficient = None
    inputs = {"margin": margin_B, "attention_mask": torch.ones(8, 3)}
    expected = trl.RewardTrainer.compute_loss(self, lambda **_: SimpleNamespace(logits=score_B), inputs)
    ours = bradley_terry_loss(score_B[:4, 0], score_B[4:, 0], margin_B).mean()
    same_loss(ours, expected, score_B)


@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL calls these trainers experimental
def test_simpo_and_orpo_without_a_reference(trl):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    mean_B = -torch.rand(8, dtype=torch.float32).add(0.05)
    mean_B.requires_grad_(True)
    chosen_B, rejected_B = mean_B.chunk(2)
    self = trainer(beta=2.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0)
    expected_B, _, _ = CPOTrainer.cpo_loss(self, chosen_B, rejected_B)
    same_loss(simpo_loss(chosen_B, rejected_B, 2.0, gamma=0.7).mean(), expected_B.mean(), mean_B)
    # TRL returns what it subtracts from a supervised loss of its own, which is over prompt and answer.
    odds_B, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), chosen_B, rejected_B)
    same_loss(orpo_loss(chosen_B, rejected_B, 0.3).mean(), -chosen_B.mean() - odds_B.mean(), mean_B)


def test_kto(trl, rollout):
    """TRL sorts a batch into good and bad answers, and takes the KL from the batch's mismatched ones."""
    logp_BT = rollout.logp_BT * rollout.mask_BT
    mask_BT = torch.nn.functional.pad(rollout.mask_BT, (1, 0)).long()
    good_B = torch.tensor([1, 0, 0] * 4)
    ref_B, (kl_B, ref_kl_B) = (rollout.ref_BT * rollout.mask_BT).sum(1), torch.rand(2, 12).double() * 3
    self = trainer(
        beta=0.3, loss_type="kto", calculate_KL=True, precompute_ref_logps=True, desirable_weight=1.5,
        undesirable_weight=0.5, _total_train_tokens=0, _tp_size=1, _compute_kl_logps=lambda *_: kl_B,
    )  # fmt: skip
    outputs = SimpleNamespace(log_probs=logp_BT, entropy=logp_BT, mean_logits=logp_BT, is_top1=rollout.mask_BT)
    inputs = {"input_ids": mask_BT, "completion_mask": mask_BT, "attention_mask": mask_BT, "label": good_B.bool(),
              "ref_logps": ref_B, "ref_KL_logps": ref_kl_B}  # fmt: skip
    expected = trl.KTOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)
    kl = (kl_B - ref_kl_B).mean()
    ours_B, _ = kto_loss(
        logp_BT.sum(1), ref_B, good_B, kl, 0.3, desirable_weight=1.5, undesirable_weight=0.5
    )  # fmt: skip
    same_loss(ours_B.mean(), expected, rollout.logp_BT)


# ---- advantages, from the first step of a real trainer ----------------------------------------------------


def first_step(trl, name: str, folder, **options) -> dict[str, torch.Tensor]:
    """The tensors a GRPO or RLOO trainer hands to its loss; every completion's reward is a function of its tokens."""
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlhf_ray.models.tokenizers import char_tokenizer

    torch.manual_seed(3)
    tokenizer = char_tokenizer("ab0123456789")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    seen: dict[str, torch.Tensor] = {}

    def reward(completion_ids, **_):
        scores = [float(sum(i * t for i, t in enumerate(ids, 1)) % 17) for ids in completion_ids]
        seen["reward_B"] = torch.tensor(scores)
        return scores

    class Spy(getattr(trl, f"{name}Trainer")):
        def _compute_loss(self, model, inputs):
            seen.update({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
            return super()._compute_loss(model, inputs)

    config = getattr(trl, f"{name}Config")(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=8, num_generations=4, beta=0.0,
        max_completion_length=6, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, shuffle_dataset=False,
        save_strategy="no", **options,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["a1", "b2"]})
    Spy(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer).train()
    return seen


GROUP_B = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(("name", "options", "estimator"), [
    ("GRPO", {"scale_rewards": "group"}, lambda r: advantages.grpo(r, GROUP_B)),
    ("GRPO", {"scale_rewards": "none"}, lambda r: advantages.dr_grpo(r, GROUP_B)),
    ("RLOO", {}, lambda r: advantages.rloo(r, GROUP_B)),
])  # fmt: skip
def test_advantages_of_a_real_trainer(trl, tmp_path, name, options, estimator):
    seen = first_step(trl, name, tmp_path, **options)
    # TRL shuffles the generated batch before it splits it: compare as sets of (reward, advantage)
    ours = sorted(zip(estimator(seen["reward_B"]).tolist(), strict=True))
    theirs = sorted(zip(seen["advantages"].tolist(), strict=True))
    assert len({x for (x,) in ours}) > 3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
