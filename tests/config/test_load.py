"""YAML and overrides: what is accepted, and what the refusal says."""

import re

import pytest
import yaml

from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.formula_names import ADVANTAGES, POLICY_LOSSES
from rlhf_ray.config.load import dump_config, load_config, on_device, parse_config
from rlhf_ray.config.reward_server import RewardServerConfig
from rlhf_ray.config.rewards import RewardConfig, right_by
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import SCHEMAS
from rlhf_ray.errors import ConfigError

COMMANDS = {
    "rl": RunConfig, "eval": EvalRunConfig, "pairs": PairsConfig, "serve-reward": RewardServerConfig, **SCHEMAS
}  # fmt: skip


def problems(error: pytest.ExceptionInfo) -> list[str]:
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


# ---- unknown keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "stepz: unknown key; did you mean steps?"),
        ("learner.leanring_rate=1", "learner.leanring_rate: unknown key; valid keys: engine, world_size,"),
        ("learner.max_grad_nrom=1", "learner.max_grad_nrom: unknown key; did you mean learner.max_grad_norm?"),
        ("model.tokenizer.vocabsize=9", "model.tokenizer.vocabsize: unknown key; did you mean "
                                        "model.tokenizer.vocab_size?"),
        ("rewards.0.wieght=2", "rewards.0.wieght: unknown key; did you mean rewards.0.weight?"),
        ("model.lora.alhpa=2", "model.lora.alhpa: unknown key; did you mean model.lora.alpha?"),
        ("reward_model={path: x, outptu: prob}", "reward_model.outptu: unknown key; did you mean reward_model.output?"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_valid_one(load, override, message):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert len(problems(error)) == 1 and problems(error)[0].startswith(message)


def test_reward_arguments_are_free(load):
    assert load("rewards.0.args.anything=3").rewards[0].args == {"anything": 3}


# ---- all at once ----------------------------------------------------------------------------------------------


def test_all_errors_at_once(load):
    with pytest.raises(ConfigError) as error:
        load("sede=1", "steps=0", "rollout.group_size=1", "nonsense", "algorithm.name=gppo", "rollout.top_p=2")
    found = problems(error)
    assert str(error.value).splitlines()[0].endswith("run.yaml: 6 problems")
    assert found[0] == "override 'nonsense' is not of the form section.key=value"
    assert {text.partition(":")[0] for text in found[1:]} == {
        "sede", "steps", "algorithm.name", "rollout.top_p", "grpo",
    }  # fmt: skip
    assert "steps: input should be greater than 0 (got 0)" in found
    assert any(text.startswith("grpo: rollout.group_size=1 makes every advantage 0") for text in found)


def test_a_contradiction_with_a_misspelled_setting_is_not_invented(load):
    with pytest.raises(ConfigError) as error:
        load("rewards=[]", "reward_modle.path=x")
    assert problems(error) == ["reward_modle: unknown key; did you mean reward_model?"]


def test_a_wrong_value_inside_a_union_does_not_hide_the_rest(load):
    with pytest.raises(ConfigError) as error:
        load("model.lora.target_modules=3", "rollout.group_size=1")
    assert any(text.startswith("grpo: ") for text in problems(error))


def test_what_is_required_and_missing(write):
    with pytest.raises(ConfigError) as error:
        load_config(write({"model": {}, "rewards": [{"weight": 2}]}))
    assert problems(error) == [f"{name}: required and not set" for name in ("model.path", "data", "rewards.0.function")]


def test_an_empty_section(load):
    with pytest.raises(ConfigError, match="rollout: is empty; give it a value, or remove the line"):
        load("rollout=null")


def test_a_choice_keeps_its_spelling(load):
    with pytest.raises(ConfigError, match=r"device: input should be 'auto', 'cuda', 'mps' or 'cpu' \(got 'TPU'\)"):
        load("device=TPU")


# ---- files ----------------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_near_one(tmp_path, write, tree):
    write(tree)
    with pytest.raises(ConfigError, match=r"runn.yaml does not exist; did you mean .*run.yaml\?"):
        load_config(tmp_path / "runn.yaml")
    with pytest.raises(ConfigError, match="is a folder; name a YAML file"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"x.yaml does not exist$"):
        load_config(tmp_path / "nowhere" / "x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"run.yaml is not valid YAML.*line 1"),
        ("- 1\n- 2\n", "expected a mapping of settings at the top, found list"),
        ("", "expected a mapping of settings at the top, found NoneType"),
        ("seed: 1\nseed: 2\n", r"the key 'seed' comes twice.*\n.*line 2"),
        ("learner:\n  lr: 1\n  lr: 2\n", r"the key 'lr' comes twice"),
        ("name: !!int abc\n", r"is not valid YAML: this cannot be read as a value of type int.*line 1"),
        (r'name: "\U00110000"', "is not valid YAML: "),
    ],
)
def test_a_broken_file(write, text, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(write(text))


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(name)


def test_a_key_that_is_no_text(tree):
    """Pydantic names no place for it; a tree from Python may also hold what YAML cannot."""
    for key, says in ((1, "1: a key must be text"), (None, "None: a key must be text"), ("a\ud800", "the settings: ")):
        with pytest.raises(ConfigError, match=f"here: 1 problem\n  - {says}"):
            parse_config({**tree, key: 1}, RunConfig, "here")


def test_a_wrong_value_is_shown_in_part(tree):
    """12 levels of ten items each would be a text of gigabytes."""
    bomb = ["x"] * 10
    for _ in range(11):
        bomb = [bomb] * 10
    for value, shown in ((bomb, "(got [["), ("word " * 10_000, "(got 'word "), ({"a": bomb}, "(got {'a': [[")):
        with pytest.raises(ConfigError) as error:
            parse_config({**tree, "steps": value}, RunConfig, "here")
        assert shown in str(error.value) and len(str(error.value)) < 1500
    with pytest.raises(ConfigError) as error:
        parse_config({**tree, "n" * 100_000: 1, "steps": 0}, RunConfig, "here")
    assert len(str(error.value)) < 3000 and "steps: " in str(error.value), "the other problem is not lost in it"


@pytest.mark.parametrize(("setting", "most"), [
    ("model.scratch.hidden_size", 1 << 16), ("model.scratch.layers", 1 << 10), ("model.scratch.heads", 1 << 16),
    ("model.scratch.intermediate_size", 1 << 20), ("model.scratch.max_length", 1 << 24),
    ("model.tokenizer.vocab_size", 1 << 24), ("learner.world_size", 1 << 14), ("generator.count", 1 << 14),
    ("generator.tensor_parallel", 1 << 14),
])  # fmt: skip
def test_sizes_beyond_any_machine(load, setting, most):
    """Built layer by layer, planned worker by worker, they would take hours, or more bytes than an integer holds."""
    with pytest.raises(ConfigError, match=rf"{setting}: input should be less than or equal to {most}"):
        load(f"{setting}={most + 1}")
    try:
        load(f"{setting}={most}")
    except ConfigError as error:
        assert f"{setting}: input" not in str(error), "other settings may speak against it, its own bound does not"


# ---- overrides ------------------------------------------------------------------------------------------------


def test_values_are_yaml(load):
    config = load(
        "learner.lr=1e-6", "rollout.temperature=.7", "name=1-first", "eval.every=5", "model.lora={r: 4}",
        "learner.betas=[0.8, 0.9]", "sync.canary=false", "data.field=null", "rewards.0.args.per_token=2E-3",
    )  # fmt: skip
    assert config.learner.lr == 1e-6 and config.rollout.temperature == 0.7 and config.eval.every == 5
    assert config.name == "1-first" and config.model.lora.r == 4 and config.learner.betas == (0.8, 0.9)
    assert config.sync.canary is False and config.data.field is None
    assert config.rewards[0].args == {"per_token": 0.002}, "a number also where nothing says that it must be one"


def test_a_file_reads_1e_6_as_a_number_too(write, tree):
    tree["rewards"][0]["args"] = {"x": "PLACE"}
    text = yaml.safe_dump(tree).replace("PLACE", "1e-6")
    assert load_config(write(text)).rewards[0].args == {"x": 1e-6}
    quoted = yaml.safe_dump(tree).replace("PLACE", "'1e-6'")
    assert load_config(write(quoted)).rewards[0].args == {"x": "1e-6"}


def test_words_that_python_reads_as_numbers_stay_words(load):
    assert load("name=infinity").name == "infinity"
    assert load("name=nan").name == "nan"


def test_a_value_may_hold_an_equals_sign(load):
    assert load("name=a=b").name == "a=b"


def test_a_list_item_by_its_index(load):
    assert load("rewards.0.weight=2").rewards[0].weight == 2
    assert load("rewards.0={function: sentiment}").rewards[0].function == "sentiment"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        ("rewards.1.weight=2", "override 'rewards.1.weight=2': '1' is not an index into a list of 1"),
        ("rewards.first=2", "'first' is not an index into a list of 1"),
        ("rewards.²=2", "'²' is not an index into a list of 1"),
        ("model.path.x=2", "model.path is a value, not a section"),
        ("model.path.x.y=2", "'x' lies below a value, not a section"),
        ("steps=[1", "the value is not valid YAML"),
    ],
)
def test_overrides_of_a_wrong_form(load, override, message):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert message in str(error.value)


