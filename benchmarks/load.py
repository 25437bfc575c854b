"""A load test of `textcraftor serve` on the loopback interface: good and hostile requests, all at once.

    python -m benchmarks.load [--requests 10000] [--hostile 500] [--clients 16] [--waiting 8]

It makes a project of its own with a tiny random model, registers and promotes it, and serves it in a process of its own. A
third of the way through, somebody exchanges the model, its base and its downloads on disk and moves the alias. Prints how
many requests were answered and how, whether every picture is the one that the verified model draws, and the server's
memory before and after. Exits with 1 if a request was lost, answered wrongly, or drawn by another model.
"""

import argparse
import collections
import concurrent.futures
import http.client
import io
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from tests.serving.checkout import MODEL, environment, make_checkout

PICTURES: Final = 40  # different good requests: prompts and seeds
STEPS: Final = 2
ATTEMPTS: Final = 1000  # of a request that is told to come again
HEAD: Final = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
GOOD: Final = b'{"prompt": "a red circle", "seed": 1, "steps": 2}'
NOTHING: Final = 0  # the client did not wait for an answer


def with_length(body: bytes, length: int | None = None) -> bytes:
    return HEAD + f"Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def of(**fields: object) -> bytes:
    return with_length(json.dumps({"prompt": "a red circle", **fields}).encode())


# What is sent, and the statuses that are right.
SENT: Final[dict[str, tuple[bytes, set[int]]]] = {
    "no JSON": (with_length(b"{prompt: a"), {422}),
    "not UTF-8": (with_length(b'{"prompt": "\xff\xfe"}'), {422}),
    "random bytes as a body": (with_length(bytes(range(256))), {422}),
    "deep JSON": (with_length(b"[" * 8000), {422}),
    "a list": (with_length(b"[1, 2]"), {422}),
    "an empty body": (with_length(b""), {422}),
    "a number as prompt": (of(prompt=7), {422}),
    "a list of prompts": (of(prompt=["a"] * 50), {422}),
    "an empty prompt": (of(prompt=" "), {422}),
    "a long prompt": (of(prompt="a" * 5000), {422}),
    "a word as seed": (of(seed="one"), {422}),
    "a huge seed": (of(seed=2**70), {422}),
    "guidance that is no number": (of(guidance=float("nan")), {422}),
    "infinite guidance": (of(guidance=float("inf")), {422}),
    "no steps": (of(steps=0), {422}),
    "a billion steps": (of(steps=10**9), {422}),
    "a picture too large": (of(width=100_000, height=100_000), {422}),
    "another model": (of(model="/etc/passwd"), {422}),
    "a body of a megabyte": (with_length(b" " * 1_000_000), {413}),
    "a false length": (with_length(b"{}", 10**15), {413}),
    "a negative length": (with_length(b"{}", -1), {411}),
    "no length": (HEAD + b"\r\n{}", {411}),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", {411}),
    "another path": (with_length(GOOD).replace(b"/invocations", b"/../../params.yaml"), {404}),
    "another method": (with_length(GOOD).replace(b"POST", b"DELETE"), {501}),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
    "a header of 100 KB": (HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n", {431}),
}


def send(port: int, content: bytes) -> int:
    """The status that the server answers with."""
    with socket.create_connection(("127.0.0.1", port), 120) as connection:
        connection.sendall(content)
        return status(connection)


def send_slowly(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), 120) as connection:
        for byte in with_length(GOOD):
            connection.send(bytes([byte]))
            time.sleep(0.01)
        return status(connection)


def never_finish(port: int) -> int:
    return send(port, with_length(GOOD[:20], len(GOOD)))


def cut_while_sending(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), 120) as connection:
        connection.sendall(with_length(GOOD[:20], len(GOOD)))
    return NOTHING


def cut_while_waiting(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), 120) as connection:
        connection.sendall(with_length(GOOD))
    return NOTHING


def status(connection: socket.socket) -> int:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


BEHAVED: Final[dict[str, tuple[Callable[[int], int], set[int]]]] = {
    "a byte at a time": (send_slowly, {200, 429}),
    "a body that never ends": (never_finish, {408}),
    "cut while sending": (cut_while_sending, {NOTHING}),
    "cut while waiting": (cut_while_waiting, {NOTHING}),
}


