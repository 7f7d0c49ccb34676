"""Servers for the tests: a real one that can be killed, and a proxy before it for keys, TLS and faults."""

import contextlib
import datetime
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import trustme
from pytest_httpserver import HTTPServer
from werkzeug import Response

KEY = "c2VjcmV0OmtleQ=="  # what the proxy takes with check_key


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def meeting_port():
    """For processes to meet at: below those that connections are given, so that none takes it meanwhile."""
    return random.SystemRandom().randrange(20_000, 32_000)


class NoidaServer:
    """A noida-db that speaks ElasticSearch's protocol, in a process of its own on a free port.

    It writes its data to disk once a second: `kill` may cost it what it acknowledged last.
    """

    def __init__(self):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory()
        self.start()
        return self

    def __exit__(self, *_error):
        self.kill()
        self._folder.cleanup()

    def start(self):
        program = Path(sys.executable).parent / "noida-db"
        flags = ["--only", "elasticsearch", "--elasticsearch-port", str(self.port)]
        self.process = subprocess.Popen(
            [program, "start", *flags, "--data-dir", self._folder.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url, timeout=5):
                return
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"noida-db did not answer at {self.url} within 30 s")

    def kill(self):
        """kill -9, of the wrapper and the server."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def restart(self, after_s=0.0):
        self.kill()
        time.sleep(after_s)
        self.start()


@contextlib.contextmanager
def elasticsearch():
    """The URL of the server that ELASTICSEARCH_URL names, or of a noida-db that lives as long as we do."""
    if os.environ.get("ELASTICSEARCH_URL"):
        yield os.environ["ELASTICSEARCH_URL"].rstrip("/")
        return
    with NoidaServer() as server:
        yield server.url


def api_key():
    """The key for `elasticsearch()`; noida-db takes any."""
    return os.environ.get("ELASTICSEARCH_API_KEY", "none")


class Proxy(HTTPServer):
    """Passes requests on to `upstream`, unless `fault(request)` returns a response of its own.

    tls: an ssl.SSLContext, see `certificates`. check_key: 401 for any key but KEY.
    """

    def __init__(self, upstream, tls=None, check_key=False):
        super().__init__(host="127.0.0.1", port=0, ssl_context=tls, threaded=True)
        self.upstream, self.check_key = upstream, check_key
        self.fault = lambda request: None
        self.requests = 0

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def dispatch(self, request):
        self.requests += 1
        if self.check_key and request.headers.get("Authorization") != f"ApiKey {KEY}":
            return refusal(401, "unable to authenticate with provided credentials")
        return self.fault(request) or self._pass_on(request)

    def _pass_on(self, request):
        left_out = ("host", "connection", "content-length")
        headers = {name: value for name, value in request.headers if name.lower() not in left_out}
        headers["Authorization"] = f"ApiKey {api_key()}"
        url = self.upstream + request.full_path.rstrip("?")
        there = urllib.request.Request(url, request.get_data() or None, headers, method=request.method)
        try:
            answer = urllib.request.urlopen(there, timeout=60)
        except urllib.error.HTTPError as err:
            answer = err
        with answer:
            kept = ("content-type", "x-elastic-product")
            said = {k: v for k, v in answer.headers.items() if k.lower() in kept}
            return Response(answer.read(), answer.status, said)


def refusal(status, reason):
    """An error as ElasticSearch words it."""
    body = {"error": {"type": "exception", "reason": reason}, "status": status}
    product = {"X-Elastic-Product": "Elasticsearch"}
    return Response(json.dumps(body), status, product, content_type="application/json")


def dropped(request):
    """Fault: the connection ends in the middle of the answer."""
    request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return Response("")


def slow(seconds):
    """Fault: the answer comes late."""

    def wait(_request):
        time.sleep(seconds)

    return wait


def first(times, fault, method="POST"):
    """`fault` for the first so many requests of this method, nothing after them."""
    left = [times]

    def now(request):
        if request.method != method or not left[0]:
            return None
        left[0] -= 1
        return fault(request)

    return now


def certificates(folder, host="127.0.0.1", expired=False):
    """(ssl.SSLContext of a server, file of the authority that signed it)."""
    authority = trustme.CA()
    until = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1) if expired else None
    issued = authority.issue_cert(host, not_after=until)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issued.configure_cert(context)
    file = Path(folder) / f"{host}-{expired}.pem"
    authority.cert_pem.write_to_path(file)
    return context, str(file)
