"""Scores over HTTP: a server in front of a `LatentReward`, and `RemoteReward`, which stands for it in a training script.

A request is bytes first (`body`, `wire`), then a checked `ScoreRequest` (`requests`), waits for others of its shape
(`batcher`, within the bounds of `admission`), is scored with them (`scorer`) and answered (`app`). `server` runs the
application with uvicorn, `ray` on Ray Serve. Begin at `app.create_app` and `remote.RemoteReward`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.serving.app import create_app
    from dina_reward.serving.errors import RequestError
    from dina_reward.serving.loading import load_served_reward
    from dina_reward.serving.remote import RemoteReward
    from dina_reward.serving.server import serve
    from dina_reward.serving.settings import ServingConfig
    from dina_reward.serving.transport import RemoteRewardError

__getattr__, __dir__, __all__ = lazy_exports(__name__)
