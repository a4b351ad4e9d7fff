"""The rules of tools in a chat, as OpenAI has them: definitions, calls, and their results."""

import json
from typing import Any


def check_tools(record: dict[str, Any], where: str) -> None:
    """Raise ValueError unless the tools of a chat are what templates can print.

    `tools` beside `messages` holds definitions, `tool_calls` of an assistant's message calls
    `{"id", "type": "function", "function": {"name", "arguments"}}` whose arguments are an object or
    JSON of one, and a message of role tool a result; its `tool_call_id`, if any call before it
    has an id, names one of those.
    """
    tools = record.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise ValueError(
            f"{where}: tools must be a list of objects, got {tools!r:.80}; "
            'write {"type": "function", "function": {"name": …, "parameters": …}}'
        )
    known: set[str] = set()
    for position, message in enumerate(record["messages"]):
        spot = f"{where}: messages[{position}]"
        calls = message.get("tool_calls")
        if calls:
            known |= _check_calls(message["role"], calls, spot)
        asked = message.get("tool_call_id")
        if message["role"] == "tool" and asked is not None and known and asked not in known:
            raise ValueError(
                f"{spot}.tool_call_id must name a call before it, got {asked!r:.80}; "
                "give the id of the call it answers"
            )


def call_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as an object; ValueError if they are neither that nor its JSON."""
    arguments = call["function"].get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError("no object")
    return arguments


def _check_calls(role: str, calls: Any, where: str) -> set[str]:
    """The ids of the calls."""
    if role != "assistant" or not isinstance(calls, list):
        raise ValueError(
            f"{where}.tool_calls must be a list in an assistant's message, got {calls!r:.80} from "
            f"{role}; move it"
        )
    ids = set()
    for number, call in enumerate(calls):
        spot = f"{where}.tool_calls[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{spot} must name a function, got {call!r:.80}; "
                'write {"type": "function", "function": {"name": …, "arguments": …}}'
            )
        try:
            call_arguments(call)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{spot}.function.arguments must be an object or JSON of one, got "
                f"{function['arguments']!r:.80} ({error}); fix it"
            ) from error
        ids.add(call.get("id"))
    return {name for name in ids if isinstance(name, str)}
