"""A task set of verifiers with a tool."""

import verifiers.v1 as vf

__all__ = ["Numbers"]


class Adder(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    """Adds."""

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Adds two numbers."""
        return str(a + b)


class Task(vf.Task[vf.TaskData]):
    """Rewards calls of the tool."""

    @vf.reward
    async def called(self, trace) -> float:
        """The number of answers."""
        return float(len(trace.tool_messages))


class Numbers(vf.Taskset[Task]):
    """Some sums."""

    @classmethod
    def toolsets(cls, config):
        """The tools of all rollouts."""
        return [Adder(vf.SharedToolsetConfig())]

    def load(self):
        """Yields tasks."""
        return [
            Task(vf.TaskData(prompt=f"Add 2 to {number}.", system_prompt="Use the tool."), self.config.task)
            for number in range(6)
        ]


if __name__ == "__main__":
    Adder.run()
