"""What a row asks: its prompt, with the system message, earlier turns and tools that stand in columns of their own."""

from __future__ import annotations

from rlhf_ray.data.chat import Chat, Instruction, Message, Messages, Prompt
from rlhf_ray.data.columns import Columns, Text
from rlhf_ray.data.dialogues import dialogue_messages, is_dialogue
from rlhf_ray.data.messages import text_of


def asked(columns: Columns) -> Prompt:
    """The prompt of a row whose answers stand beside it: its column `prompt`, its messages or its instruction."""
    if not columns.has("prompt"):
        if columns.has("messages"):
            return in_context(columns, checked_question(columns, columns.messages("messages"), "messages"))
        if columns.has("instruction"):
            return instructed(columns, columns)
    prompt = columns.text_or_messages("prompt")
    return in_context(columns, checked_question(columns, prompt, "prompt"))


def instructed(columns: Columns, given: Columns) -> Prompt:
    """An instruction and its `input`, which stands in `given`: the row, or one of its instances."""
    return in_context(columns, Instruction(columns.text("instruction"), given.optional_text("input")))


def checked_question(columns: Columns, prompt: Text, role: str) -> Text:
    if isinstance(prompt, tuple) and len(prompt) == 1 and prompt[0]["role"] == "assistant":
        raise columns.error(f"field {columns.name(role)!r} holds an answer but no question")
    return prompt


def in_context(columns: Columns, prompt: Text | Instruction) -> Prompt:
    """A prompt, or a whole conversation, with what other columns of the row give it.

    A plain prompt beside any of them becomes a conversation: nothing but a chat template has a place for them.
    Raises DataError where the row has two system messages that differ.
    """
    system, history = columns.optional_text("system"), columns.history()
    tools, args = columns.tools(), columns.template_args()
    if not isinstance(prompt, tuple) and not (system or history or tools or args):
        return prompt
    messages = as_messages(prompt)
    if not messages:
        raise columns.empty("the prompt is a dialogue without a turn")
    own: Messages = ()
    if messages[0]["role"] == "system":
        own, messages = messages[:1], messages[1:]
        if system and text_of(own[0]).strip() != system.strip():
            raise columns.error(
                f"field {columns.name('system')!r} and the system message of the conversation differ; keep one of them"
            )
    elif system:
        own = ({"role": "system", "content": system},)
    return Chat((*own, *history, *messages), tools, args)


def as_messages(prompt: Prompt | Messages) -> Messages:
    """A prompt of any kind as messages; an instruction and its input are two lines, as in LLaMA-Factory."""
    if isinstance(prompt, tuple):
        return prompt
    if isinstance(prompt, Chat):
        return prompt.messages
    if isinstance(prompt, Instruction):
        prompt = "\n".join(part for part in (prompt.instruction, prompt.input) if part)
    elif is_dialogue(prompt):
        return dialogue_messages(prompt)
    return (_said("user", prompt),)


def answered(columns: Columns, prompt: Prompt, answer: Text, role: str) -> tuple[Prompt, Text]:
    """A prompt and an answer, both texts or both messages: what is text becomes a message beside messages."""
    if isinstance(answer, tuple) and not isinstance(prompt, Chat):
        prompt = Chat(as_messages(prompt))
    if isinstance(prompt, Chat) and isinstance(answer, str):
        answer = (_said("assistant", answer),)
    if isinstance(answer, tuple) and answer[0]["role"] != "assistant":
        raise columns.error(f"field {columns.name(role)!r} does not begin with an assistant's message")
    return prompt, answer


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