# ---- presets --------------------------------------------------------------------------------------------------


def test_a_preset_fills_what_is_not_set(load):
    ppo = load("algorithm.name=ppo").algorithm
    assert (ppo.advantage, ppo.kl_in, ppo.kl_estimator, ppo.kl_coef, ppo.whiten_advantages) == (
        "gae", "reward", "k1", 0.05, True,
    )  # fmt: skip
    gspo = load("algorithm.name=gspo").algorithm
    assert (gspo.policy_loss, gspo.clip_low, gspo.clip_high, gspo.aggregation) == ("gspo", 3e-4, 4e-4, "seq_mean")


def test_what_is_set_by_hand_wins_over_the_preset(load):
    ppo = load("algorithm.name=ppo", "algorithm.kl_coef=0.2", "algorithm.kl_in=loss").algorithm
    assert (ppo.kl_coef, ppo.kl_in, ppo.advantage) == (0.2, "loss", "gae")


def test_the_algorithm_as_an_override_over_a_file_with_other_fields(write, tree):
    tree["algorithm"] = {"name": "grpo", "clip_high": 0.3, "kl_coef": 0.01}
    ppo = load_config(write(tree), ["algorithm.name=ppo"]).algorithm
    assert ppo.advantage == "gae" and ppo.whiten_advantages, "from ppo"
    assert (ppo.clip_high, ppo.kl_coef) == (0.3, 0.01), "from the file"


