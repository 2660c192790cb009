"""Recognition in a browser, and for programs over HTTP: enrol pictures in a gallery, recognise others, compare two.

    python serve.py weights/classic-90-10.pt --gallery animals.gallery     # then open http://127.0.0.1:8000/
    python serve.py weights/classic-90-10.pt --gallery animals.gallery --host 0.0.0.0    # for other computers too
    curl --data-binary @cat.jpg "http://127.0.0.1:8000/enrol?name=cat"

A request's body is a picture file as it is, or two; all else is in the query string (UTF-8, percent-encoded). So no
forms are parsed, a file's size is known before it is read, and each picture has its own answer or error.

    POST /embed                         {"embedding": [D numbers]}
    POST /compare?first=BYTES           two files, the first of so many bytes: {"similarity", "same", "probability"}
    POST /recognise?top=5&threshold=T   {"name" (null: unknown), "threshold", "candidates": [{"name", "similarity",
                                        "probability"}], "nearest": [[class, picture's ID, similarity]]}
    POST /enrol?name=CLASS              {"name", "added" (0: it was there), "pictures" (of the class)}
    POST /remove?name=CLASS             {"removed" (pictures)}
    GET /gallery?start=0&most=100&threshold=T     {"classes": [{"name", "pictures": [ID]}] from `start` on, "total",
                                        "threshold", "default", "false_accept", "recognised": [share, pictures], ...}
    GET /thumbnail/ID                   an enrolled picture as the network sees it, JPEG

T is a similarity, by default such that about --false-accept of all pictures of other classes are given a name. What is
refused is answered {"error": "..."} with status 4xx, or 503 when the server is busy. Only this computer can connect,
unless --host says otherwise; then, or with --token, requests need the token: as token=TOKEN in the query string, as the
cookie that the printed address sets, or as the header "Authorization: Bearer TOKEN".
"""

from dataclasses import dataclass

import tyro

import cli


@dataclass(frozen=True)
class Options:
    checkpoint: tyro.conf.Positional[cli.Checkpoint]  # best.pt or last.pt of a run, or what export.py made of it
    gallery: cli.shown_as("FILE")  # file of enrolled classes, opened or made
    host: cli.shown_as("ADDRESS") = "127.0.0.1"  # where to listen; 0.0.0.0: for other computers too
    port: int = 8000  # where to listen; 0: any free port
    token: cli.shown_as("TEXT", str | None) = None  # what requests must carry; made if other computers can connect
    false_accept: float = 0.1  # share of pictures of classes that are not enrolled that may be given a name
    device: cli.Device = "auto"  # where the network runs; auto: on a GPU, if there is one


if __name__ == "__main__":
    cli.parse(Options, __doc__)  # before PyTorch is imported, so that --help takes no seconds

import base64
import contextlib
import dataclasses
import hashlib
import inspect
import ipaddress
import json
import re
import secrets
import socket
import sys
import threading
import unicodedata
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

import oneshot

CONNECTIONS = 64  # at once; more are told that the server is busy
MOST_BYTES = 20_000_000  # of a request's body
SILENCE, PATIENCE = 10.0, 60.0  # seconds without a byte; seconds until a request has come, and then until its turn
POLICY = "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
HEADERS = {"Content-Security-Policy": POLICY + "frame-ancestors 'none'", "X-Content-Type-Options": "nosniff"}
HEADERS |= {"Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer"}
HEADERS |= {"Cache-Control": "no-store", "Connection": "close"}
BUSY = "the server is busy; try again"
METHODS = dict.fromkeys(("embed", "compare", "recognise", "enrol", "remove"), "POST")
METHODS |= dict.fromkeys(("page", "gallery", "thumbnail"), "GET")


def number(text: str, least: float, most: float) -> float:
    """A parameter in `least`..`most`, whole if these are. Raises ValueError."""
    kind = type(least)
    with contextlib.suppress(ValueError):
        if least <= (value := kind(text)) <= most:
            return value
    raise ValueError(f"{text[:50]!r} should be a {'whole ' if kind is int else ''}number in {least}..{most}")


