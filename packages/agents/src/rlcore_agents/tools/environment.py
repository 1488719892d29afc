"""`tools`: a conversation with the configured tools, which ends with the first reply that calls none."""

from __future__ import annotations

from rlcore.engines.episode import EpisodeSpec, PromptSample
from rlcore_agents.environment.chat import Chat
from rlcore_agents.environment.local import LocalHost
from rlcore_agents.environment.play import Program
from rlcore_agents.environment.runner import ProgramRunner
from rlcore_agents.tools.settings import ToolsEnvironmentSettings
from rlcore_agents.tools.source import ToolSource


class ToolsEnvironment(ProgramRunner):
    """Runs episodes without an environment besides tools; a reward function scores the final reply.

    Raises:
        ConfigError: there is no tool, or one cannot be made.
    """

    def __init__(self, spec: EpisodeSpec) -> None:
        options = spec.options
        assert isinstance(options, ToolsEnvironmentSettings)
        self._source = ToolSource(options)

        async def converse(chat: Chat, sample: PromptSample) -> None:
            async with self._source.episode() as tools:
                await chat(tools=tools)

        program = Program("tools", converse, {}, options.max_observation_chars)
        super().__init__(spec, LocalHost(program), options.turn_timeout_s)

    def close(self) -> None:
        super().close()
        self._source.close()