def test_a_registered_function_gets_the_settings_that_it_takes(load):
    algorithm = load("algorithm.clip_high=0.3", "algorithm.dual_clip=3").algorithm
    clipped, gradient, grpo = POLICY_LOSSES["clipped"], POLICY_LOSSES["policy_gradient"], ADVANTAGES["grpo"]
    assert algorithm.options_of(clipped.function) == {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}
    assert algorithm.options_of(gradient.function) == {}
    assert algorithm.options_of(grpo.function) == {"normalize_std": True}, "eps is no setting: the default holds"


@pytest.mark.parametrize(("override", "says"), [
    ("algorithm.policy_loss=cliped", "'cliped' is unknown: did you mean 'clipped'.* Your own: module:function"),
    ("algorithm.advantage=xyz", "'xyz' is unknown: the built-in ones are grpo, dr_grpo, rloo, .*file.py:function"),
    ("algorithm.policy_loss_args={beta: 1}", "policy_loss_args belongs to a function of your own.* remove policy"),
    ("algorithm.loss=mine.py:mine", "algorithm.loss.*algorithm.policy_loss"),
])  # fmt: skip
def test_names_of_losses_and_advantages(load, override, says):
    with pytest.raises(ConfigError, match=says):
        load(override)
    own = load("algorithm.policy_loss=mine.py:mine", "algorithm.advantage=mine:other", "rollout.group_size=1")
    assert own.algorithm.advantage_facts.baseline == "own", "nobody but its author knows what a group is to it"


@pytest.mark.parametrize("old", ["grpo", "gspo", "ppo"])
def test_the_algorithm_as_an_override_over_a_dumped_config(load, write, old):
    """A dump holds every field of its algorithm; only what differs from its preset was set by hand."""
    same = load(f"algorithm.name={old}", "algorithm.gamma=0.9")
    ppo = load("algorithm.name=ppo", "algorithm.gamma=0.9")
    explicit = load("algorithm.name=ppo", "algorithm.gamma=0.9", "algorithm.kl_coef=0.3")
    dumped = write(dump_config(same))
    assert load_config(dumped) == same
    assert load_config(dumped, ["algorithm.name=ppo"]) == ppo
    assert load_config(dumped, ["algorithm.kl_coef=0.3", "algorithm.name=ppo"]) == explicit


def passes(config) -> list[int]:
    return [getattr(section, name) for section in (config.learner, config.critic) for name in ("epochs", "minibatches")]


