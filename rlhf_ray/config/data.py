"""Settings of a dataset for supervised training, reward models and preferences: what it is, how it is read and cleaned.

Prompts for reinforcement learning have a section of their own (`DataConfig` in config/schema.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_ray.config.given import RowsPath
from rlhf_ray.config.sections import Section
from rlhf_ray.config.sources import AS_SECTION, SeveralSources, SourceConfig

DataType = Literal[
    "prompt",
    "prompt_completion",
    "instruction",
    "text",
    "labelled",
    "messages",
    "preference",
    "ranked",
    "unpaired",
    "verl",
]


class ColumnsConfig(Section):
    """Names of the columns, where they differ from the usual ones (`columns.prompt: question`)."""

    prompt: str | None = Field(None, description="the prompt: a text, or messages")
    completion: str | None = Field(None, description="the answer to the prompt")
    text: str | None = Field(None, description="a whole text, to learn or to classify")
    messages: str | None = Field(None, description="a whole conversation")
    chosen: str | None = Field(None, description="preference: the better answer, or the conversation with it")
    rejected: str | None = Field(None, description="preference: the worse answer, or the conversation with it")
    margin: str | None = Field(None, description="preference: how much better chosen is, a number")
    label: str | None = Field(None, description="labelled: the text's class; unpaired: whether the answer is good")
    completions: str | None = Field(None, description="ranked: the list of answers, best first")
    scores: str | None = Field(None, description="ranked: their scores, where the list is in no order")
    instruction: str | None = Field(None, description="instruction: what is to be done")
    input: str | None = Field(None, description="instruction: what it is to be done with")
    output: str | None = Field(None, description="instruction: the answer")
    system: str | None = Field(None, description="the system message, where it is no message of the row")
    history: str | None = Field(None, description="earlier turns: a list of [user, assistant] pairs, or messages")
    tools: str | None = Field(None, description="JSON schemas of the tools, a list or its JSON text")
    chat_template_kwargs: str | None = Field(None, description="variables for the chat template")


class CleaningConfig(Section):
    """What is left out, and counted by reason. What is switched off stays in; an empty row is then an error."""

    duplicates: bool = Field(True, description="rows that say exactly what an earlier row said")
    empty: bool = Field(True, description="rows whose text is empty or blank")
    identical: bool = Field(True, description="pairs whose chosen and rejected answers are the same")
    min_response_tokens: int = Field(1, ge=0, description="shorter answers are left out; EOS does not count")
    near_duplicates: float | None = Field(
        None, ge=0.3, le=1, description="rows that are so much alike an earlier one (0.8: of the word triples that the "
        "two have, four in five are in both); empty: off"
    )  # fmt: skip
    overlap: Literal["report", "drop"] = Field(
        "report", description="rows of `path` whose prompt is also asked in eval_path or eval.test_path"
    )
    privacy: Literal["none", "count", "mask"] = Field(
        "none", description="mail addresses, telephone, card, identity and bank account numbers; mask: [EMAIL], ..."
    )


class DatasetSourceConfig(SourceConfig):
    """One of several sources. What it leaves empty is as in the section that it stands in."""

    eval_split: str | None = Field(None, description=AS_SECTION)
    type: Literal["auto", DataType] | None = Field(None, description=AS_SECTION)
    columns: ColumnsConfig | None = None
    learn: Literal["all", "last"] | None = Field(None, description=AS_SECTION)


class DatasetConfig(SeveralSources):
    """Rows to learn from, and those that are held out: docs/data.md."""

    split: str = Field("train", description="of a folder or a Hugging Face dataset")
    eval_path: RowsPath | None = Field(None, description="held-out rows; empty: eval_size rows of `path`")
    eval_split: str = Field("test", description="of eval_path, where that is a folder or a Hugging Face dataset")
    eval_size: int = Field(0, ge=0, description="rows held out, never with a prompt that is also trained on")
    type: Literal["auto", DataType] = Field("auto", description="auto: from the columns of the first row")
    columns: ColumnsConfig = ColumnsConfig()
    learn: Literal["all", "last"] = Field("all", description="conversations: which of the assistant's turns")
    max_length: int = Field(2048, gt=1, description="tokens of a whole sequence, EOS included")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="sequences above max_length: end the run, leave the row out, or cut the sequence's end off"
    )
    cleaning: CleaningConfig = CleaningConfig()
    sources: list[DatasetSourceConfig] = Field([], description="several sources, instead of `path`")


class SFTDataConfig(DatasetConfig):
    """What a policy goes on to learn while it is reinforced (`algorithm.sft_coef`): rows as `sft` reads them."""

    batch_size: int = Field(32, gt=0, description="rows of each optimiser step")
