"""Model folders as other programs and other people find them: the tokenizer's own ids, and files that may be read."""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_ray.models import generic_tokenizer

_CONFIG = "tokenizer_config.json"
_OWN_CODE = Path(generic_tokenizer.__file__)
_OWN_CLASS = [None, f"{_OWN_CODE.stem}.{generic_tokenizer.GenericTokenizer.__name__}"]


def save_folder(
    folder: Path, model: Any = None, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> None:
    """`save_pretrained` of a model (with `options`), a tokenizer, or both, so that `from_pretrained` gives them back.

    `AutoTokenizer` too gives the tokenizer back, and the files have the permissions that a new file gets there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        if type(tokenizer) is PreTrainedTokenizerFast:
            _keep_generic(folder)
    follow_umask(folder)


def _keep_generic(folder: Path) -> None:
    """Let AutoTokenizer take the generic class for the tokenizer in `folder`, whose rules are all in tokenizer.json.

    AutoTokenizer looks at the model's config.json first. For some kinds of model (qwen2) it knows that folders on the
    Hub name a wrong class, and puts the rules of that model's own tokenizer in place of the saved ones: other ids. It
    does not where the tokenizer has code of its own; and where it may not run that, it takes the class that is named.
    """
    file = folder / _CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("auto_map") == {"AutoTokenizer": _OWN_CLASS}:
        del settings["auto_map"]  # of the folder that it was loaded from
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # versions before 5 do not know TokenizersBackend
    _write(file, settings)
    if "auto_map" in settings or type(_as_others_load(folder)) is PreTrainedTokenizerFast:
        return
    shutil.copyfile(_OWN_CODE, folder / _OWN_CODE.name)
    _write(file, {**settings, "auto_map": {"AutoTokenizer": _OWN_CLASS}})


def _as_others_load(folder: Path) -> Any:
    # False: nobody is asked whether code beside the model may run.
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def follow_umask(folder: Path) -> None:
    """Let whoever may read a new file of `folder` read all of them: safetensors makes its files for the owner alone."""
    probe = folder / f".{uuid.uuid4().hex[:8]}"  # asks the umask, or the folder's access list that goes before it
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for entry in os.scandir(folder):
        mode, owner = stat.S_IMODE(entry.stat().st_mode), entry.stat().st_uid
        if entry.is_file(follow_symlinks=False) and owner == os.geteuid() and mode | usual != mode:
            os.chmod(entry.path, mode | usual)