def test_ppo_goes_over_its_rollouts_several_times(load, write):
    assert passes(load("rollout.prompts_per_step=32")) == [1, 1, 1, 1]
    ppo = load("algorithm.name=ppo", "rollout.prompts_per_step=32")
    assert passes(ppo) == [4, 4, 4, 4]
    assert passes(load("algorithm.name=ppo", "rollout.prompts_per_step=6")) == [4, 2, 4, 2], "of one size"
    assert passes(load("algorithm.name=ppo", "learner.epochs=1", "critic={minibatches: 1}")) == [1, 4, 4, 1], "by hand"
    dumped = write(dump_config(ppo))
    assert passes(load_config(dumped)) == [4, 4, 4, 4]
    assert passes(load_config(dumped, ["algorithm.name=grpo"])) == [1, 1, 1, 1]
    by_hand = write(dump_config(load("algorithm.name=ppo", "learner.epochs=2")))
    assert passes(load_config(by_hand, ["algorithm.name=grpo"]))[0] == 2


@pytest.mark.parametrize(("rewards", "expected"), [
    ([{"function": "sentiment"}, {"function": "math"}, {"function": "regex"}], "math"),
    ([{"function": "code", "args": {"partial": True}}], None),
    ([{"function": "code", "args": {"partial": False}, "name": "passes"}], "passes"),
    ([{"function": "math", "binary": False}, {"function": "mine.py:good", "binary": True}], "good"),
    ([{"function": "mine.py:good"}], None),
    ([{"function": "http://host:8000/score", "binary": True}], "host:8000"),
])  # fmt: skip
def test_which_reward_says_what_is_right(rewards, expected):
    assert right_by([RewardConfig(**reward) for reward in rewards]) == expected


def test_a_name_that_is_no_name(load):
    with pytest.raises(ConfigError, match="algorithm.name: input should be 'grpo'"):
        load("algorithm.name=[ppo]")


@pytest.mark.parametrize("setting", ["steps", "learner.lr", "data.limit", "learner.zero_stage", "eval.temperature"])
def test_true_is_no_number(load, setting):
    with pytest.raises(ConfigError) as error:
        load(f"{setting}=true")
    assert problems(error) == [f"{setting}: input should be a number (got True)"]
    assert load("sync.canary=false", "rewards.0.args.flag=true").sync.canary is False


# ---- round trip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "ppo", "gspo", "reinforce"])
def test_what_is_dumped_reads_back_equal(load, write, name):
    config = load(f"algorithm.name={name}", "learner.lr=1e-7", "model.lora.r=4", "name='1e5'", "learner.betas=[.8,.9]")
    assert load_config(write(dump_config(config))) == config


def test_settings_cannot_be_changed_afterwards(load):
    with pytest.raises(ValueError, match="frozen"):
        load().learner.lr = 1.0


def test_every_config_of_the_repository_loads(repo_root):
    """The comment at the top of each file says which command it is for."""
    files = sorted((repo_root / "configs").glob("*.yaml"))
    assert files
    for path in files:
        said = re.search(rf"^#.*?rlhf-ray ([\w-]+) +configs/{path.name}", path.read_text(), re.MULTILINE)
        assert said, f"{path.name}: write its command into the comment, as `rlhf-ray <command> configs/{path.name}`"
        if said[1] not in COMMANDS:
            continue  # it is no single schema, and has a test of its own
        config = load_config(path, schema=COMMANDS[said[1]])
        assert parse_config(yaml.safe_load(dump_config(config)), COMMANDS[said[1]], "again") == config, path.name


def commands_in(text: str) -> list[tuple[str, str, list[str]]]:
    """(command, config, overrides) of every command in a file's comments; a backslash continues a line."""
    comments = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    found = re.findall(r"^ +rlhf-ray ([\w-]+) +(configs/\S+\.yaml)(.*)$", comments.replace("\\\n", " "), re.MULTILINE)
    return [(command, path, re.findall(r"(?<= )[a-z][\w.]*=\S+", rest)) for command, path, rest in found]


def test_commands_are_read_out_of_comments():
    text = "#   rlhf-ray rl configs/a.yaml steps=3 \\\n#     learner.lr=1e-6 --run-dir runs/a=b  # why\nname: x\n"
    assert commands_in(text) == [("rl", "configs/a.yaml", ["steps=3", "learner.lr=1e-6"])]


