"""`dina-reward serve`: a reward behind HTTP."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dina_reward.cli.options import DeviceOption, DtypeChoice


class AccessLogChoice(StrEnum):
    """Which requests are logged."""

    all = "all"
    errors = "errors"
    off = "off"


ModelPathOption = Annotated[
    str, typer.Option(help="Directory or hub id of a reward; 'shapes' is the one that ships with the package.")
]
BaseModelPathOption = Annotated[
    str | None,
    typer.Option(help="Path or hub id of the diffusers pipeline. Default: the backbone that the checkpoint names."),
]
DtypeOption = Annotated[DtypeChoice, typer.Option(help="Dtype of backbone and text encoders.")]
MaxBatchSizeOption = Annotated[int, typer.Option(min=1, help="Rows per pass of the model.")]
MaxWaitOption = Annotated[
    float, typer.Option(min=0, help="Longest time that a row waits for others while the model is idle.")
]
HostOption = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")]
TextEncodersOption = Annotated[
    bool, typer.Option(help="Load the text encoders, so that requests may bring prompts as text.")
]
TokenFileOption = Annotated[
    Path | None, typer.Option(help="File with the bearer token. Default: the variable DINA_REWARD_TOKEN.")
]
MaxQueueRowsOption = Annotated[int, typer.Option(min=1, help="Rows that may be read, queued or scored at once.")]
MaxQueueOption = Annotated[int, typer.Option(min=1, help="MiB of bodies that may be held at once.")]
MaxBodyOption = Annotated[int, typer.Option(min=1, help="MiB of the largest body.")]
RequestTimeoutOption = Annotated[float, typer.Option(help="Seconds after which a queued request is given up.")]
BodyTimeoutOption = Annotated[float, typer.Option(help="Seconds in which a body has to arrive.")]
DrainOption = Annotated[
    float, typer.Option(help="On SIGTERM, seconds in which requests are accepted while /readyz says 503.")
]
ShutdownOption = Annotated[float, typer.Option(help="Seconds after that in which accepted requests are finished.")]
AccessLogOption = Annotated[AccessLogChoice, typer.Option(help="Requests that are logged, one line of JSON each.")]


def serve(
    model_path: ModelPathOption,
    base_model_path: BaseModelPathOption = None,
    dtype: DtypeOption = DtypeChoice.float32,
    max_batch_size: MaxBatchSizeOption = 8,
    max_wait_ms: MaxWaitOption = 10.0,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    device: DeviceOption = None,
    text_encoders: TextEncodersOption = True,
    token_file: TokenFileOption = None,
    max_queue_rows: MaxQueueRowsOption = 8192,
    max_queue_mib: MaxQueueOption = 4096,
    max_body_mib: MaxBodyOption = 256,
    request_timeout: RequestTimeoutOption = 120.0,
    body_timeout: BodyTimeoutOption = 60.0,
    drain_seconds: DrainOption = 5.0,
    shutdown_timeout: ShutdownOption = 20.0,
    access_log: AccessLogOption = AccessLogChoice.errors,
) -> None:
    """Serves a reward over HTTP, in batches: POST /v1/score and /v2/score, GET /v1/info, /readyz, /livez, /metrics."""
    import logging
    import sys
    from functools import partial

    from dina_reward.serving import ServingConfig, load_served_reward
    from dina_reward.serving import serve as run
    from dina_reward.serving.settings import MIB, read_token
    from dina_reward.shipped import pipeline_path, reward_path

    config = ServingConfig(
        max_batch_size=max_batch_size,
        max_wait_ms=max_wait_ms,
        max_queue_rows=max_queue_rows,
        max_queue_bytes=max_queue_mib * MIB,
        max_body_bytes=max_body_mib * MIB,
        request_timeout=request_timeout,
        body_timeout=body_timeout,
        drain_seconds=drain_seconds,
        shutdown_timeout=shutdown_timeout,
        token=read_token(token_file),
        access_log=access_log.value,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("dina_reward.serving.access_log")
    access.addHandler(lines)
    access.propagate = False
    load = partial(
        load_served_reward,
        str(reward_path(model_path)),
        None if base_model_path is None else pipeline_path(base_model_path),
        dtype=dtype.value,
        device=device,
        text_encoders=text_encoders,
    )
    run(load, config, host=host, port=port)