class Server(ThreadingHTTPServer):
    """A recogniser and its gallery. Each path is a method, which takes the request's body and parameters."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, recogniser: oneshot.Recogniser, gallery: oneshot.Gallery, options: Options):
        self.recogniser, self.enrolled, self.options = recogniser, gallery, options
        self.lock, self.free = threading.Lock(), threading.Semaphore(CONNECTIONS)
        try:
            super().__init__((options.host, options.port), Handler)
        except OSError as error:
            address = f"{options.host}:{options.port}"
            raise OSError(f"cannot listen at {address}: {error.strerror}; give another --port or --host") from error
        host, port = self.server_address
        local = ipaddress.ip_address(host).is_loopback
        names = "localhost", "127.0.0.1", host, options.host.lower()
        self.names = names if local else None  # what a Host header may say
        self.token = options.token or (None if local else secrets.token_urlsafe(16))
        self.cookie = f"oneshot-{port}"  # browsers send a cookie to all ports
        host = socket.gethostname() if host == "0.0.0.0" else host
        self.address = f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")
        self.hidden = gallery.path, Path(gallery.path).name  # clients need not know the folder
        self.html = Path(__file__).with_name("serve.html").read_bytes()
        self.headers = dict(HEADERS)
        for kind, text in re.findall(rb"<(style|script)>(.*?)</\1>", self.html, re.DOTALL):
            sha256 = base64.b64encode(hashlib.sha256(text).digest()).decode()
            self.headers["Content-Security-Policy"] += f"; {kind.decode()}-src 'sha256-{sha256}'"

    def handle_error(self, *_) -> None:
        """Clients may go away."""

    def threshold(self, given: str) -> float:
        return number(given, -1.0, 1.0) if given else self.enrolled.threshold(self.options.false_accept)

    def named(self, given: str) -> tuple[str, bool]:
        """A class's name and whether it is enrolled as given; if not, the name is as those of new classes are kept."""
        known = bool(self.enrolled.numbers_of(given))
        return given if known else unicodedata.normalize("NFC", given).strip(), known

    def page(self, body: bytes) -> bytes:
        return self.html

    def embed(self, body: bytes) -> dict:
        return {"embedding": self.recogniser.embed(body)[0].tolist()}

    def compare(self, body: bytes, *, first: str) -> dict:
        length = number(first, 0, MOST_BYTES)
        return dataclasses.asdict(self.recogniser.compare(body[:length], body[length:]))

    def recognise(self, body: bytes, *, top: str = "5", threshold: str = "") -> dict:
        most, value = number(top, 1, 100), self.threshold(threshold)
        z = self.recogniser.embed(body)
        found = dataclasses.asdict(self.enrolled.answer(z, most, value)[0])
        return found | {"threshold": value, "nearest": self.enrolled.nearest(z[0], most)}

    def enrol(self, body: bytes, *, name: str) -> dict:
        name, known = self.named(name)
        if not known and (len(name) > 200 or {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, name))):
            raise ValueError("the name of a class has at most 200 characters, and no control characters")
        added = self.enrolled.enrol(name, body)
        return {"name": name, "added": added, "pictures": len(self.enrolled.numbers_of(name))}

    def remove(self, body: bytes, *, name: str) -> dict:
        return {"removed": self.enrolled.remove(self.named(name)[0])}

    def gallery(self, body: bytes, *, start: str = "0", most: str = "100", threshold: str = "") -> dict:
        names, first = list(self.enrolled.names()), number(start, 0, 10**9)
        shown = names[first : first + number(most, 0, 1000)]
        found = {"gallery": self.hidden[1], "total": len(names), "most_bytes": MOST_BYTES}
        found["classes"] = [{"name": name, "pictures": self.enrolled.numbers_of(name)} for name in shown]
        if names:
            found |= {"threshold": (value := self.threshold(threshold)), "default": self.threshold("")}
            found |= {"false_accept": self.enrolled.false_accept(value), "recognised": self.enrolled.recognised(value)}
        return found

    def thumbnail(self, body: bytes, picture: str, *, version: str = "") -> bytes:
        if (found := self.enrolled.thumbnail(number(picture, 0, 2**63 - 1))) is None:
            raise ValueError(404, f"no picture {picture} is enrolled")
        return found


