"""Task sets of verifiers with data of their own: one reply, several turns, and tools."""

import verifiers.v1 as vf

__all__ = ["Letters"]


class Data(vf.TaskData):
    """A task's letter."""

    letter: str = "a"


class Task(vf.Task[Data]):
    """Rewards replies with a letter."""

    @vf.reward(weight=0.5)
    async def has_letter(self, task, trace) -> float:
        """The share of the letter."""
        return sum(m.content.count(task.letter) for m in trace.assistant_messages) / 8

    @vf.metric
    async def length(self, trace) -> float:
        """The letters of the reply."""
        return float(len(trace.last_reply))


class Settings(vf.TasksetConfig):
    """The tasks' letter."""

    letter: str = "a"
    fault: str | None = None


class Letters(vf.Taskset[Task, Settings]):
    """Tasks without end."""

    INFINITE = True

    def load(self):
        """Yields tasks."""
        number = 0
        while True:
            yield Task(Data(prompt=f"say {self.config.letter} {number}", letter=self.config.letter), self.config.task)
            number += 1
