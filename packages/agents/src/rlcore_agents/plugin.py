"""Entry points of this package. Nothing is imported until an environment or a reward is used.

Factory contracts: ``rlcore.environments``: ``factory(spec: EpisodeSpec) -> EpisodeRunner``;
``rlcore.rewards``: ``factory(options: Config, settings: RewardSettings) -> Reward``.
"""

from rlcore.plugins import Plugin

reasoning_gym_reward = Plugin(
    interface=1,
    config="rlcore_agents.reasoning_gym.settings:ReasoningGymReward",
    factory="rlcore_agents.reasoning_gym.reward:reasoning_gym_reward",
    summary="The scorer of the sample's task of reasoning-gym",
)

verifiers = Plugin(
    interface=1,
    config="rlcore_agents.verifiers.settings:VerifiersSettings",
    factory="rlcore_agents.verifiers.runner:build",
    summary="Task sets, agents and environments of the package verifiers",
)

python = Plugin(
    interface=1,
    config="rlcore_agents.environment.settings:PythonEnvironmentSettings",
    factory="rlcore_agents.environment.runner:python_environment",
    summary="A class or function in Python, by file or import path",
)
gymnasium = Plugin(
    interface=1,
    config="rlcore_agents.gymnasium.settings:GymnasiumSettings",
    factory="rlcore_agents.gymnasium.environment:gymnasium_environment",
    summary="A text environment with gymnasium's reset and step, by file or import path",
)
textarena = Plugin(
    interface=1,
    config="rlcore_agents.textarena.settings:TextArenaSettings",
    factory="rlcore_agents.textarena.play:textarena_environment",
    summary="A game of TextArena, for one player, against others or in self-play",
)
command = Plugin(
    interface=1,
    config="rlcore_agents.gateway.settings:CommandSettings",
    factory="rlcore_agents.gateway.command:CommandEnvironment",
    summary="An agent program that reaches the policy by OpenAI's or Anthropic's protocol",
)
tools = Plugin(
    interface=1,
    config="rlcore_agents.tools.settings:ToolsEnvironmentSettings",
    factory="rlcore_agents.tools.environment:ToolsEnvironment",
    summary="A conversation with tools, until a reply calls none",
)
openenv = Plugin(
    interface=1,
    config="rlcore_agents.openenv.settings:OpenEnvSettings",
    factory="rlcore_agents.openenv.environment:openenv_environment",
    summary="An environment server of OpenEnv, by its address",
)
nemo_gym = Plugin(
    interface=1,
    config="rlcore_agents.nemo_gym.settings:NeMoGymSettings",
    factory="rlcore_agents.nemo_gym.environment:nemo_gym_environment",
    summary="A resources server of NeMo Gym, by its address",
)