class Handler(BaseHTTPRequestHandler):
    """One connection with one request. A ValueError is the client's fault: (status, message), or a message for 400."""

    protocol_version, timeout, requestline = "HTTP/1.1", SILENCE, ""
    server_version, sys_version = "One-Shot", ""
    request_version = default_request_version = "HTTP/1.0"  # in which all answers have headers

    def handle(self) -> None:
        self.alarm = threading.Timer(PATIENCE, self.stop_reading)
        self.alarm.daemon = True
        self.alarm.start()
        if not self.server.free.acquire(blocking=False):
            return self.send_error(503, BUSY)
        try:
            super().handle()
        finally:
            self.server.free.release()

    def stop_reading(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def finish(self) -> None:
        """Read on for a while: if a client is still sending when the connection is closed, it loses the answer."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            while self.connection.recv(1 << 16):
                pass
        self.alarm.cancel()
        self.rfile.close()  # or the socket stays open until Python collects the cycle of handler and alarm

    def log_message(self, *_) -> None:
        """The terminal shows no requests."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        message = (message or "this request cannot be understood").replace(*self.server.hidden)
        self.respond({"error": message}, 405 if code == 501 else code)

    def respond(self, content: dict | bytes, status: int = 200) -> None:
        kind = "text/html; charset=utf-8" if content is self.server.html else "image/jpeg"
        if isinstance(content, dict):
            content, kind = f"{json.dumps(content)}\n".encode(), "application/json"
        headers = self.server.headers | {"Content-Type": kind, "Content-Length": len(content)}
        if self.server.token and status == 200:
            headers["Set-Cookie"] = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Lax; Path=/"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        try:
            found = self.answer()
        except ValueError as error:
            self.send_error(*(error.args if len(error.args) == 2 else (400, str(error))))
        except OSError as error:  # the gallery cannot be written
            self.send_error(503, str(error))
        except Exception as error:
            print(f"error: {cli.printable(f'{self.path[:100]}: {error!r}')}", file=sys.stderr)
            self.send_error(500, "the server failed; its terminal says how")
        else:
            self.respond(found)

    do_POST = do_GET

    def answer(self) -> dict | bytes:
        path, _, query = self.path.partition("?")
        query = query.encode("latin-1").decode("utf-8", "surrogateescape")  # curl sends letters as they are
        given = dict(parse_qsl(query, keep_blank_values=True, errors="surrogateescape", max_num_fields=9))
        self.check_sender(given.pop("token", ""))
        name, *rest = (path[1:] or "page").split("/")
        if self.command != METHODS.get(name):
            raise ValueError(405 if name in METHODS else 404, f"{path[:100]} cannot be asked for by {self.command}")
        function = getattr(self.server, name)
        try:
            inspect.signature(function).bind(b"", *rest, **given)
        except TypeError as error:
            raise ValueError(f"/{name}: {error}") from error
        body = self.body() if self.command == "POST" else b""
        if not self.server.lock.acquire(timeout=PATIENCE):
            raise ValueError(503, BUSY)
        try:
            return function(body, *rest, **given)
        finally:
            self.server.lock.release()

    def check_sender(self, token: str) -> None:
        """Refuse what pages of other sites make a browser send, and requests without the token."""
        host, origin, server = self.headers.get("Host", ""), self.headers.get("Origin"), self.server
        if server.names and re.sub(":[0-9]*$", "", host).lower() not in server.names:
            raise ValueError(403, f"this server is not called {host[:100]!r}")
        if origin is not None and origin.partition("://")[2] != host:
            raise ValueError(403, "pages of other sites may not ask this server")
        sent = re.findall(f"(?:^|; *){server.cookie}=([^;]*)", self.headers.get("Cookie", ""))
        sent += [self.headers.get("Authorization", "").removeprefix("Bearer "), token]
        wanted = (server.token or "").encode()
        if wanted and not any(secrets.compare_digest(each.encode("utf-8", "replace"), wanted) for each in sent):
            raise ValueError(401, "this needs the token: open the address that the server printed when it started")

    def body(self) -> bytes:
        """What the request carries; if that is too long, it is refused before it is read."""
        length = ",".join(self.headers.get_all("Content-Length", ["0"]))
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,15}", length):
            raise ValueError(411, "send the Content-Length of the body, a number of bytes")
        if int(length) > MOST_BYTES:
            raise ValueError(413, f"{int(length):,} bytes are more than the {MOST_BYTES:,} allowed")
        with contextlib.suppress(OSError):
            if len(body := self.rfile.read(int(length))) == int(length):
                return body
        raise ValueError(408, "the request was cut short, or came too slowly")


def main(args: Sequence[str] | None = None) -> None:
    options = cli.parse(Options, __doc__, args)
    with cli.user_errors():
        cli.require(options, "port", least=0, most=65535)
        cli.require(options, "false_accept", most=1)
        if not re.fullmatch("[A-Za-z0-9_-]{8,200}", "no-token" if options.token is None else options.token):
            raise ValueError("--token must be 8 or more letters, digits, - and _")
        recogniser = oneshot.load(options.checkpoint, options.device)
        with oneshot.Gallery(options.gallery, recogniser) as gallery, Server(recogniser, gallery, options) as server:
            with contextlib.suppress(KeyboardInterrupt):
                print(f"{options.gallery} is at {server.address} until Ctrl-C", flush=True)
                server.serve_forever()
            server.lock.acquire(timeout=PATIENCE)  # whatever changes the gallery may finish


if __name__ == "__main__":
    main()