class Client(threading.local):
    """One connection a thread, kept open."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def draw(self, number: int, **settings: float) -> tuple[collections.Counter[int], bytes]:
        """Ask for picture `number` until it comes; the statuses on the way, and the PNG."""
        body = json.dumps({"prompt": f"{number} red circles", "seed": number, "steps": STEPS, **settings})
        statuses: collections.Counter[int] = collections.Counter()
        for _ in range(ATTEMPTS):
            self.connection.request("POST", "/invocations", body)
            answer = self.connection.getresponse()
            content = answer.read()
            statuses[answer.status] += 1
            if answer.status != 429:
                return statuses, content
            time.sleep(0.05)
        return statuses, b""


@contextmanager
def served(checkout: Path, waiting: int) -> Iterator[tuple[int, int]]:
    """`textcraftor serve` in the checkout: its port and process id."""
    command = [sys.executable, "-m", "textcraftor.cli", "serve", "--port", "0", "--waiting", str(waiting), "--device", "cpu"]
    server = subprocess.Popen(command, cwd=checkout, env=environment(checkout), stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        yield int(server.stdout.readline().split("/")[2].rpartition(":")[2]), server.pid
    finally:
        server.terminate()
        server.wait()


def memory(process: int) -> float:
    """Resident memory in MB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def exchange(checkout: Path) -> None:
    """Put other bytes wherever the model lies on disk, and move the alias."""
    for folder in (".textcraftor/mlflow/artifacts", ".textcraftor/models", "data/encoders", "base"):
        for path in (checkout / folder).rglob("*.safetensors"):
            path.write_bytes(b"other weights")
    client = MlflowClient(environment(checkout)["MLFLOW_TRACKING_URI"])
    client.set_registered_model_alias(MODEL, "champion", "2")


def pixels(png: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int16)


def run(checkout: Path, requests: int, hostile: int, clients: int, waiting: int) -> bool:
    wrong: collections.Counter[str] = collections.Counter()
    answered: collections.Counter[int] = collections.Counter()
    attacks = [*SENT, *BEHAVED]
    with served(checkout, waiting) as (port, process):
        client = Client(port)
        expected = [pixels(client.draw(number)[1]) for number in range(PICTURES)]
        of_base = [pixels(client.draw(number, strength=0)[1]) for number in range(PICTURES)]
        apart = min(int(np.abs(one - other).max()) for one, other in zip(expected, of_base, strict=True))
        before, started = memory(process), time.monotonic()

        def good(number: int) -> None:
            try:
                statuses, content = client.draw(number % PICTURES)
            except OSError as error:
                wrong[f"good request lost: {type(error).__name__}"] += 1
                client.connection.close()
                return
            answered.update(statuses)
            if not content.startswith(b"\x89PNG"):
                wrong["good request not drawn"] += 1
            elif np.abs(pixels(content) - expected[number % PICTURES]).max() > 1:  # rounding: another batch
                wrong["drawn by another model"] += 1

        def bad(name: str) -> None:
            act, right = BEHAVED[name] if name in BEHAVED else (lambda port: send(port, SENT[name][0]), SENT[name][1])
            try:
                found = act(port)
            except (OSError, http.client.HTTPException) as error:
                wrong[f"{name}: no answer ({type(error).__name__})"] += 1
                return
            answered[found] += 1
            if found not in right:
                wrong[f"{name}: {found}"] += 1

        work: list[Callable[[], None]] = [lambda number=number: good(number) for number in range(requests - hostile)]  # type: ignore[misc]
        work += [lambda name=name: bad(name) for name in itertools.islice(itertools.cycle(attacks), hostile)]  # type: ignore[misc]
        random.Random(0).shuffle(work)
        work.insert(len(work) // 3, lambda: exchange(checkout))
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(each) for each in work]:
                done.result()
        seconds, after = time.monotonic() - started, memory(process)
    for name, count in sorted(wrong.items()):
        print(f"WRONG  {name}  {count} times")
    print(f"{requests} requests, {hostile} of them hostile in {len(attacks)} ways, from {clients} clients in {seconds:.0f} s")
    cut = answered.pop(NOTHING, 0)
    print("answers: " + ", ".join(f"{code} {count} times" for code, count in sorted(answered.items())) + f"; cut: {cut}")
    print(f"lost or wrong: {sum(wrong.values())}")
    print(
        f"drawn by other than the verified bytes: {wrong['drawn by another model']} (another model differs by {apart} of 255)"
    )
    print(f"memory of the server: {before:.0f} MB before, {after:.0f} MB after")
    return not wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--hostile", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--waiting", type=int, default=8)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder) / "checkout", versions=2)
        passed = run(checkout, given.requests, given.hostile, given.clients, given.waiting)
        shutil.rmtree(checkout)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
