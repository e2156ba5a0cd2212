"""A task set of verifiers: replies are rewarded for a letter."""

import asyncio
import os
import time

import verifiers.v1 as vf

__all__ = ["Letters"]


class Data(vf.TaskData):
    """A task's letter, and what goes wrong while its replies are rewarded."""

    letter: str = "a"
    fault: str | None = None


class Task(vf.Task[Data]):
    """Rewards replies for a letter."""

    @vf.reward(weight=0.5)
    async def has_letter(self, task, trace) -> float:
        """The number of the letter, divided by 8."""
        match task.fault:
            case "raises":
                raise RuntimeError("no reward today")
            case "waits":
                await asyncio.Event().wait()
            case "blocks":
                time.sleep(1000)
            case "ends":
                os._exit(3)
        return sum(message.content.count(task.letter) for message in trace.assistant_messages) / 8

    @vf.metric
    async def letters(self, trace) -> float:
        """The length of the last reply."""
        return float(len(trace.last_reply))


class Settings(vf.TasksetConfig):
    """The letter of all tasks, and a fault of the second one."""

    letter: str = "a"
    fault: str | None = None


class Letters(vf.Taskset[Task, Settings]):
    """Tasks without end."""

    INFINITE = True

    def load(self):
        """Yields tasks."""
        number = 0
        while True:
            own = {"letter": self.config.letter, "fault": self.config.fault if number == 1 else None}
            yield Task(Data(prompt=f"say {self.config.letter} {number}", **own), self.config.task)
            number += 1
