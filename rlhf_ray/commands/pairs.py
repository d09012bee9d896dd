"""`rlhf-ray pairs`: preferences of an AI judge, of rewards or of a reward model."""

from __future__ import annotations

from rlhf_ray.commands.options import ConfigFile, DryRun, Overrides, RunDir, print_dry_run
from rlhf_ray.models.library_logs import quiet_libraries


def pairs(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
) -> None:
    """Preference pairs from a model's own answers, labelled by an AI judge, reward functions or a reward model."""
    from rlhf_ray.config.feedback import PairsConfig
    from rlhf_ray.config.load import load_config

    settings = load_config(config, overrides or [], PairsConfig)
    if dry_run:
        print_dry_run(settings)
        return
    quiet_libraries(settings.device)
    from rlhf_ray.feedback.pairs import describe, run_pairs

    result = run_pairs(settings, run_dir, note=print)
    print(describe(result))
    print(f"The pairs are in {result['run_dir']}/pairs.jsonl: rlhf-ray rm | dpo ... data.path=<that file>")