def test_every_command_in_a_comment_loads(repo_root, monkeypatch):
    """What people copy."""
    monkeypatch.setattr("sys.platform", "linux")  # some name vLLM
    with_overrides = []
    for file in sorted((repo_root / "configs").glob("*.yaml")):
        for command, path, overrides in commands_in(file.read_text()):
            if command in COMMANDS:
                load_config(repo_root / path, overrides, COMMANDS[command])
            with_overrides += [file.stem] if overrides else []
    assert {"grpo_arithmetic", "grpo_gsm8k", "pairs_reviews", "sft_alpaca"} <= set(with_overrides)


# ---- what only the machine can say ----------------------------------------------------------------------------


def test_auto_that_turns_out_to_be_mps(load):
    on_device(load(), "mps")  # Hugging Face generation and torch training are fine there
    config = load("generator.engine=vllm", "learner.engine=deepspeed")
    on_device(config, "cuda")
    with pytest.raises(ConfigError) as error:
        on_device(config, "mps")
    assert str(error.value).startswith("device=auto, which is mps here: 2 problems")
    assert problems(error) == [
        "learner.engine=deepspeed has no MPS backend; set learner.engine=torch or device=cpu",
        "generator.engine=vllm does not run on a Mac; set generator.engine=hf",
    ]


def test_auto_that_turns_out_to_have_no_cuda(load):
    config = load("executor=ray", "generator.engine=vllm", "sync.transport=nccl")
    on_device(config, "cuda")
    with pytest.raises(ConfigError, match="sync.transport=nccl moves CUDA memory and device=cpu; use shared_memory"):
        on_device(config, "cpu")


@pytest.mark.parametrize("device, executor, installed, engine", [
    ("cuda", "ray", True, "vllm"), ("cuda", "ray", False, "hf"), ("cuda", "local", True, "hf"),
    ("mps", "local", True, "hf"), ("cpu", "ray", True, "hf"), ("cpu", "local", True, "hf"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:generator.engine=auto is hf")
def test_the_generator_follows_the_device(load, monkeypatch, device, executor, installed, engine):
    monkeypatch.setattr("rlhf_ray.config.load.find_spec", lambda name: installed or None)
    config = load(f"executor={executor}")
    assert config.generator.engine == "auto"
    assert on_device(config, device).generator.engine == engine
    assert on_device(load(f"executor={executor}", "generator.engine=hf"), device).generator.engine == "hf"


@pytest.mark.parametrize("setting", ["rollout.temperature=2.5", "model.path=scratch:lstm", "ray.gpus_per_worker=0.5"])
def test_auto_is_no_engine_that_could_not_do_it(load, monkeypatch, setting):
    monkeypatch.setattr("rlhf_ray.config.load.find_spec", lambda name: True)
    scratch = ("model.path=scratch:qwen2", "model.scratch.max_length=2048", "model.tokenizer.path=scratch:char",
               "executor=ray")  # fmt: skip
    assert on_device(load(*scratch, "ray.gpus_per_worker=0.5", "ray.colocate=true"), "cuda").generator.engine == "vllm"
    assert on_device(load(*scratch), "cuda").generator.engine == "vllm"
    assert on_device(load(*scratch, setting), "cuda").generator.engine == "hf"


def test_what_is_vllms_waits_for_the_device(load, monkeypatch):
    config = load("executor=ray", "generator.tensor_parallel=2", "sync.transport=nccl")
    monkeypatch.setattr("rlhf_ray.config.load.find_spec", lambda name: True)
    assert on_device(config, "cuda").generator.engine == "vllm"
    monkeypatch.setattr("rlhf_ray.config.load.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error, pytest.warns(UserWarning, match="is hf, for vLLM is not installed where"):
        on_device(config, "cuda")
    assert str(error.value).startswith("device=auto, which is cuda here, and generator.engine=auto, which is hf: 2")
    assert problems(error) == [
        "generator.tensor_parallel is vLLM's; set generator.engine=vllm or generator.tensor_parallel=1",
        "sync.transport=nccl ends in vLLM, and generator.engine=hf receives by shared_memory only; "
        "set sync.transport=shared_memory (or auto), or generator.engine=vllm",
    ]


@pytest.mark.parametrize("value", [
    "{api_key: k-123}", "[{password: k-123}]", "{url: 'https://me:k-123@host/'}", "'https://host/?token=k-123'",
])  # fmt: skip
def test_a_wrong_value_is_quoted_without_its_secrets(load, value):
    with pytest.raises(ConfigError, match=r"learner.lr: .*\(got .*\*\*\*") as error:
        load(f"learner.lr={value}")
    assert "k-123" not in str(error.value)
