"""An environment of verifiers with three turns per episode."""

import verifiers.v1 as vf

__all__ = ["Dialogue"]


class Settings(vf.EnvConfig):
    """The agent, whose turns are short."""

    agent: vf.AgentConfig = vf.AgentConfig(sampling={"max_tokens": 8})


class Dialogue(vf.Env[Settings]):
    """Answers the model twice."""

    async def run(self, task, agents):
        """Plays one episode."""
        async with agents.agent.interaction(task) as interaction:
            turn, number = await interaction.turn(), 0
            while number < 2 and not turn.terminated:
                turn, number = await interaction.turn(f"more {number}"), number + 1
