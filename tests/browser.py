"""What a page looks like to a reader, asked of headless Chromium over its DevTools protocol.

python tests/browser.py page/index.html .board picture      # what the selector finds: picture.png, picture-dark.png
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "google-chrome")
# what is wrong with the page, as a list of texts
INSPECT = """(() => {
  const found = [];
  const levels = text => text.match(/[0-9.]+/g).map(Number);
  const light = text => {
    const [r, g, b] = levels(text).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (levels(colour)[3] !== 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  if (document.documentElement.scrollWidth > innerWidth)
    found.push(`the page is ${document.documentElement.scrollWidth} wide, the window ${innerWidth}`);
  for (const element of document.body.querySelectorAll('*')) {
    const box = element.getBoundingClientRect(), name = element.tagName + ' ' + element.textContent.slice(0, 30);
    if (box.right > innerWidth + 1 || box.left < -1) found.push(`${name} sticks out`);
    if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth) found.push(`${name} overflows`);
    if ([...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) {
      const [a, b] = [light(getComputedStyle(element).color), light(paper(element))].sort((x, y) => y - x);
      if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${name} has little contrast`);
    }
  }
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) found.push(`an image does not load: ${image.currentSrc.slice(0, 40)}`);
    if (!image.alt.trim()) found.push('an image has no alt text');
  }
  return found;
})()"""
# the smallest rectangle around the elements that a selector finds
AROUND = """((selector) => {
  const boxes = [...document.querySelectorAll(selector)].map(element => element.getBoundingClientRect());
  const x = Math.min(...boxes.map(box => box.left)), y = Math.min(...boxes.map(box => box.top));
  const [right, bottom] = [Math.max(...boxes.map(box => box.right)), Math.max(...boxes.map(box => box.bottom))];
  return {x, y: y + scrollY, width: right - x, height: bottom - y};
})"""


def chromium() -> str | None:
    """The browser's path, if there is one."""
    return next(filter(None, map(shutil.which, BINARIES)), None)


class Browser:
    """One page in headless Chromium; commands and answers are NUL-terminated JSON on two pipes."""

    def __init__(self, profile: str):
        here, self.commands = os.pipe()
        self.answers, there = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        shell = f'exec "$0" "$@" --remote-debugging-pipe 3<&{here} 4>&{there}'
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", shell, chromium(), *flags, "about:blank"],
            pass_fds=(here, there),
            stderr=subprocess.DEVNULL,
        )
        os.close(here), os.close(there)
        self.buffer, self.events, self.number, self.session = b"", [], 0, None
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.commands), os.close(self.answers)

    def read(self) -> dict:
        """The next message."""
        while b"\0" not in self.buffer:
            part = os.read(self.answers, 1 << 16)
            if not part:
                raise RuntimeError("Chromium ended")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        """The answer to a command; events on the way are kept."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (message := self.read()).get("id") != self.number:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def window(self, width: int, scheme: str, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        """Open a page and wait until it is loaded; a served page may ask its server."""
        site = url.split("?")[0]
        self.events, self.own = [], ("file:", "data:", *((site, f"blob:{site}") if site.startswith("http") else ()))
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def look(self, path: Path, width: int, scheme: str) -> list[str]:
        """Open a page in a window of this width and colour scheme; what is wrong with it."""
        self.window(width, scheme)
        self.open(path.absolute().as_uri())
        return self.faults()

    def faults(self) -> list[str]:
        return self.value(INSPECT) + self.complaints()

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} is not so; the page says: {self.value('document.body.innerText')}")
            time.sleep(0.05)

    def middle(self, selector: str) -> dict:
        """Where an element is, after scrolling to it, once it stays there."""
        box, last = None, self
        while box != last:
            last = box
            self.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
            box = self.value(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
            time.sleep(0.1)
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

    def click(self, selector: str, times: int = 1) -> None:
        """A press of the left button on an element, or a double click."""
        at = self.middle(selector)
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=count, **at)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def drop(self, selector: str, *files: Path) -> None:
        """Files dragged from elsewhere and dropped on an element."""
        at = self.middle(selector)
        dragged = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=dragged, **at)

    def choose(self, selector: str, *files: Path) -> None:
        """Give files to a file input, as its dialog does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def picture(self, selector: str) -> bytes:
        """A PNG file of the elements of the opened page that a selector finds, two pixels wide for one."""
        clip = self.value(f"{AROUND}({json.dumps(selector)})") | {"scale": 2}
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(taken["data"])

    def complaints(self) -> list[str]:
        """Errors on the console, and requests that leave the machine."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown" or params.get("type") == "error":
                found.append("an error on the console")
            if method == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(f"logged: {params['entry']['text']}")
            if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(self.own):
                found.append(f"asks the network for {params['request']['url']}")
        return found


def look(path: Path, widths: tuple[int, ...] = (390, 1280), schemes: tuple[str, ...] = ("light", "dark")) -> list[str]:
    """What is wrong with a page, in windows of these widths and colour schemes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            return [
                f"{width} {scheme}: {text}"
                for width in widths
                for scheme in schemes
                for text in browser.look(path, width, scheme)
            ]
        finally:
            browser.close()


if __name__ == "__main__":
    page, selector, out = sys.argv[1:]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        browser.call("Emulation.setScrollbarsHidden", hidden=True)  # as in the picture
        for scheme, suffix in (("light", ".png"), ("dark", "-dark.png")):
            browser.look(Path(page), 520, scheme)
            Path(out + suffix).write_bytes(browser.picture(selector))
        browser.close()
