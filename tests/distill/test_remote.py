"""Programs and endpoints as judges, against small real ones."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from PIL import Image

from dina_reward.distill import CommandJudge, EndpointJudge, JudgeBatch, JudgeError, VisionEndpointJudge
from dina_reward.distill.judges import CallableJudge, Judge
from dina_reward.distill.naming import open_judge, open_judges
from dina_reward.distill.remote import png_files


IMAGES = torch.tensor([0.0, 1.0, 0.6])[:, None, None, None].expand(3, 3, 4, 4)
SAMPLES = JudgeBatch(["x", "y", "z"], {"images": IMAGES})
PAIRS = JudgeBatch(["x", "y"], {"images_a": IMAGES[:2], "images_b": IMAGES[1:]})
BRIGHTNESS = """
import json, sys
from PIL import Image
for line in sys.stdin:
    row = json.loads(line)
    shades = [Image.open(row[name]).getpixel((0, 0))[0] / 255 for name in sorted(row) if name != "prompt"]
    print(json.dumps(shades[0] if len(shades) == 1 else shades[0] > shades[1]))
"""


def shade(text: str) -> float:
    return Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2]))).getpixel((0, 0))[0] / 255


class Server(ThreadingHTTPServer):
    """Answers what `reply` makes of a request's JSON; counts requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Any = lambda content: (200, {})
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((content, dict(self.headers)))  # type: ignore[attr-defined]
        status, answer = self.server.reply(content)  # type: ignore[attr-defined]
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def script(tmp_path: Any, text: str) -> str:
    path = tmp_path / "judge.py"
    path.write_text(text)
    return f"{sys.executable} {path}"


def test_a_program_scores_and_compares(tmp_path: Any) -> None:
    command = script(tmp_path, BRIGHTNESS)
    assert CommandJudge(command).ask(SAMPLES) == pytest.approx([0.0, 1.0, 0.6])
    assert CommandJudge(command, "pairs").ask(PAIRS) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit('no weights')", "ended with code 1: no weights"),
        ("print(1)", "returned 1 scores for 3 samples"),
        ("print('good'); print(1); print(2)", "did not answer in JSON"),
        ("print('NaN'); print(1); print(2)", "returned nan for sample 0 of 3"),
        ("import time; time.sleep(30)", r"gave no answer within 0\.5 s"),
    ],
)
def test_programs_that_fail_are_named(tmp_path: Any, text: str, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        CommandJudge(script(tmp_path, text), timeout=0.5 if "sleep" in text else 60).ask(SAMPLES)


def test_what_is_no_program() -> None:
    with pytest.raises(JudgeError, match="cannot be started"):
        CommandJudge("/no/such/judge").ask(SAMPLES)
    with pytest.raises(ValueError, match="command of a judge is empty"):
        CommandJudge(" ")


def test_an_endpoint_scores_and_compares(server: Server) -> None:
    server.reply = lambda content: (200, {"answers": [shade(image) for image in content["images"]]})
    assert EndpointJudge(server.url).ask(SAMPLES) == pytest.approx([0.0, 1.0, 0.6])
    assert server.requests[0][0]["prompts"] == ["x", "y", "z"]
    server.reply = lambda content: (
        200,
        {"answers": [shade(a) > shade(b) for a, b in zip(content["images_a"], content["images_b"], strict=True)]},
    )
    assert EndpointJudge(server.url, "pairs").ask(PAIRS) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {"error": "busy"}), "answered with status 500: .*busy"),
        ((200, {"scores": [1]}), "answered without 'answers'; it has \\['scores'\\]"),
        ((200, [1, 2, 3]), "answered with a list; expected a JSON object"),
        ((200, b"<html>"), "did not answer in JSON"),
        ((200, {"answers": [1, 2]}), "returned 2 scores for 3 samples"),
    ],
)
def test_endpoints_that_fail_are_named(server: Server, answer: Any, message: str) -> None:
    server.reply = lambda content: answer
    with pytest.raises(JudgeError, match=message):
        EndpointJudge(server.url).ask(SAMPLES)


def test_an_endpoint_that_is_not_there_or_slow(server: Server) -> None:
    def slow(content: Any) -> Any:
        time.sleep(1)
        return 200, {"answers": [1, 2, 3]}

    server.reply = slow
    with pytest.raises(JudgeError, match=r"gave no answer within 0\.1 s"):
        EndpointJudge(server.url, timeout=0.1).ask(SAMPLES)
    with pytest.raises(JudgeError, match="cannot be reached at"):
        EndpointJudge("http://127.0.0.1:9", timeout=5).ask(SAMPLES)


