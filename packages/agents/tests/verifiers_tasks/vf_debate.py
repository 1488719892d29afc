"""Two agents that talk in turn: a solver that is trained, and a critic that is trained if the configuration says so."""

from __future__ import annotations

import verifiers.v1 as vf


class DebateConfig(vf.EnvConfig):
    solver: vf.AgentConfig = vf.AgentConfig()
    critic: vf.AgentConfig = vf.AgentConfig()
    train_critic: bool = False


class DebateEnv(vf.Env[DebateConfig]):
    async def setup(self, agents: vf.Agents) -> None:
        agents.critic.trainable = self.config.train_critic

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        opening = vf.Task(vf.TaskData(idx=task.data.idx, prompt=None, system_prompt="Criticize."))
        async with agents.solver.interaction(task) as solver, agents.critic.interaction(opening) as critic:
            said = await solver.turn()
            objection = await critic.turn(said.last_reply)
            await solver.turn(objection.last_reply)

    async def finalize(self, task: vf.Task, episode: vf.Episode) -> None:
        for trace in episode.traces:
            if trace.agent.name == "critic":
                trace.record_reward("objection", -1.0)


__all__ = ["DebateEnv"]
