"""Good rows of every dataset type, and of every form that a type takes (docs/data.md): what the row fuzzer spoils."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(*turns: str) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [says(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]


TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "The height of the tide",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string", "description": "its name"}, "hours": {"type": "integer"}},
            "required": ["harbour"],
        },
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": {"harbour": "Bergen", "hours": 3}}}
CALL_AS_TEXT = {"id": "c2", "type": "function", "function": {"name": "tide", "arguments": '{"harbour": "Oslo"}'}}


def _tools(call: dict[str, Any]) -> Rows:
    return [
        {
            "tools": [TOOL],
            "messages": [
                says("system", "You know the sea."), says("user", f"When {i}?"),
                says("assistant", None, tool_calls=[call]), says("tool", f"{i}.4 m", tool_call_id=call["id"]),
                says("assistant", f"{i}.4 m at noon"),
            ],
        }
        for i in range(3)
    ]  # fmt: skip


def _hh(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def _tree(i: int) -> Rows:
    message = {"message_tree_id": f"t{i}", "lang": "en", "deleted": False, "review_result": True}
    return [
        {**message, "message_id": f"{i}a", "parent_id": None, "role": "prompter", "text": f"Why {i}?", "rank": None},
        {**message, "message_id": f"{i}b", "parent_id": f"{i}a", "role": "assistant", "text": "So.", "rank": 0},
        {**message, "message_id": f"{i}c", "parent_id": f"{i}a", "role": "assistant", "text": "Thus.", "rank": 1},
        {**message, "message_id": f"{i}d", "parent_id": f"{i}b", "role": "prompter", "text": "Sure?", "rank": 0},
    ]


def _whole_tree(i: int) -> dict[str, Any]:
    reply = {"message_id": f"{i}b", "role": "assistant", "text": "So.", "rank": 0, "replies": []}
    other = {"message_id": f"{i}c", "role": "assistant", "text": "Thus.", "rank": 1, "replies": []}
    root = {"message_id": f"{i}a", "role": "prompter", "text": f"Why {i}?", "replies": [reply, other]}
    return {"message_tree_id": f"{i}a", "tree_state": "ready_for_export", "prompt": root}


def _instances(i: int) -> list[dict[str, str]]:
    return [{"input": f"{i} {i}", "output": str(2 * i)}, {"input": "", "output": "0"}]


R = range(3)
SEEDS: dict[str, Rows] = {
    "preference": [{"prompt": f"{i}+2=", "chosen": f"{i + 2}", "rejected": "9"} for i in R],
    "preference with margin": [{"prompt": f"{i}+2=", "chosen": "4", "rejected": "9", "margin": i / 2} for i in R],
    "preference, implicit prompt": [{"chosen": _hh(f"{i}?", "yes"), "rejected": _hh(f"{i}?", "no")} for i in R],
    "preference, texts that begin alike": [{"chosen": f"the sum of {i} is even", "rejected": f"the sum of {i} is odd"}
                                           for i in R],
    "preference, conversations": [{"chosen": talk(f"{i}?", "yes", "Sure?", "very"),
                                   "rejected": talk(f"{i}?", "yes", "Sure?", "not")} for i in R],
    "preference, answers as messages": [{"prompt": talk(f"{i}?"), "chosen": [says("assistant", "yes")],
                                         "rejected": [says("assistant", "no")]} for i in R],
    "preference, one message each": [{"prompt": f"{i}?", "chosen": says("assistant", "yes"),
                                      "rejected": says("assistant", "no")} for i in R],
    "preference after a conversation": [{"conversations": [{"from": "human", "value": f"{i}?"}],
                                         "chosen": {"from": "gpt", "value": "yes"},
                                         "rejected": {"from": "gpt", "value": "no"}} for i in R],
    "preference under a system": [{"system": "Be brief.", "question": f"{i}?", "chosen": "yes", "rejected": "no"}
                                  for i in R],
    "preference after an instruction": [{"instruction": f"Add {i}.", "input": "1", "chosen": "2", "rejected": "3"}
                                        for i in R],
    "verl": [{"data_source": "gsm8k", "prompt": talk(f"{i}+{i}?"), "ability": "math",
              "reward_model": {"style": "rule", "ground_truth": str(2 * i)}, "extra_info": {"index": i}} for i in R],
    "ranked": [{"prompt": f"{i}?", "completions": ["yes", "well", "no"]} for i in R],
    "ranked with scores": [{"prompt": f"{i}?", "completions": ["no", "yes", "well"], "scores": [1, 3.5, 1]} for i in R],
    "ranked messages": [{"prompt": talk(f"{i}?"), "completions": [[says("assistant", "yes")],
                                                                 [says("assistant", "no")]]} for i in R],
    "instruction": [{"instruction": f"Add {i}.", "input": f"{i} 2", "output": f"{i + 2}"} for i in R],
    "instruction without input": [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in R],
    "instruction with history": [{"instruction": f"Add {i}.", "input": "", "output": f"{i}", "system": "Be brief.",
                                  "history": [["Hi", "Hello"], ["Ready?", "Yes"]]} for i in R],
    "instruction with instances": [{"instruction": f"Add {i}.", "instances": _instances(i)} for i in R],
    "instruction, Dolly's": [{"instruction": f"Add {i}.", "context": "numbers", "response": f"{i}"} for i in R],
    "unpaired": [{"prompt": f"{i}+2=", "completion": f"{i + 2}", "label": bool(i % 2)} for i in R],
    "unpaired messages": [{"prompt": talk(f"{i}?"), "completion": [says("assistant", "yes")], "label": bool(i)}
                          for i in R],
    "unpaired conversation": [{"messages": talk(f"{i}?", "yes"), "label": i != 1} for i in R],
    "unpaired, kto_tag": [{"messages": talk(f"{i}?", "yes"), "kto_tag": i != 1} for i in R],
    "prompt and completion": [{"prompt": f"{i}+2=", "completion": f"{i + 2}"} for i in R],
    "prompt and completion, messages": [{"prompt": talk(f"{i}?"), "completion": [says("assistant", "yes")]} for i in R],
    "an answer that is begun": [{"prompt": talk(f"{i}?", "It is "), "completion": "deep."} for i in R],
    "question and answer": [{"question": f"{i}+2?", "answer": f"#### {i + 2}"} for i in R],
    "prompt": [{"prompt": f"{i}+2=", "answer": i + 2} for i in R],
    "prompt of messages": [{"prompt": talk(f"{i}?")} for i in R],
    "prompt with tools": [{"prompt": talk(f"{i}?"), "tools": [TOOL], "chat_template_kwargs": {"thinking": False}}
                          for i in R],
    "messages": [{"messages": talk(f"{i}?", "yes")} for i in R],
    "messages, several turns": [{"messages": [says("system", "Be brief."), *talk(f"{i}?", "yes", "Sure?", "very")]}
                                for i in R],
    "messages with a question open": [{"messages": talk(f"{i}?", "yes", "Sure?")} for i in R],
    "messages of parts": [{"messages": [says("user", [{"type": "text", "text": f"{i}?"}]),
                                        says("assistant", [{"type": "text", "text": "yes"}])]} for i in R],
    "messages with weights": [{"messages": [says("user", f"{i}?"), says("assistant", "no", weight=0),
                                            says("user", "Sure?"), says("assistant", "yes", weight=1)]} for i in R],
    "messages with reasoning": [{"messages": [says("user", f"{i}?"), says("assistant", "yes", reasoning_content="So.")]}
                                for i in R],
    "messages with names": [{"messages": [says("user", f"{i}?", name="ann"), says("assistant", "yes", name="bot")],
                             "id": f"r{i}"} for i in R],
    "tool calls": _tools(CALL),
    "tool calls, arguments as text": _tools(CALL_AS_TEXT),
    "ShareGPT": [{"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "yes"}],
                  "system": "Be brief."} for i in R],
    "ShareGPT with tools": [{"conversations": [
        {"from": "human", "value": f"{i}?"},
        {"from": "function_call", "value": '{"name": "tide", "arguments": {"harbour": "Bergen"}}'},
        {"from": "observation", "value": "2 m"}, {"from": "gpt", "value": "2 m"}],
        "tools": '[{"name": "tide", "description": "Its height", "parameters": {}}]'} for i in R],
    "labelled": [{"text": f"a film of {i}", "label": i} for i in R],
    "text": [{"text": f"a film of {i}"} for i in R],
    "OpenAssistant": [message for i in R for message in _tree(i)],
    "OpenAssistant's trees": [_whole_tree(i) for i in R],
    "Chinese": [{"messages": talk(f"第{i}个港口今天几点涨潮？", "中午十二点。")} for i in R],
    "another column": [{"prompt": f"{i}?", "completion": "yes", "source": "x", "meta": {"n": [i, None]}} for i in R],
}  # fmt: skip
