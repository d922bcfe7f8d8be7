"""Headless Chromium for tests, by WebDriver, which is JSON over HTTP."""

import base64
import json
import shutil
import subprocess
import urllib.request

PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]


class Browser:
    """One window: `with Browser() as browser`."""

    def __init__(self, width=1280, height=900):
        chromium, chromedriver = PROGRAMS
        self.driver = subprocess.Popen(
            [chromedriver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in self.driver.stdout:
            if "on port" in line and "successfully" in line:
                port = line.strip().rstrip(".").split()[-1]
                break
        self.address = f"http://127.0.0.1:{port}/session"
        options = {"binary": chromium, "args": [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--window-size={width},{height}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.send("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/{session['sessionId']}"

    def send(self, method, path, content=None):
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, body, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        self.send("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script, *arguments):
        """What a script returns, as the body of a function."""
        return self.send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def type(self, selector, keys):
        """Presses keys on the element of a CSS selector, as a user does."""
        found = self.send("POST", "/element", {"using": "css selector", "value": selector})
        [element] = found.values()
        self.send("POST", f"/element/{element}/value", {"text": keys})

    def devtools(self, command, **parameters):
        return self.send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def console(self):
        """What the page has written to the console since the last call, errors among them."""
        return [entry["message"] for entry in self.send("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.send("GET", "/screenshot")))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self.send("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.driver.stdout.close()
