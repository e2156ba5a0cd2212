"""Plays environments of `verifiers` with a model behind an endpoint; process.py starts it in that package's Python.

Each line of the standard input is a command in JSON, and each line of the standard output a result. It imports nothing
of qlora_jax, whose dependencies that Python need not have.
"""

import asyncio
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import httpx
import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.types import UserMessage

__all__ = ["ChatHarness"]  # verifiers finds a harness by its module's list
HARNESS = "qlora_jax_chat"
KEY_VARIABLE = "QLORA_JAX_ROLLOUT_API_KEY"  # verifiers hides names with API_KEY from the programs that it starts
TOGETHER = 32  # rollouts that run at the same time; the engine decodes 16 replies together
NO_ROOM = "context_length_exceeded"


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Lets the model reply and call the task's tools, in this process: a program per rollout would start Python."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        """Continues the conversation until the model calls no tool, or has no room left."""
        system, prompt = self.resolve_prompt(data)
        asked = [UserMessage(content=prompt)] if isinstance(prompt, str) else prompt or []
        messages = [{"role": "system", "content": system}] if system else []
        messages += [message_to_wire(message) for message in asked]
        servers = {"mcpServers": {name: {"url": url} for name, url in mcp_urls.items()}}
        async with contextlib.AsyncExitStack() as stack:
            tools, places, connections = await connect_mcp(servers, stack)
            headers = {"Authorization": f"Bearer {secret}"}
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=None, headers=headers))
            while True:
                body = {"model": ctx.model, "messages": messages} | ({"tools": tools} if tools else {})
                response = await client.post(f"{endpoint}/chat/completions", json=body)
                if response.status_code != 200:
                    clean = NO_ROOM in response.text
                    return vf.ProgramResult(0 if clean else 1, "", response.text)
                message = response.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return vf.ProgramResult(0, "", "")
                for call in message["tool_calls"]:
                    content = await _answer(call["function"], places, connections)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})


async def _answer(function, places, connections):
    try:
        arguments = json.loads(function["arguments"] or "{}")
        return await call_mcp(connections, places, function["name"], arguments)
    except Exception as error:  # the model reads it
        return f"error: {error}"


class Environments:
    """The environments of this process, each loaded once, and started with its first rollout."""

    def __init__(self):
        self._loaded, self._serving = {}, set()
        self.stack = contextlib.AsyncExitStack()

    def load(self, settings, size, turns=None):
        """Returns (the environment, its tasks); seats without a harness get ours, in this process."""
        key = json.dumps([settings, size, turns])
        if key not in self._loaded:
            config = vf.resolve_env_config(json.loads(json.dumps(settings)))  # the function changes its argument
            default = vf.default_harness_id(config.taskset.id)
            for role, seat in agent_config_fields(config).items():
                own = {} if "runtime" in seat.model_fields_set else {"runtime": vf.SubprocessConfig()}
                if seat.harness is None and default == "bash":  # a shell on this machine is for those who ask for it
                    own["harness"] = vf.HarnessConfig(id=HARNESS)
                if turns is not None and seat.max_turns is None:
                    own["max_turns"] = turns
                setattr(config, role, seat.model_copy(update=own))
            environment = vf.load_environment(config)
            if size is None and not environment.taskset.bounded:
                raise ValueError("has tasks without end. Add size=NUMBER to the address")
            self._loaded[key] = environment, [*itertools.islice(environment.taskset, size)]
        return self._loaded[key]

    def rows(self, command):
        """Returns the prompt of each task."""
        _, tasks = self.load(command["settings"], command["size"])
        return {"prompts": [_prompt(task.data, number) for number, task in enumerate(tasks)]}

    def digest(self, command):
        """Returns the digest of the package's version and of the files of the task set's module."""
        module = command["name"].rpartition("/")[2].partition("@")[0].replace("-", "_").lower()
        spec = importlib.util.find_spec(module)  # None: one of the package, whose version is enough
        found = hashlib.sha256(importlib.metadata.version("verifiers").encode())
        if spec is not None:
            folders = [Path(each) for each in spec.submodule_search_locations or ()]
            for file in sorted(each for folder in folders for each in folder.rglob("*.py")) or [Path(spec.origin)]:
                found.update(file.read_bytes())
        return {"sha256": found.hexdigest()}

    async def play(self, command):
        """Plays one episode per rollout, and sends each result as soon as it is known."""
        os.environ[KEY_VARIABLE] = command["key"]
        client = vf.EvalClientConfig(base_url=command["url"], api_key_var=KEY_VARIABLE)
        gate = asyncio.Semaphore(TOGETHER)
        async with asyncio.TaskGroup() as group:
            for rollout, each in enumerate(command["rollouts"]):
                environment, tasks = self.load(each["settings"], each["size"], command["turns"])
                if environment not in self._serving:
                    await self.stack.enter_async_context(environment.serving())
                    self._serving.add(environment)
                sampling = vf.SamplingConfig(seed=rollout, parallel_tool_calls=True)
                ctx = vf.ModelContext(model=command["model"], client=client, sampling=sampling)
                group.create_task(_rollout(environment, tasks[each["task"]], ctx, gate, rollout))


async def _rollout(environment, task, ctx, gate, rollout):
    async with gate:
        episode = await environment.run_episode(task, ctx)
    _send({"rollout": rollout} | _outcome(episode, ctx.client))


def _outcome(episode, client):
    own = [trace for trace in episode.traces if trace.agent.config.client.base_url == client.base_url]
    errors = {f"{each.type}: {each.message}": None for part in (episode, *own) for each in part.errors}
    if not episode.ok or errors:
        return {"problem": "; ".join(errors) or "the episode failed"}
    if len(own) != 1:
        fix = "Give the other agents a client.base_url of their own"
        return {"problem": f"found {len(own)} agents that the trained model plays, expected one. {fix}"}
    (trace,) = own
    path = trace.branches[-1].nodes if trace.branches else []
    said = itertools.dropwhile(lambda node: not node.sampled, path)
    rewards = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
    metrics = {name: value for name, value in trace.metrics.items() if value is not None}
    return {
        "problem": None,
        "reward": trace.reward,
        "metrics": rewards | metrics | {"turns": float(trace.num_turns)},
        "messages": [message_to_wire(node.message) for node in said],
        "is_cut": trace.is_truncated or trace.is_timeout,
    }


def _prompt(data, number):
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    if data.prompt is None:  # the environment begins
        return [*system, {"role": "user", "content": data.name or f"task {number}"}]
    asked = [UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else data.prompt
    return [*system, *(message_to_wire(message) for message in asked)]


def _send(result):
    _OUT.write(json.dumps(result) + "\n")
    _OUT.flush()


async def _answers(environments, command):
    """Sends the results of a command."""
    try:
        if command["kind"] == "play":
            await environments.play(command)
            _send({"done": True})
        else:
            _send(getattr(environments, command["kind"])(command))
    except Exception as error:
        found = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        text = str(found) if type(found) is ValueError else f"{type(found).__name__}: {found}"
        _send({"problem": " ".join(text.split())})


async def main():
    """Answers commands until the standard input ends."""
    sys.modules[HARNESS] = sys.modules[__name__]
    environments = Environments()
    async with environments.stack:
        while line := await asyncio.to_thread(sys.stdin.readline):
            await _answers(environments, json.loads(line))


_OUT = sys.stdout

if __name__ == "__main__":
    _OUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # environments print there
    sys.stdin = os.fdopen(os.dup(0), "r")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # programs of rollouts are ended at exit
    asyncio.run(main())
