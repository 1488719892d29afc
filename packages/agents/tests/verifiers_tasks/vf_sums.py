"""A task set of sums, and a program that talks to the model: with tools, or with its history rewritten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httpx
import verifiers.v1 as vf

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class SumData(vf.TaskData):
    answer: int
    mode: str = "single"


class AddConfig(vf.ToolsetConfig):
    pass


class AddToolset(vf.Toolset[AddConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b


class SumTaskConfig(vf.TaskConfig):
    server: bool = False
    """whether the tool is offered by a server of MCP"""


class SumTask(vf.Task[SumData, vf.State, SumTaskConfig]):
    @classmethod
    def toolsets(cls, config: SumTaskConfig) -> list[vf.Toolset]:
        return [AddToolset(AddConfig())] if config.server else []

    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        if self.data.mode == "raise":
            raise ValueError("the data base of sums is gone")

    @vf.reward(weight=2.0)
    async def correct(self, trace: vf.Trace) -> float:
        return float(str(self.data.answer) in trace.last_reply)

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class SumsConfig(vf.TasksetConfig):
    mode: str = "single"
    size: int = 4
    task: SumTaskConfig = SumTaskConfig()


class SumsTaskset(vf.Taskset[SumTask, SumsConfig]):
    def load(self) -> Iterable[SumTask]:
        for number in range(self.config.size):
            data = SumData(prompt=f"{number}+1", system_prompt="Add.", answer=number + 1, mode=self.config.mode)
            yield SumTask(data, self.config.task)


class ChatConfig(vf.HarnessConfig):
    pass


class ChatHarness(vf.Harness[ChatConfig]):
    """Asks the model until it calls no tool, with OpenAI's chat completions."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [{"role": m.role, "content": m.content} for m in prompt or ()]
        mode = getattr(data, "mode", "single")
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {secret}"}, timeout=60) as client:
            for _ in range(8):
                body = {"model": ctx.model, "messages": messages, **({"tools": [ADD]} if mode == "tools" else {})}
                response = await client.post(f"{endpoint}/chat/completions", json=body)
                if response.status_code != 200 and mode == "stubborn":
                    await asyncio.sleep(200)
                if response.status_code != 200:
                    return vf.ProgramResult(exit_code=1, stdout="", stderr=response.text)
                message = response.json()["choices"][0]["message"]
                messages.append(message)
                for call in message.get("tool_calls") or ():
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": "8 \U0001f600"})
                if mode == "forget" and len(messages) < 6:
                    # the history is rewritten: what the model said becomes a summary of the user's
                    messages = [messages[0], {"role": "user", "content": f"So far: {message['content']}. Go on."}]
                    mode = "single"
                    continue
                if not message.get("tool_calls"):
                    break
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["ChatHarness", "SumsTaskset"]

if __name__ == "__main__":  # the process of the server of tools
    AddToolset.run()
