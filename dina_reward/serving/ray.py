"""The same application on Ray Serve, where one machine is too small: replicas, each with a device of its own.

Batching stays with our own batcher, inside of each replica: it groups rows by shape and takes a lone request at once, which
``serve.batch`` does not, and it measures better (``tests/benchmarks/bench_ray.py``). Needs ``pip install "ray[serve]"``,
which no extra of this package brings.

    serve run dina_reward.serving.ray:build model_path=path/to/reward num_replicas=2 num_gpus=1
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from dina_reward.serving.settings import ServingConfig, read_token


_LOADING = {"model_path", "base_model_path", "dtype", "device", "text_encoders"}
_PLACING = {"num_replicas", "num_gpus", "num_cpus", "max_replicas", "target_ongoing_requests"}


def build(arguments: Mapping[str, Any]) -> Any:
    """An application for ``serve.run``, ``serve run`` and ``serve build``.

    Args:
        arguments: by name, as texts or values: those of `load_served_reward` (``model_path`` is needed), fields of
            `ServingConfig`, and

            - ``num_replicas``: how many there are; 1.
            - ``num_gpus``, ``num_cpus``: of each replica; 1 and 1. With ``num_gpus=0`` rewards are on the CPU.
            - ``max_replicas``: more than ``num_replicas``, to have their number follow the load: as many as it takes for
              ``target_ongoing_requests`` on each; default: two batches.

            The bearer token is read from ``DINA_REWARD_TOKEN`` where this function runs, and sent to the replicas.

    Returns:
        `ray.serve.Application`.

    Raises:
        ValueError: arguments that are none of these, or do not fit.
        ImportError: there is no ``ray[serve]``.
    """
    from ray import serve  # type: ignore[import-not-found, unused-ignore]

    loading, placing, config = _sorted(arguments)
    replicas = int(placing.get("num_replicas", 1))
    most = int(placing.get("max_replicas", replicas))
    gpus = float(placing.get("num_gpus", 1))
    options: dict[str, Any] = {
        "name": "dina-reward",
        "ray_actor_options": {"num_gpus": gpus, "num_cpus": float(placing.get("num_cpus", 1))},
        # The application bounds its own queue in rows and bytes; fewer here would starve its batches.
        "max_ongoing_requests": config.max_queue_rows,
        "graceful_shutdown_timeout_s": config.drain_seconds + config.shutdown_timeout,
        "health_check_period_s": 10,
    }
    if most > replicas:
        target = float(placing.get("target_ongoing_requests", 2 * config.max_batch_size))
        options["autoscaling_config"] = {
            "min_replicas": replicas,
            "max_replicas": most,
            "target_ongoing_requests": target,
        }
    else:
        options["num_replicas"] = replicas
    if gpus == 0:
        loading.setdefault("device", "cpu")

    def application() -> Any:  # Ray calls functions alone; anything else it takes for the application itself
        return _application(loading, config)

    return serve.deployment(**options)(serve.ingress(application)(_Replica)).bind()


class _Replica:
    """A replica; its routes are the application's."""

    app: Any

    async def check_health(self) -> None:
        """Ends when the reward is loaded: Ray sends a replica nothing before its first check has ended.

        Raises:
            RuntimeError: it cannot be loaded.
        """
        service = self.app.state.service
        while service.state == "loading":
            await asyncio.sleep(0.02)
        if service.state == "failed":
            raise RuntimeError(f"the reward cannot be loaded: {service.error}")


def _application(loading: Mapping[str, Any], config: ServingConfig) -> Any:
    from dina_reward.serving.app import create_app
    from dina_reward.serving.loading import load_served_reward

    return create_app(lambda: load_served_reward(**loading), config)


def _sorted(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], ServingConfig]:
    """Arguments of loading, of placement, and the limits; texts become what the fields are."""
    fields = ServingConfig.__dataclass_fields__
    known = {*_LOADING, *_PLACING, *(set(fields) - {"token"})}
    unknown = sorted(arguments.keys() - known)
    if unknown or "model_path" not in arguments:
        raise ValueError(
            f"an application on Ray Serve takes model_path and {', '.join(sorted(known - {'model_path'}))}; got "
            f"{', '.join(sorted(arguments)) or 'nothing'}"
        )
    loading = {name: arguments[name] for name in _LOADING & arguments.keys()}
    if isinstance(loading.get("text_encoders"), str):
        loading["text_encoders"] = loading["text_encoders"].lower() in ("true", "1", "yes")
    placing = {name: arguments[name] for name in _PLACING & arguments.keys()}
    kinds: dict[str, Any] = {"int": int, "float": float}
    limits = {
        name: kinds.get(str(fields[name].type), str)(arguments[name]) for name in fields.keys() & arguments.keys()
    }
    return loading, placing, ServingConfig(token=read_token(), **limits)