def chat(answer: Any, tokens: int = 100) -> Any:
    def reply(content: dict[str, Any]) -> Any:
        parts = content["messages"][0]["content"]
        shades = [shade(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        usage = {"prompt_tokens": tokens, "completion_tokens": 10}
        return 200, {"choices": [{"message": {"content": answer(shades)}}], "usage": usage}

    return reply


def test_a_vision_model_scores_with_its_price_and_is_asked_once(
    server: Server, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    server.reply = chat(lambda shades: f'Sure! ```json\n{{"score": {10 * shades[0]}}}\n```')
    settings: dict[str, Any] = {
        "base_url": server.url + "/", "api_key_variable": "MY_KEY", "input_price": 2.0, "output_price": 10.0,
        "cache_dir": tmp_path / "answers", "retry_seconds": 0,
    }  # fmt: skip
    judge = VisionEndpointJudge("some/model", **settings)
    assert judge.ask(SAMPLES) == pytest.approx([0.0, 10.0, 6.0])
    assert judge.spent == pytest.approx(3 * (200 + 100) / 1e6)
    content, headers = server.requests[0]
    assert headers["Authorization"] == "Bearer secret-key"
    assert content["model"] == "some/model"
    assert "Prompt: " in content["messages"][0]["content"][0]["text"]
    again = VisionEndpointJudge("some/model", **settings)
    assert again.ask(SAMPLES) == pytest.approx([0.0, 10.0, 6.0])
    assert (again.spent, again.requests, len(server.requests)) == (0.0, 0, 3)
    kept = [path.read_text() for path in (tmp_path / "answers").iterdir()]
    assert len(kept) == 3
    assert not any("secret-key" in text for text in kept)
    assert "secret-key" not in json.dumps(judge.identity())
    other = VisionEndpointJudge("other/model", **settings)
    other.ask(SAMPLES)
    assert len(server.requests) == 6


def test_a_vision_model_compares(server: Server, tmp_path: Any) -> None:
    server.reply = chat(lambda shades: json.dumps({"better": "a" if shades[0] > shades[1] else "tie"}))
    judge = VisionEndpointJudge("m", "pairs", base_url=server.url, api_key_variable=None, cache_dir=tmp_path)
    assert judge.ask(PAIRS) == [0.5, 1.0]
    assert "Authorization" not in server.requests[0][1]


def test_a_vision_model_is_tried_again_and_keeps_what_it_said(server: Server, tmp_path: Any) -> None:
    good, failures = chat(lambda shades: json.dumps({"score": shades[0]})), [429, 503]

    def shaky(content: Any) -> Any:
        return (failures.pop(), {"error": "later"}) if failures else good(content)

    server.reply = shaky
    settings: dict[str, Any] = {"base_url": server.url, "api_key_variable": None, "cache_dir": tmp_path}
    judge = VisionEndpointJudge("m", retries=2, retry_seconds=0, concurrency=1, **settings)
    assert judge.ask(SAMPLES) == pytest.approx([0.0, 1.0, 0.6])
    assert judge.requests == 5
    server.reply = lambda content: (200, {"choices": []})
    with pytest.raises(JudgeError, match=r"without choices\[0\]"):
        VisionEndpointJudge("n", retries=0, **settings).ask(SAMPLES)
    server.reply = chat(lambda shades: "I cannot say.")
    with pytest.raises(JudgeError, match="gave no 'score' in its answer 'I cannot say.'"):
        VisionEndpointJudge("n", retries=0, **settings).ask(SAMPLES)


def test_a_missing_key_is_said_without_trying(server: Server, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    judge = VisionEndpointJudge("m", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="the environment variable OPENAI_API_KEY holds no key"):
        judge.ask(SAMPLES)
    assert server.requests == []
    with pytest.raises(ValueError, match="must have {prompt} in it"):
        VisionEndpointJudge("m", instruction="rate it")


def test_equal_images_are_equal_files() -> None:
    assert png_files(IMAGES) == png_files(IMAGES.clone())
    assert len(set(png_files(IMAGES))) == 3


def sharpness(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).std(1)


class Sharpness:
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return sharpness(images)


READY = CallableJudge(sharpness)


@pytest.mark.parametrize(
    ("name", "kind", "judge_class"),
    [
        ("tests.distill.test_remote:sharpness", "scores", CallableJudge),
        ("tests.distill.test_remote.Sharpness", "scores", CallableJudge),
        ("tests.distill.test_remote:READY", "scores", CallableJudge),
        ("command:python judge.py", "scores", CommandJudge),
        ("command-pairs:python judge.py", "pairs", CommandJudge),
        ("https://judge.example/score", "scores", EndpointJudge),
        ("pairs+http://judge.example/compare", "pairs", EndpointJudge),
        ("openai:some/model", "scores", VisionEndpointJudge),
        ("openai-pairs:some/model", "pairs", VisionEndpointJudge),
    ],
)
def test_judges_by_name(name: str, kind: str, judge_class: type[Judge]) -> None:
    judge = open_judge(name)
    assert isinstance(judge, judge_class)
    assert judge.kind == kind
    if isinstance(judge, EndpointJudge):
        assert judge.url.startswith(("http://", "https://"))


def test_names_without_a_judge() -> None:
    with pytest.raises(ValueError, match="cannot import the judge 'no_such_module:x'"):
        open_judge("no_such_module:x")
    with pytest.raises(ValueError, match="names no judge"):
        open_judge("tests.distill.test_remote:BRIGHTNESS")
    with pytest.raises(ValueError, match="names no judge"):
        open_judge("sharpness")
    with pytest.raises(ValueError, match="must name at least one judge"):
        open_judges([])


def test_clip_judges_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from dina_reward.evaluation.clip import ClipReward

    class Fake(ClipReward):
        def __init__(self) -> None:
            self.__name__ = "fake"

        def __call__(self, images: Any, prompts: Any) -> Any:
            return images.flatten(1).mean(1)

    monkeypatch.setattr(ClipReward, "from_pretrained", lambda name, **options: Fake())
    judge = open_judge("clip:some/model")
    assert (judge.name, judge.kind) == ("fake", "scores")
    assert judge.ask(SAMPLES) == pytest.approx([0.0, 1.0, 0.6])
