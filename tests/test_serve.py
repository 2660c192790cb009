"""serve.py: its endpoints, what it refuses, and its page in a real browser."""

import contextlib
import gc
import http.client
import io
import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

import browser
import checkpoints
import model
import oneshot
import serve
import tiny
from test_report import needs_browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """best.pt of a moment's training on 9 classes, and pictures of 3 others in support/ and queries/."""
    return tiny.pictures(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def recogniser(folder):
    return oneshot.load(folder / "best.pt")


@pytest.fixture
def start(folder, recogniser, tmp_path):
    """Starts a server with an empty gallery; returns it."""
    servers = []

    def run(**options):
        given = serve.Options(str(folder / "best.pt"), str(tmp_path / "a.gallery"), **{"port": 0} | options)
        server = serve.Server(recogniser, oneshot.Gallery(given.gallery, recogniser), given)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        servers.append(server)
        return server

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()
        server.enrolled.close()


@pytest.fixture
def server(start):
    return start()


def call(server, method, path, body=None, **headers):
    """Status, content and headers of an answer; JSON is one line, and decoded."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    if answer.headers["Content-Type"] == "application/json":
        assert content.count(b"\n") == 1
        content = json.loads(content)
    return answer.status, content, answer.headers


def raw(server, sent, wait=30):
    """What a server answers to these bytes, until it closes the connection."""
    with socket.create_connection(server.server_address, timeout=wait) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def pictures(folder, name="class 9", part="support"):
    return sorted((folder / part / name).iterdir())


def test_a_gallery_that_cannot_be_written_is_told(folder, server):
    server.enrolled.database.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(server.enrolled.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    status, found, _ = call(server, "POST", "/enrol?name=a", pictures(folder)[0].read_bytes())
    assert status == 503 and "cannot write to the gallery" in found["error"]
    other.close()
    assert call(server, "POST", "/enrol?name=a", pictures(folder)[0].read_bytes())[0] == 200


def test_endpoints(folder, recogniser, server):
    for name in ("class 9", "class 10", "class 11"):
        for place, path in enumerate(pictures(folder, name), 1):
            status, found, _ = call(server, "POST", f"/enrol?name={quote(name)}", path.read_bytes())
            assert (status, found) == (200, {"name": name, "added": 1, "pictures": place})
    assert call(server, "POST", "/enrol?name=class%209", pictures(folder)[0].read_bytes())[1]["added"] == 0
    assert server.enrolled.enrol("class 9", pictures(folder)[1]) == 0  # the same file by its path
    first, second = (path.read_bytes() for path in pictures(folder, part="queries")[:2])
    found = call(server, "POST", "/embed", first)[1]["embedding"]
    assert np.allclose(found, recogniser.embed(first)[0], atol=1e-6)
    found = call(server, "POST", f"/compare?first={len(first)}", first + second)[1]
    expected = recogniser.compare(*pictures(folder, part="queries")[:2])
    assert found == {"similarity": expected.similarity, "same": expected.same, "probability": expected.probability}
    found = call(server, "POST", "/recognise?top=2&threshold=-1", first)[1]
    (answer,) = server.enrolled.recognise(first, top=2, threshold=-1.0)
    assert found["name"] == answer.name == "class 9" and len(found["candidates"]) == 2
    assert found["candidates"][0]["similarity"] == pytest.approx(answer.candidates[0].similarity)
    rows = recogniser.embed(first) @ recogniser.embed(pictures(folder)).T
    assert found["nearest"][0][0] == "class 9" and found["nearest"][0][2] == pytest.approx(float(rows.max()), abs=1e-5)
    assert call(server, "POST", "/recognise?threshold=1", first)[1]["name"] is None
    found = call(server, "GET", "/gallery?start=1&most=1&threshold=0.25")[1]
    assert [each["name"] for each in found["classes"]] == ["class 11"] and found["total"] == 3
    assert found["most_bytes"] == 20_000_000 and found["gallery"] == "a.gallery"
    assert found["false_accept"] == pytest.approx(server.enrolled.false_accept(0.25))
    assert found["recognised"] == [*server.enrolled.recognised(0.25)] and found["threshold"] == 0.25
    assert found["default"] == pytest.approx(server.enrolled.threshold(0.1)) == server.threshold("")
    status, jpeg, headers = call(server, "GET", f"/thumbnail/{found['classes'][0]['pictures'][0]}")
    assert Image.open(io.BytesIO(jpeg)).size == (16, 16) and headers["Content-Type"] == "image/jpeg"
    assert headers["X-Content-Type-Options"] == "nosniff" and "default-src 'none'" in headers["Content-Security-Policy"]
    for rule in ("base-uri", "form-action", "frame-ancestors"):
        assert f"; {rule} 'none'" in headers["Content-Security-Policy"]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["Cache-Control"] == "no-store"
    assert "this file is not a picture" in call(server, "POST", "/compare?first=0", first)[1]["error"]
    assert call(server, "POST", "/remove?name=class%209")[1] == {"removed": 4}
    assert server.enrolled.names() == {"class 10": 4, "class 11": 4}
    for name in ("class 10", "class 11"):
        call(server, "POST", f"/remove?name={quote(name)}")
    found = call(server, "GET", "/gallery")[1]
    assert found["total"] == 0 and found["classes"] == [] and "threshold" not in found


def test_names_in_other_scripts(folder, server):
    """Letters that curl sends as they are, and both Unicode forms of one name."""
    body = pictures(folder)[0].read_bytes()
    assert call(server, "POST", f"/enrol?name={quote('東京 <b>&')}", body)[1]["name"] == "東京 <b>&"
    head = f"POST /enrol?name=café HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    assert b'{"name": "caf\\u00e9", "added": 1' in raw(server, head.encode() + body)
    assert call(server, "POST", f"/enrol?name={quote('cafe' + chr(0x301))}", body)[1]["added"] == 0
    assert list(server.enrolled.names()) == ["café", "東京 <b>&"]


PICTURE = b"a picture"  # stands for a real one below


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("GET", "/serve.py", None, 404, "/serve.py cannot be asked for by GET"),
        ("GET", "/__init__", None, 404, "cannot be asked for"),
        ("GET", "/thumbnail/999", None, 404, "no picture 999 is enrolled"),
        ("GET", "/thumbnail/1;drop", None, 400, "should be a whole number"),
        ("GET", "/thumbnail", None, 400, "missing a required argument"),
        ("GET", "/thumbnail/..%2f..%2fserve.py", None, 400, "should be a whole number"),
        ("GET", "/thumbnail/9223372036854775808", None, 400, "should be a whole number"),
        ("GET", "/enrol?name=a", None, 405, "cannot be asked for by GET"),
        ("POST", "/gallery", PICTURE, 405, "cannot be asked for by POST"),
        ("PUT", "/enrol?name=a", PICTURE, 405, "Unsupported method"),
        ("DELETE", "/remove?name=a", None, 405, "Unsupported method"),
        ("POST", "/enrol", PICTURE, 400, "missing a required argument: 'name'"),
        ("POST", "/enrol?name=a&class=b", PICTURE, 400, "unexpected keyword argument 'class'"),
        ("POST", "/enrol?name=a&self=b", PICTURE, 400, "unexpected keyword argument 'self'"),
        ("POST", "/enrol?name=a&body=b", PICTURE, 400, "body"),
        ("POST", "/enrol?" + "&".join(f"x{i}=" for i in range(50)), PICTURE, 400, "fields"),
        ("POST", "/enrol?name=", PICTURE, 400, "a class cannot be called ''"),
        ("POST", "/enrol?name=unknown", PICTURE, 400, "a class cannot be called 'unknown'"),
        ("POST", "/enrol?name=%20unknown%20", PICTURE, 400, "a class cannot be called 'unknown'"),
        ("POST", "/enrol?name=a%00b", PICTURE, 400, "no control characters"),
        ("POST", "/enrol?name=a%1b[2Jb", PICTURE, 400, "no control characters"),
        ("POST", "/enrol?name=a%E2%80%A8b", PICTURE, 400, "no control characters"),
        ("POST", "/enrol?name=a%FF", PICTURE, 400, "no control characters"),
        ("POST", f"/enrol?name={'a' * 10_000}", PICTURE, 400, "at most 200 characters"),
        ("POST", "/enrol?name=a", b"<script>alert(1)</script>", 400, "this file is not a picture in a known format"),
        ("POST", "/enrol?name=a", b"", 400, "this file is not a picture"),
        ("POST", "/enrol?name=a", "cut", 400, "this file cannot be read"),
        ("POST", "/enrol?name=a", "bomb", 400, "10000 x 10000 pixels are more than the 80,000,000 allowed"),
        ("POST", "/remove?name=nobody", None, 400, "no class 'nobody' is enrolled"),
        ("POST", "/recognise", PICTURE, 400, "is empty"),
        ("POST", "/recognise?threshold=nan", PICTURE, 400, "'nan' should be a number in -1.0..1.0"),
        ("POST", "/recognise?threshold=2", PICTURE, 400, "'2' should be a number in -1.0..1.0"),
        ("POST", "/recognise?threshold=0.5&top=0", PICTURE, 400, "'0' should be a whole number in 1..100"),
        ("POST", "/recognise?threshold=0.5&top=1e9", PICTURE, 400, "'1e9' should be a whole number in 1..100"),
        ("POST", "/compare", PICTURE, 400, "missing a required argument: 'first'"),
        ("POST", "/compare?first=-1", PICTURE, 400, "whole number"),
        ("POST", "/compare?first=999999", PICTURE, 400, "this file is not a picture"),
        ("GET", "/gallery?threshold=inf", None, 400, "is empty|should be a number"),
        ("GET", "/gallery?start=-1", None, 400, "whole number"),
    ],
)
def test_refusals(folder, server, capfd, method, path, body, status, error):
    real = pictures(folder)[0].read_bytes()
    huge = bytearray(real)
    huge[16:24] = np.array([10_000, 10_000], ">u4").tobytes()
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    body = {PICTURE: real, "cut": real[: len(real) // 2], "bomb": bytes(huge)}.get(body, body)
    if "gallery?threshold" in path:
        server.enrolled.enrol("a", real)
    found = call(server, method, path, body)
    assert found[0] == status and any(text in found[1]["error"] for text in error.split("|")), found
    assert list(found[1]) == ["error"] and len(server.enrolled) == ("gallery?threshold" in path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "path", ["/../serve.py", "//etc/passwd", "/%2e%2e/serve.py", "/thumbnail/../../serve.py", "/..\\serve.py", "/\x00"]
)
@pytest.mark.parametrize("prefix", ["", "http://127.0.0.1"])
def test_no_other_file_can_be_read(server, path, prefix):
    answer = raw(server, f"GET {prefix}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 4") and b"import" not in answer and b"root:" not in answer


def test_senders(start):
    """Other names for this address, and what pages of other sites send."""
    server = start()
    own = f"127.0.0.1:{server.server_address[1]}"
    for host, status in ((own, 200), ("localhost:1", 200), ("evil.example", 403), ("", 403), ("127.0.0.1.evil", 403)):
        assert call(server, "GET", "/gallery", Host=host)[0] == status
    for origin, status in (
        (f"http://{own}", 400),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1", 403),
    ):
        found = call(server, "POST", "/remove?name=a", Origin=origin)
        assert found[0] == status and "Access-Control-Allow-Origin" not in found[2]
    assert raw(server, b"GET /gallery\r\n\r\n").count(b'{"error"') == 1  # HTTP/0.9 has no Host
    answer = raw(server, b"POST /remove?name=a HTTP/1.1\r\nHost: localhost\r\n\r\n")  # as curl -X POST does
    assert answer.startswith(b"HTTP/1.1 400 ") and b"no class 'a'" in answer


@pytest.mark.parametrize("host", ["127.0.0.2", "127.2"])
def test_a_server_answers_at_the_address_that_it_prints(start, host):
    server = start(host=host)
    own = server.address.split("/")[2]
    assert own.startswith("127.0.0.2:")
    assert raw(server, f"GET /gallery HTTP/1.1\r\nHost: {own}\r\n\r\n".encode()).startswith(b"HTTP/1.1 200 ")


def test_clients_are_not_told_where_the_gallery_is(server):
    found = call(server, "POST", "/remove?name=a")[1]
    assert found == {"error": "no class 'a' is enrolled in a.gallery"}


def test_clients_that_go_away_are_no_news(server, capfd):
    connection = socket.create_connection(server.server_address)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sendall(b"GET /")
    connection.close()  # with a reset
    time.sleep(0.4)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\r\n\r\n", None),
        (b"\x16\x03\x01\x02\x00\x01\x00", None),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 411),
        (b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1_0\r\n\r\n", 411),
        (b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 411),
        (b"POST /embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000001\r\n\r\n", 413),
        (b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999999999\r\n\r\n", 411),
        (b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nshort", 408),
    ],
)
def test_requests_that_are_none(server, monkeypatch, capfd, sent, status):
    """Each is answered at once, or after the silence that is allowed, and the next request is served."""
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    answer = raw(server, sent)
    if status:
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and answer.count(b'{"error": ') == 1
    assert b"Traceback" not in answer and call(server, "GET", "/gallery")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_large_body_is_refused_before_it_is_read(server, capfd):
    """And the client that goes on sending all the same gets the answer."""
    status, found, _ = call(server, "POST", "/enrol?name=a", bytes(50_000_000))
    assert (status, found) == (413, {"error": "50,000,000 bytes are more than the 20,000,000 allowed"})
    assert capfd.readouterr() == ("", "")


def test_slow_clients_time_out(server, monkeypatch):
    """Silent ones, and those that send a byte now and then."""
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)
    monkeypatch.setattr(serve, "PATIENCE", 1.0)
    head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    for start, drop in ((head, b""), (head, b"x"), (b"GET / HTTP/1.1\r\nHost: a", b"b")):
        began = time.monotonic()
        with socket.create_connection(server.server_address, timeout=10) as connection:
            connection.sendall(start)
            connection.settimeout(0.1)
            answer = b""
            while time.monotonic() < began + 60:
                try:
                    part = connection.recv(1 << 16)
                    if not part:
                        break
                    answer += part
                except TimeoutError:
                    connection.sendall(drop)
                except OSError:
                    break
            else:
                pytest.fail("the connection is still open")
        assert start != head or b" 408 " in answer


def test_fifty_at_once(folder, server, capfd):
    """All are served, and the gallery holds them all."""
    real = pictures(folder)
    body = [path.read_bytes() for path in real]

    def ask(number):
        if number % 2:
            return call(server, "POST", f"/enrol?name={number}", body[number % 4])[0]
        return call(server, "POST", "/embed", body[number % 4])[0]

    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(ask, range(50))) == {200}
    assert len(server.enrolled) == 25 and capfd.readouterr() == ("", "")


def open_descriptors():
    count = 0
    for number in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(number)
            count += 1
    return count


def test_connections_are_closed_at_once(server):
    """Not when Python next collects cycles, which a server may not do before it runs out of descriptors."""
    gc.collect()
    gc.disable()
    try:
        before = open_descriptors()
        for _ in range(20):
            call(server, "GET", "/gallery")
        time.sleep(0.2)
        assert open_descriptors() < before + 10
    finally:
        gc.enable()


def test_more_than_can_be_served_are_told(server, monkeypatch):
    assert (serve.Handler.timeout, serve.PATIENCE, server.free._value) == (10, 60, 64)
    monkeypatch.setattr(serve.Handler, "timeout", 2.0)
    server.free = threading.Semaphore(2)
    held = [socket.create_connection(server.server_address) for _ in range(2)]
    time.sleep(0.3)
    status, found, _ = call(server, "GET", "/gallery")
    assert (status, found) == (503, {"error": "the server is busy; try again"})
    for connection in held:
        connection.close()
    time.sleep(0.3)
    assert call(server, "GET", "/gallery")[0] == 200
    monkeypatch.setattr(serve, "PATIENCE", 0.2)
    with server.lock:  # another request takes long
        assert call(server, "GET", "/gallery")[0] == 503


def test_tokens(start):
    """For other computers there is one: in the address, then in a cookie, or in a header."""
    server = start(host="0.0.0.0")
    token, (cookie, *_) = server.token, (f"oneshot-{server.server_address[1]}",)
    assert len(token) > 20 and server.address.endswith(f"/?token={token}")
    assert server.address != start(host="0.0.0.0").address
    status, found, headers = call(server, "GET", "/")
    assert status == 401 and "needs the token" in found["error"] and "Set-Cookie" not in headers
    status, page, headers = call(server, "GET", f"/?token={token}", Host="any.example")
    assert status == 200 and page.startswith(b"<!doctype html>") and "HttpOnly" in headers["Set-Cookie"]
    sent = headers["Set-Cookie"].split(";")[0]
    assert sent == f"{cookie}={token}" and f"//{socket.gethostname()}:" in server.address
    assert call(server, "GET", "/gallery", Cookie=f"other=1; {sent}")[0] == 200
    assert call(server, "GET", "/gallery", Authorization=f"Bearer {token}")[0] == 200
    for wrong in ("", "x", token[:-1], token + "x", "\xff"):
        headers = {"Cookie": f"{cookie}={wrong}", "Authorization": f"Bearer {wrong}"}
        assert call(server, "POST", f"/remove?name=a&token={quote(wrong)}", **headers)[0] == 401
    assert call(start(token="my-own-token"), "GET", "/gallery")[0] == 401


def test_faults_of_the_server_are_one_line(server, monkeypatch, capfd):
    monkeypatch.setattr(server, "embed", lambda body: {}["a secret"], raising=True)
    assert call(server, "POST", "/embed", b"x")[:2] == (500, {"error": "the server failed; its terminal says how"})
    assert capfd.readouterr().err == "error: /embed: KeyError('a secret')\n"


def test_what_cannot_be_served(folder, recogniser, refusal, tmp_path):
    """A gallery of another network, one that is none, a port in use, wrong options."""
    best, path = folder / "best.pt", tmp_path / "a.gallery"
    saved = checkpoints.read(best)
    saved["model"]["conv1.weight"] = saved["model"]["conv1.weight"] * 1.01
    model.torch.save(saved, tmp_path / "other.pt")
    with oneshot.Gallery(path, recogniser):
        errors = refusal(serve, tmp_path / "other.pt", "--gallery", path, "--port", 0)
        assert errors.count("\n") == 1 and "made with another network; enrol its pictures again" in errors
    assert "is not a gallery" in refusal(serve, best, "--gallery", best, "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        errors = refusal(serve, best, "--gallery", path, "--port", port)
        assert errors.count("\n") == 1 and f"cannot listen at 127.0.0.1:{port}: Address already in use" in errors
    assert "cannot listen at nowhere.invalid" in refusal(serve, best, "--gallery", path, "--host", "nowhere.invalid")
    assert "--port must be" in refusal(serve, best, "--gallery", path, "--port", 65536)
    assert "--false-accept must be" in refusal(serve, best, "--gallery", path, "--false-accept", 0)
    for token in ("", "short-1", "eight; chars", "a\r\nSet-Cookie: b"):
        assert "--token must be 8 or more letters" in refusal(serve, best, "--gallery", path, "--token", token)


def test_a_change_that_is_being_made_is_finished(folder, tmp_path, monkeypatch):
    done = []

    def serve_forever(server):
        def finish():
            time.sleep(0.3)
            with contextlib.suppress(sqlite3.Error):  # the gallery was closed
                done.append(server.enrolled.enrol("a", pictures(folder)[0]))
            server.lock.release()

        server.lock.acquire()
        threading.Thread(target=finish).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.Server, "serve_forever", serve_forever)
    tiny.run(serve, folder / "best.pt", "--gallery", tmp_path / "a.gallery", "--port", 0)
    assert done == [1]


@pytest.mark.slow
def test_ctrl_c_ends_it(folder, tmp_path):
    command = [
        sys.executable,
        serve.__file__,
        folder / "best.pt",
        *("--port 0 --gallery".split()),
        tmp_path / "a.gallery",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def restore():  # a test in the background ignores the signal, and so would its child
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, preexec_fn=restore, **pipes) as process:
        try:
            line = process.stdout.readline()
            start = f"{tmp_path / 'a.gallery'} is at http://127.0.0.1:"
            assert line.startswith(start) and line.endswith("/ until Ctrl-C\n")
            port = int(line.removeprefix(start).split("/")[0])
            with socket.create_connection(("127.0.0.1", port)):  # someone who sends nothing
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=10) == ("", "") and process.returncode == 0
        finally:
            process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["a.gallery"]


# ----------------------------------------------------------------------------------------------------------- the page


@pytest.fixture
def page(tmp_path):
    """A browser."""
    opened = browser.Browser(str(tmp_path / "profile"))
    yield opened
    opened.close()


def text(page, selector):
    return page.value(f"document.querySelector({json.dumps(selector)}).innerText")


# answers of the server come later by `waits` milliseconds, one number for each
LATE = """real = ask, ask = async (...given) => {
  const found = await real(...given);
  await new Promise(resolve => setTimeout(resolve, waits.shift()));
  return found;
}"""


@pytest.mark.slow
@needs_browser
def test_the_page_shows_no_answer_that_came_too_late(folder, start, page):
    """The slower of two comparisons, of two clicks on "Show more", and rates that cannot be had."""
    server = start()
    for number in range(150):
        server.enrolled.enrol(f"class {number:03}", np.full((16, 16, 3), number, np.uint8))
    page.window(1200, "light", 3000)
    page.open(server.address)
    page.wait("document.querySelectorAll('#list > li').length === 100")
    page.value(f"{LATE}; waits = [700, 0]; $('more').click(); $('more').click(); 0")
    page.wait("!waits.length && document.querySelectorAll('#list > li').length === 150")
    assert text(page, "#summary") == "150 classes"
    page.value("waits = [0, 0, 0]; enrol('class 149', [], 'list-status'); 0")
    page.wait("waits.length === 2")
    assert page.value("new Promise(r => setTimeout(() => r(gallery.classes.length), 300))") == 150
    assert page.value("new Set([...document.querySelectorAll('#list h3')].map(each => each.innerText)).size") == 150

    page.open(server.address)
    page.wait("document.querySelectorAll('#list > li').length === 100")
    server.enrolled.enrol("class 000 and more", np.full((16, 16, 3), 200, np.uint8))  # by another, meanwhile
    page.click("#more")
    page.wait("document.querySelectorAll('#list > li').length === 151")
    page.wait("document.activeElement === $('list').children[100].querySelector('h3')")
    assert page.value("$('more').hidden && setThreshold(0.5).then(() => gallery.classes.length)") == 151
    many = "gallery.classes = Array(1500).fill(gallery.classes[0]); refresh().then(() => $('summary').textContent)"
    assert page.value(many) == "151 classes"
    assert page.value("new Set([...document.querySelectorAll('#list h3')].map(each => each.innerText)).size") == 151

    one, two, three = pictures(folder, part="queries")[:3]
    page.value(f"{LATE}; waits = [700, 0]; 0")
    page.choose(".pair label:nth-child(1) input", one)
    page.choose(".pair label:nth-child(2) input", two)
    page.choose(".pair label:nth-child(2) input", three)
    expected = server.recogniser.compare(one, three)
    page.wait(f"!waits.length && $('compare-status').textContent.includes('{expected.similarity:.3f}')")
    page.value("new Promise(r => setTimeout(r, 1000)).then(() => 0)")
    assert f"{expected.similarity:.3f}" in text(page, "#compare-status")

    page.value("ask = async () => { throw Error('busy'); }; $('threshold').focus(); 0")
    page.press("End", 35)
    page.wait("$('strangers').textContent === 'busy'")
    assert text(page, "#own") == "" and not page.value("$('default').disabled")


@pytest.mark.slow
@needs_browser
def test_the_page_and_what_it_did_not_make(folder, start, page, tmp_path):
    """Changes by another window, names that the page would not give, the older of two answers, a double click."""
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}
    files = {name: tmp_path / f"{name}.png" for name in colours}
    for name, colour in colours.items():
        Image.new("RGB", (16, 16), colour).save(files[name])
    server = start()
    server.enrolled.enrol("red", files["red"])
    server.enrolled.enrol("blue", files["blue"])
    page.window(1200, "light", 3000)
    page.open(server.address)
    page.wait("document.querySelectorAll('#list > li').length === 2")
    with oneshot.Gallery(server.enrolled.path, server.recogniser) as other:
        other.remove("blue")
        other.enrol("green", files["green"])
    page.choose("#query-file", files["green"])
    page.wait("document.querySelector('#nearest img')?.complete && answer.nearest[0][0] === 'green'")
    draw = "draw = document.createElement('canvas').getContext('2d')"
    page.value(f"{draw}; draw.drawImage(document.querySelector('#nearest img'), 0, 0, 1, 1); 0")
    red, green, blue = page.value("[...draw.getImageData(0, 0, 1, 1).data].slice(0, 3)")
    assert green > 200 and max(red, blue) < 50
    assert page.value("$('name').closest('[role=status]').innerText").startswith(text(page, "#name"))

    page.value(f"{LATE}; waits = [700, 0, 0]; recognise(); real('POST', '/remove', {{name: 'green'}}).then(changed); 0")
    page.wait("!waits.length")
    assert page.value("new Promise(r => setTimeout(() => r(answer.candidates.map(each => each.name)), 900))") == ["red"]
    page.value("waits = [700, 0, 0, 0, 0]; refresh(); $('threshold').focus(); 0")
    page.press("End", 35)
    assert page.value("new Promise(r => setTimeout(() => r(gallery.threshold), 1500))") == 1
    page.value("waits = [300, 0]; setThreshold(0.25); setThreshold(0.75); 0")
    page.wait("!waits.length && !asking && gallery.threshold === 0.75")
    page.value("ask = real; setThreshold(null); 0")

    strange = ["cafe\u0301", os.fsdecode(b"caf\xe9"), " lead"]
    for name in strange:
        server.enrolled.enrol(name, files["blue"])
    page.value("refresh().then(() => 0)")
    order = [*server.enrolled.names()]
    for name in strange:
        page.drop(f"#list > li:nth-child({order.index(name) + 1})", files["green"])
        page.wait("$('list-status').textContent.startsWith('1 picture added to')")
        page.value("refresh().then(() => say('list-status', ''))")
    assert server.enrolled.names() == {"red": 1} | dict.fromkeys(strange, 2)
    button = f"#list > li:nth-child({order.index(strange[1]) + 1}) button"
    page.click(button, 2)
    page.wait(f"document.querySelector({json.dumps(button)}).textContent === 'Remove 2 pictures?'")
    assert page.value("new Promise(r => setTimeout(() => r(gallery.total), 500))") == 4
    page.click(button)
    page.wait("gallery.total === 3 && document.activeElement === $('list-status')")
    assert [*server.enrolled.names()] == [name for name in order if name != strange[1]]

    page.choose("#enrol-files", files["red"], files["blue"])
    page.wait("$('enrol-status').textContent === '2 pictures chosen.'")
    page.value("$('class').value = 'new', document.querySelector('#enrol button').focus()")
    page.press("Enter", 13, "\r")
    page.wait("$('enrol-status').textContent.startsWith('2 pictures added to new')")
    page.wait("document.activeElement === document.querySelector('#enrol button')")
    page.click("#enrol button")
    page.wait("$('enrol-status').textContent === 'Choose one or more pictures first.'")
    assert server.enrolled.names()["new"] == 2


NAMES = {"class 9": "a <img src=x onerror=alert(1)> name", "class 10": "東京タワー", "class 11": "שלום"}


@pytest.mark.slow
@needs_browser
def test_the_page(folder, start, page, tmp_path):
    """Real uploads, clicks and keys: classes are made, a picture is recognised, two are compared; at no moment does
    anything overflow, lack contrast or a label, or ask for anything elsewhere."""
    server = start(host="127.0.0.1", token="a-token-of-mine")
    (broken := tmp_path / "broken.png").write_bytes(b"no picture")
    page.window(1200, "light", 3000)
    page.open(server.address)
    page.wait("$('summary').textContent.startsWith('No class yet')")
    assert page.value("location.search") == "" and "token" not in page.value("document.cookie")

    page.choose("#query-file", pictures(folder, part="queries")[0])
    page.wait("$('query-status').textContent.includes('is empty; enrol pictures first')")
    for old, name in NAMES.items():
        files = pictures(folder, old)
        page.choose("#enrol-files", *files, *([broken] if old == "class 9" else []))
        page.value(f"$('class').value = {json.dumps(name)}")
        page.click("#enrol button")
        page.wait(f"$('enrol-status').textContent.includes({json.dumps(f'4 pictures added to {name}')})")
        page.wait("!document.querySelector('#enrol button').disabled")
        if old == "class 9":
            assert "broken.png: this file is not a picture" in text(page, "#enrol-status")
            assert page.value("['enrol-status', 'query-status'].map(id => $(id).className)") == ["wrong", ""]
    assert server.enrolled.names() == dict.fromkeys(NAMES.values(), 4)
    assert page.value("document.querySelectorAll('#list img').length") == 12
    assert page.value("document.querySelectorAll('img[onerror]').length") == 0

    page.wait("!$('answer').hidden")  # the picture that was asked about before
    shown = call(server, "POST", "/recognise?token=a-token-of-mine", pictures(folder, part="queries")[0].read_bytes())[
        1
    ]
    assert text(page, "#name") == (NAMES["class 9"] if shown["name"] else "unknown")
    assert f"{shown['candidates'][0]['similarity']:.3f}" in text(page, "#why")
    assert page.value("document.querySelectorAll('#nearest img').length") == 5
    percents = page.value("[0.1234, 0.99, 0.9962, 1].map(percent)")
    assert percents == ["12\u00a0%", "99\u00a0%", "99.6\u00a0%", "100\u00a0%"]
    cells = "[...document.querySelectorAll('#candidates tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    assert page.value(cells) == [
        [each["name"], f"{each['similarity']:.3f}", page.value(f"percent({each['probability']})")]
        for each in shown["candidates"]
    ]
    page.value("$('threshold').focus()")
    page.press("End", 35)
    page.wait("$('value').textContent === '1.000' && $('own').textContent.includes(', 0\\u00a0% are recognised')")
    assert text(page, "#name") == "unknown" and "About 0" in text(page, "#strangers")
    assert ", not above the threshold of 1.000." in text(page, "#why")
    page.press("Home", 36)
    page.wait("$('own').textContent.startsWith('Of 12 enrolled pictures') && $('value').textContent === '-1.000'")
    assert text(page, "#name") == NAMES["class 9"] and ", above the threshold of -1.000." in text(page, "#why")
    page.wait("$('strangers').textContent.startsWith('About 100\u00a0%')")
    assert page.value("$('threshold').ariaValueText").startswith("-1.000. ")
    page.click("#default")
    page.wait(f"$('value').textContent === '{shown['threshold']:.3f}'")
    page.wait(f"Math.abs($('threshold').valueAsNumber - {shown['threshold']}) < 0.005")
    assert page.value("document.activeElement === $('threshold') && $('default').disabled")

    for place in (1, 2):
        page.choose(f".pair label:nth-child({place}) input", pictures(folder, part="queries")[place])
    page.wait("$('verdict').textContent")
    expected = server.recogniser.compare(*pictures(folder, part="queries")[1:3])
    assert text(page, "#verdict") == ("same class" if expected.same else "different classes")
    assert f"{expected.similarity:.3f}" in text(page, "#compare-status")

    page.choose(".pair label:nth-child(1) input", broken)
    page.wait("$('compare-status').textContent.includes('this file is not a picture')")
    assert text(page, "#verdict") == ""

    for width in (1200, 400, 360):
        for scheme in ("light", "dark"):
            page.window(width, scheme, 4000)
            page.wait("[...document.images].every(image => image.complete)")
            assert [fault for fault in page.faults() if "status of 400" not in fault] == [], (width, scheme)
    unlabelled = (
        "[...document.querySelectorAll('input, button')].filter(e => !(e.labels?.length || e.ariaLabel || e.innerText))"
    )
    assert page.value(f"{unlabelled}.length") == 0
    said = "['summary', 'query-status', 'name', 'enrol-status', 'verdict', 'compare-status', 'list-status']"
    assert page.value(f"{said}.filter(id => !$(id).closest('[role=status]'))") == []
    assert page.value("document.querySelector('meta[name=viewport]').content").startswith("width=device-width")
    assert page.value("[...document.querySelectorAll('input[type=file]')].every(each => !each.files.length)")

    (large := tmp_path / "large.png").write_bytes(bytes(20_000_001))
    page.choose("#query-file", large)
    page.wait("$('query-status').textContent === 'large.png: larger than the 20 MB allowed'")
    assert text(page, "#name") == text(page, "#why") == "" and page.value("$('answer').hidden")
    assert page.value("setThreshold(0).then(() => setThreshold(null)).then(() => $('name').textContent)") == ""


@pytest.mark.slow
@needs_browser
def test_the_page_while_classes_come_and_go(folder, start, page):
    """Pictures are dropped, a class is removed, at last the server ends."""
    server = start()
    for old, name in NAMES.items():
        server.enrolled.enrol(name, pictures(folder, old))
    page.window(1200, "light", 3000)
    page.open(server.address)
    page.wait("document.querySelectorAll('#list > li').length === 3")
    page.drop("#query", pictures(folder, "class 11", "queries")[0])
    page.wait("$('query').querySelector('img').alt.endsWith('.png') && answer?.nearest[0][0] === 'שלום'")
    page.drop("#list > li:last-child", *pictures(folder, "class 10", "queries")[:2], pictures(folder, "class 10")[0])
    page.wait("$('list-status').textContent.includes('2 pictures added to 東京タワー, 1 already there')")
    assert server.enrolled.names()["東京タワー"] == 6
    page.wait("document.querySelectorAll('#list img').length === 14")

    remove = "document.querySelector('#list > li:last-child button')"
    page.click("#list > li:last-child button")
    page.wait(f"{remove}.ariaLabel === 'Really remove the class 東京タワー and 6 pictures?'")
    page.value("$('class').focus()")
    assert page.value(f"[{remove}.textContent, {remove}.ariaLabel]") == ["Remove", "Remove the class 東京タワー"]
    page.click("#list > li:last-child button")
    page.wait(f"{remove}.textContent === 'Remove 6 pictures?'")
    assert len(server.enrolled.names()) == 3  # it asks first
    page.press("Enter", 13, "\r")
    page.wait(
        "document.querySelectorAll('#list > li').length === 2 && $('list-status').textContent.includes('is removed')"
    )
    assert len(server.enrolled.names()) == 2
    server.shutdown()
    server.server_close()
    page.wait("fetch('/gallery').then(() => false, () => true)")  # no connection made in advance is left
    page.choose("#query-file", pictures(folder, part="queries")[0])
    page.wait("$('query-status').textContent.includes('no answer: is the server running')")
    page.value("refresh().then(() => 0)")
    assert text(page, "#summary").startswith("The gallery cannot be read: no answer")
    page.click("#list > li:last-child button")
    page.wait(f"{remove}.textContent.endsWith('?')")
    page.click("#list > li:last-child button")
    page.wait("$('list-status').textContent.includes('is not removed: no answer')")


def test_a_server_has_the_threshold_of_its_share_of_strangers(folder, start):
    """It shows as many pictures as are asked for."""
    server = start(false_accept=0.5)
    server.enrolled.synchronise(folder / "support")
    query = next(folder.glob("queries/class 9/*.png")).read_bytes()
    expected = server.enrolled.threshold(0.5)
    assert call(server, "GET", "/gallery")[1]["default"] == expected < server.enrolled.threshold(0.1)
    found = call(server, "POST", "/recognise?top=2", query)[1]
    assert found["threshold"] == expected and len(found["nearest"]) == len(found["candidates"]) == 2


def test_a_class_is_removed_by_the_name_it_was_enrolled_by(folder, start):
    server, body = start(), next(folder.glob("support/*/*.png")).read_bytes()
    name = "cafe%CC%81%20"
    assert call(server, "POST", f"/enrol?name={name}", body)[1]["name"] == "caf\u00e9"
    assert call(server, "POST", f"/remove?name={name}")[1] == {"removed": 1}
    server.enrolled.enrol("cafe\u0301", body)  # by another program, which keeps names as they are
    assert call(server, "POST", "/remove?name=cafe%CC%81")[1] == {"removed": 1}


def test_the_cookie_is_not_for_other_sites_and_names_of_hosts_have_no_case(start):
    server = start(token="my-own-token")
    cookie = call(server, "GET", "/?token=my-own-token", Host="LocalHost")[2]["Set-Cookie"]
    assert "; SameSite=Lax;" in cookie
