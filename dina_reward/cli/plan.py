"""`dina-reward plan`: whether a configuration fits on so many GPUs and what it costs there, before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dina_reward.cli.options import JsonOption


if TYPE_CHECKING:
    from dina_reward.backbones.structures import ModelStructure
    from dina_reward.planning import Device, Plan, Rates


def plan(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="Path of an alignment configuration, or its name in `recipes list`.")],
    gpus: Annotated[
        str | None, typer.Option(help="How many, or several with commas: 1,8,64. Default: those of the launch line.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=1, help="GiB of a GPU. Default: those of --gpu.")] = None,
    gpu: Annotated[
        str, typer.Option(help="Whose data sheet counts: RTX-4090, L40S, A100-40GB, A100-80GB, H100, H200, B200.")
    ] = "A100-80GB",
    flops_rate: Annotated[
        float | None, typer.Option(help="TFLOP/s that a GPU can do at most. Default: the data sheet's.")
    ] = None,
    share: Annotated[float, typer.Option(help="Share of that rate that a run attains.")] = 0.35,
    bench: Annotated[
        Path | None, typer.Option(help="JSON of `dina-reward bench`, whose rates are taken instead.", dir_okay=False)
    ] = None,
    fsdp: Annotated[bool, typer.Option(help="Shard by FSDP2 (the reward then has a copy of its blocks).")] = False,
    reward: Annotated[str | None, typer.Option(help="shared, own or server. Default: as configured.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Says whether an alignment configuration fits, and what an iteration and the run cost; no weight is loaded.

    With other numbers of GPUs than the launch line's, the batch is spread over them. Options of the recipe may follow, as
    in a run: --gradient_checkpointing true.
    """
    from dina_reward.planning.report import memory_table, reward_table, scale_table, summary, work_table

    device, rates = _device_and_rates(gpu, flops_rate, share, bench)
    size = int((device.memory if memory is None else memory) * 2**30)
    plans = _plans(config, gpus, context.args, device, rates, size, "fsdp2" if fsdp else "ddp", reward)
    if as_json:
        print(json.dumps([each.to_dict() for each in plans], indent=2))
        return
    if len(plans) > 1:
        print(f"{scale_table(plans)}\n")
        for each in plans:
            print("\n".join(summary(each)))
        return
    (only,) = plans
    print("\n".join(summary(only)))
    for table in (memory_table, work_table, reward_table):
        print(f"\n{table(only)}")


def _device_and_rates(gpu: str, flops_rate: float | None, share: float, bench: Path | None) -> tuple[Device, Rates]:
    from dina_reward.planning.devices import DEVICES, rates_of_bench, rates_of_device

    if gpu not in DEVICES:
        raise ValueError(f"--gpu is {gpu!r}; expected one of {', '.join(DEVICES)}, or give --flops-rate and --memory")
    if bench is not None and flops_rate is not None:
        raise ValueError("--bench and --flops-rate exclude each other; give one of them")
    device = DEVICES[gpu]
    if bench is not None:
        return device, rates_of_bench(bench)
    if flops_rate is not None:
        return device, rates_of_device("as given", flops_rate * 1e12, share)
    return device, rates_of_device(f"data sheet of {gpu}, not measured", device.rate, share)


def _plans(
    name: str,
    gpus: str | None,
    overrides: list[str],
    device: Device,
    rates: Rates,
    memory: int,
    strategy: Any,
    reward: str | None,
) -> list[Plan]:
    from dina_reward.alignment.config import AlignmentConfig
    from dina_reward.planning.plan import make_plan, spread_over
    from dina_reward.planning.sizes import sizes_of
    from dina_reward.recipes.alignment import torch_dtype
    from dina_reward.recipes.configs import find_config, launch_of, parse_config

    found = find_config(name)
    launch = launch_of(found, None, None)
    arguments, config, *_ = parse_config(found, launch, overrides)
    if not isinstance(config, AlignmentConfig):
        raise ValueError(
            f"{found.name} is a configuration of recipes/{launch.recipe}.py; plans are made of alignment runs"
        )
    structure = _structure_of(arguments.model_name_or_path)
    dtype = torch_dtype(arguments.torch_dtype)
    sizes = sizes_of(structure, config, dtype)
    family, denoiser = structure.family, sizes.denoiser_config
    plans = []
    for count in _counts(gpus, launch.num_processes):
        spread = {} if count == launch.num_processes else spread_over(config, launch.num_processes, count)
        options = [*overrides, *(word for key, value in spread.items() for word in (f"--{key}", str(value)))]
        own = parse_config(found, launch_of(found, None, count), options)[1]
        plans.append(
            make_plan(
                found.name,
                structure.name,
                sizes,
                own,
                gpus=count,
                memory=memory,
                device=device,
                rates=rates,
                weight_bytes=dtype.itemsize,
                reward=_reward_home(reward, arguments, strategy),
                reward_functions=1 + len(arguments.reward_funcs or ()),
                strategy=strategy,
                guidance_passes=lambda scale: 2 if family.uses_negative_prompt(denoiser, scale) else 1,
            )
        )
    return plans


def _structure_of(model: str) -> ModelStructure:
    """Structure of a generator by name, hub id, or directory; of a published one without the hub."""
    from dina_reward.backbones.structures import published_as, structure_of_repository
    from dina_reward.shipped import pipeline_path

    known = published_as(model)
    return known[0] if known else structure_of_repository(pipeline_path(model))


def _reward_home(given: str | None, arguments: Any, strategy: str) -> Any:
    from dina_reward.serving.remote import remote_urls

    if given not in (None, "shared", "own", "server"):
        raise ValueError(f"--reward is {given!r}; expected shared, own or server")
    if given == "shared" and strategy == "fsdp2":
        raise ValueError("--reward shared: under FSDP2 no GPU has whole weights to share; take own or server")
    if given is not None:
        return given
    if list(remote_urls(arguments.reward_model_path)):
        return "server"
    return "shared" if arguments.share_backbone and strategy == "ddp" else "own"


def _counts(gpus: str | None, default: int) -> list[int]:
    if gpus is None:
        return [default]
    try:
        counts = [int(part) for part in gpus.split(",")]
    except ValueError:
        raise ValueError(f"--gpus is {gpus!r}; expected a whole number, or several such as 1,8,64") from None
    if min(counts) < 1:
        raise ValueError(f"--gpus is {gpus!r}; expected positive numbers")
    return counts
