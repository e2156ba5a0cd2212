"""Loads and unloads adapters while the server runs, in vLLM's shape, from one folder that was named at the start."""

from pathlib import Path

from starlette.concurrency import run_in_threadpool

from qlora_jax.server.errors import ApiError
from qlora_jax.server.openai_schemas import LoadAdapterBody, UnloadAdapterBody
from qlora_jax.server.service import Service
from qlora_jax.untrusted_json import shorten

NO_FOLDER = "no folder of adapters was named when the server started. Start it with --adapters FOLDER"


async def load_adapter(service: Service, body: LoadAdapterBody) -> str:
    """Loads an adapter and returns a message."""
    if service.load is None or service.adapters is None:
        raise ApiError(403, NO_FOLDER)
    async with service.loading:
        if body.lora_name in service.models:
            raise ApiError(400, f"lora_name: {body.lora_name} is served already. Unload it first", param="lora_name")
        try:
            folder = _folder(service.adapters, body.lora_path)
            model, add = await run_in_threadpool(service.load, body.lora_name, folder)
            await service.thread.call(add)
        except (ValueError, OSError) as error:
            raise ApiError(400, f"lora_path: {error}", param="lora_path") from None
        service.models.add(model)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


async def unload_adapter(service: Service, body: UnloadAdapterBody) -> str:
    """Unloads an adapter and returns a message; requests that use it have to end first."""
    if service.adapters is None:
        raise ApiError(403, NO_FOLDER)
    async with service.loading:
        model = service.models.get(body.lora_name)
        if model.parent is None or Path(model.root).parent != service.adapters:
            message = f"lora_name: {model.name} was named when the server started, so it stays"
            raise ApiError(400, message, param="lora_name")
        try:
            await service.thread.call(lambda: service.unload(model))
        except ValueError as error:
            raise ApiError(409, str(error), param="lora_name") from None
        service.models.remove(model.name)
    return f"Success: LoRA adapter '{model.name}' removed successfully."


def _folder(adapters: Path, given: str) -> Path:
    """Returns the folder of an adapter, which has to be directly in the folder of adapters."""
    path = Path(given)
    known = {folder.name: folder for folder in adapters.iterdir() if folder.is_dir()}
    if path.name not in known or path.parent not in (Path("."), adapters):
        message = f"lora_path: found {shorten(given)}, expected one of {sorted(known)}. Use the name of one of them"
        raise ApiError(404, message, param="lora_path")
    return known[path.name]
