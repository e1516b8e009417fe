"""What a run will need: memory of a rank, calls and FLOPs of an iteration, bytes between ranks, hours; no weight is loaded.

Here live the sizes of a run's parts, counted on the meta device, and the arithmetic on them; no training code may. Begin at
`make_plan`.
"""

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.planning.activations import Kept, activations_of
    from dina_reward.planning.calls import Calls, calls_of
    from dina_reward.planning.devices import DEVICES, Device, Rates, rates_of_bench, rates_of_device
    from dina_reward.planning.memory import Setup, memory_parts
    from dina_reward.planning.plan import Plan, make_plan
    from dina_reward.planning.sizes import RunSizes, text_encoder_parameters
    from dina_reward.planning.traffic import Traffic, traffic_of

__getattr__, __dir__, __all__ = lazy_exports(__name__)
