"""ElasticSearch: the client, the index and its mapping, and a writer that loses no document."""

import ipaddress
import itertools
import os
import re
import ssl
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from elastic_transport import ConnectionTimeout, SerializationError, TlsError, TransportError
from elasticsearch import ApiError, Elasticsearch, NotFoundError, UnsupportedProductError, helpers
from tqdm import tqdm

from sae import InputError

KEYWORD, TEXT, INTEGER, FLOAT, DATE = ({"type": t} for t in ("keyword", "text", "integer", "float", "date"))
MAPPING = {
    "dynamic": "strict",
    "properties": {
        "layer": INTEGER, "dim": INTEGER, "tokens": KEYWORD, "score": FLOAT, "interpretation": TEXT,
        "score_reason": TEXT, "control": FLOAT, "control_reason": TEXT, "control_dim": INTEGER,
        "interval": FLOAT, "model": KEYWORD, "layer_type": KEYWORD, "hookpoint": KEYWORD,
        "log10_frequency": FLOAT, "max_activation": FLOAT, "examples": TEXT,
        "interpretation_model": KEYWORD, "simulation": KEYWORD, "settings": KEYWORD,
        "dataset_fingerprint": KEYWORD, "autoencoder_fingerprint": KEYWORD, "samples_fingerprint": KEYWORD,
        "time": DATE,
    },
}  # fmt: skip
# What a search that names no field (q=import) looks into: all fields would find `import` in most examples.
SEARCHED = ["tokens", "interpretation"]
PRIVILEGES = ["create_index", "view_index_metadata", "read", "write"]
BUSY = (408, 429, 500, 502, 503, 504)
BULK, FIRST_PAUSE_S, LONGEST_PAUSE_S, MOST_LOOKS = 100, 0.5, 30, 3
# OpenSSL's X509_V_ERR numbers; any other one means that no trusted authority signed the certificate.
CERTIFICATE = {9: "is not valid yet", 10: "has expired", 62: "is for another host", 64: "is for another host"}


def connect(server_address, api_key, ssl_cert=None, insecure=False):
    """A client of the server, which has answered and accepted the key; InputError says what is wrong.

    server_address: [scheme://]host[:port][/path]. api_key: as ElasticSearch shows it, `id:key`, or @FILE.
    ssl_cert: file with the authority's certificates (default: the system's). insecure: verify none.
    """
    url = _url(server_address, ssl_cert)
    if insecure:
        print(
            f"warning: --insecure: the certificate of {url} is not verified, "
            "whoever sits in between can read the API key",
            file=sys.stderr,
        )
    tls = _tls(ssl_cert, insecure) if url.startswith("https") else {}
    client = Elasticsearch(
        url, api_key=_key(api_key), request_timeout=20, max_retries=3, retry_on_status=BUSY, **tls
    )
    with _in_one_line(client):
        client.info()
    return client


def _url(address, ssl_cert):
    if "@" in address:
        raise InputError("server_address needs no user or password, the API key says who asks")
    scheme, there, rest = address.rpartition("://")
    scheme = scheme.lower()
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.query or parts.fragment or scheme not in (["http", "https"] if there else [""]):
        # What came is not shown: with the two arguments swapped it is the key.
        raise InputError("server_address needs the form [http(s)://]host[:port]; it is the first argument")
    if scheme == "http" and ssl_cert:
        raise InputError("--ssl_cert needs an https address, an http one came")
    port = port or (443 if scheme == "https" else 9200)
    scheme = scheme or ("http" if _loopback(host) and not ssl_cert else "https")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


def _loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _key(text):
    """The key in the form the client takes. It never appears in a message, whatever is wrong with it."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="ascii").strip()
        except UnicodeDecodeError:
            raise InputError(f"api_key needs a file with the key alone, {text[1:]} is no text") from None
    if not re.fullmatch(r"[!-~]+", text):
        raise InputError("api_key needs a key of printable characters without spaces, or @FILE")
    return tuple(text.split(":", 1)) if ":" in text else text


def _tls(ssl_cert, insecure):
    """The client's options; its own default would be the authorities that certifi knows."""
    if insecure:
        return {"verify_certs": False, "ssl_show_warn": False}
    try:
        return {"ssl_context": ssl.create_default_context(cafile=ssl_cert)}
    except ssl.SSLError:
        raise InputError(f"--ssl_cert needs a file of certificates (PEM), {ssl_cert} is none") from None
    except OSError as err:
        raise InputError(f"--ssl_cert needs a file of certificates, {ssl_cert}: {err.strerror}") from None


@contextmanager
def _in_one_line(client):
    try:
        yield
    except (ApiError, TransportError) as err:
        raise InputError(_plain(err, client)) from err


def _plain(err, client):
    """What went wrong between us and the server, in one line without the key."""
    url = next(iter(client.transport.node_pool.all())).base_url
    if isinstance(err, ApiError):
        text = _api_trouble(err)
    elif isinstance(err, TlsError):
        cause = _root(err)
        if isinstance(cause, ssl.SSLCertVerificationError):
            trouble = CERTIFICATE.get(cause.verify_code, "is from another authority than the trusted ones")
            text = f"is not trusted: its certificate {trouble} ({cause.verify_message})"
        else:
            text = f"speaks no TLS that we know ({cause}); plain http needs http:// in the address"
    elif isinstance(err, SerializationError):
        text = "is not ElasticSearch: its answer cannot be read"
    else:
        late = isinstance(err, ConnectionTimeout)
        text = f"does not answer: {'no reply in time' if late else _root(err)}"
    # No server sends the key back, but nothing here depends on that.
    key = client._headers["authorization"].split()[-1]
    return " ".join(f"ElasticSearch needed, {url} {text}".replace(key, "***").split())


def _api_trouble(err):
    error = err.body.get("error") if isinstance(err.body, dict) else None
    reason = error.get("reason") if isinstance(error, dict) else error
    said = f"{err.status_code}{f', {reason}' if reason else ''}"
    if err.status_code == 401:
        return f"refuses the API key ({said}): it is unknown, has expired or was revoked"
    if err.status_code == 403:
        return (
            f"refuses the API key ({said}): it needs the cluster privilege monitor and, "
            f"on the index, {', '.join(PRIVILEGES)}"
        )
    if isinstance(err, UnsupportedProductError) or (err.status_code not in BUSY and not error):
        return f"is not ElasticSearch (it answered {said})"
    return f"answered {said}"


def _root(err):
    """The first cause of an error: the socket's or TLS's own words."""
    while err.__cause__ or err.__context__:
        err = err.__cause__ or err.__context__
    return err


def index_name(config):
    """The index of an autoencoder's explanations, from its checkpoint's config."""
    model = str(config["model_name"])
    if os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        model = Path(model).name
    keys = ("layer_type", "layer_id", "act_vec_size", "dict_vec_size", "learning_rate", "l1_coefficient")
    tail = _allowed("".join(f"_{config[key]}" for key in keys))
    # At most 255 bytes; what tells two autoencoders of one model apart stays.
    head = _allowed(model).encode()[: 255 - len(tail.encode())].decode(errors="ignore")
    return (head + tail).lstrip("-_+.")


def _allowed(text):
    return re.sub(r'[\\/*?"<>|,#:\s]', "-", text.lower())


def ensure_index(client, index, origin):
    """Create `index`, or check that it has our mapping and holds features of the autoencoder `origin`.

    origin: the autoencoder's fingerprint. InputError names both sides, or says what the key lacks.
    """
    with _in_one_line(client):
        try:
            asked = client.security.has_privileges(index=[{"names": [index], "privileges": PRIVILEGES}])
        except ApiError:  # a server without security has no such question; any other trouble comes up below
            asked = {"index": {}}
        lacking = [name for name, has in asked["index"].get(index, {}).items() if not has]
        if lacking:
            raise InputError(f"the API key lacks {', '.join(lacking)} on the index {index}")
        _same_index(client, index, origin)


def _same_index(client, index, origin):
    try:
        found = client.indices.get_mapping(index=index)
    except NotFoundError:
        settings = {"index.query.default_field": SEARCHED}
        mapping = MAPPING | {"_meta": {"autoencoder_fingerprint": origin}}
        client.indices.create(index=index, mappings=mapping, settings=settings)
        return
    there = next(iter(found.values()))["mappings"]
    types = {field: kind.get("type", "object") for field, kind in there.get("properties", {}).items()}
    other = [
        f"{field} {types.get(field, 'missing')} instead of {kind['type']}"
        for field, kind in MAPPING["properties"].items()
        if types.get(field) != kind["type"]
    ]
    if other:
        raise InputError(f"the index {index} has another mapping: {', '.join(other)}; --index names another")
    made_from = there.get("_meta", {}).get("autoencoder_fingerprint", "nobody knows which")
    if made_from != origin:
        raise InputError(
            f"the index {index} holds features of another autoencoder, {made_from} instead of {origin}; "
            "--index names another"
        )


def missing(client, index, documents):
    """Those of `documents` that the server has not, or has otherwise."""
    documents, lacking = list(documents), []
    for start in range(0, len(documents), BULK):
        batch = documents[start : start + BULK]
        with _in_one_line(client):
            found = client.mget(index=index, ids=[str(document["dim"]) for document in batch])["docs"]
        lacking += [doc for doc, there in zip(batch, found, strict=True) if there.get("_source") != doc]
    return lacking


class Writer:
    """Sends documents in bulks from a thread of its own; `submit` returns at once.

    A server that is down, slow or busy is asked again after growing pauses for as long as the work lasts;
    on leaving, until `patience_s` seconds have passed without success (a run that is being stopped sets it
    to 0). Then `sent` and `unsent` (counts), `rejected` [(dim, reason)] and `trouble` (the last failure in
    one line, or None) are final.
    A document counts as sent when the server shows it at the end: one that restarts may have forgotten it.
    """

    def __init__(self, client, index, patience_s):
        # Several attempts fit into the patience.
        self._client = client.options(request_timeout=min(60, max(1, patience_s / 4)), max_retries=0)
        self._index, self.patience_s = index, patience_s
        self._documents, self._waiting, self._rejected = {}, {}, {}  # by dim
        self._changed, self._closing, self.trouble = threading.Condition(), False, None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def submit(self, document):
        with self._changed:
            self._documents[document["dim"]] = self._waiting[document["dim"]] = document
            self._changed.notify()

    def __exit__(self, error_type, *_error):
        if error_type:
            self.patience_s = 0
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.trouble and self.patience_s:
            _say(f"waiting up to {self.patience_s:g} s for ElasticSearch")
        self._thread.join()
        self.unsent = len(self._waiting)
        self.rejected = sorted(self._rejected.items())
        self.sent = len(self._documents) - len(self._waiting) - len(self._rejected)

    def _work(self):
        pause, failing_since, looks, closing = FIRST_PAUSE_S, time.monotonic(), 0, False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing and not closing:  # the patience begins when the work has ended
                    closing, failing_since = True, time.monotonic()
                batch = dict(itertools.islice(self._waiting.items(), BULK))
            trouble, passing = self._try(self._send, batch) if batch else self._try(self._look_again)
            if trouble and not self.trouble:
                _say(f"{trouble}; the work goes on, what is finished is sent later")
            elif self.trouble and not trouble:
                _say("ElasticSearch answers again")
            if not (trouble and self.trouble) or batch.keys() - self._waiting.keys():
                pause, failing_since = FIRST_PAUSE_S, time.monotonic()
            self.trouble = trouble
            if trouble:
                left = self.patience_s - (time.monotonic() - failing_since)
                if closing and (left <= 0 or not passing):
                    self._waiting = self._waiting or self._taken()  # nobody knows what the server kept
                    return
                with self._changed:
                    # Leaving cuts the pause short; once we are leaving, only the patience does.
                    self._changed.wait_for(
                        lambda c=closing: self._closing and not c, min(pause, max(left, 1))
                    )
                pause = min(2 * pause, LONGEST_PAUSE_S)
            elif not batch:
                looks += 1
                if not self._waiting:
                    return
                if looks == MOST_LOOKS:
                    self.trouble = "ElasticSearch shows other documents than it was sent"
                    return

    def _try(self, action, *args):
        """What went wrong, in one line or None; and whether it may pass."""
        try:
            return action(*args), True
        except InputError as err:
            return str(err), _may_pass(err.__cause__)
        except (ApiError, TransportError) as err:
            return _plain(err, self._client), _may_pass(err)

    def _send(self, batch):
        """One bulk of {dim: document}; those that the server took or rejected wait no longer."""
        # A bulk to an index that is gone would create it with a guessed mapping.
        _same_index(self._client, self._index, next(iter(batch.values()))["autoencoder_fingerprint"])
        actions = [{"_index": self._index, "_id": str(dim), "_source": doc} for dim, doc in batch.items()]
        trouble = None
        for _ok, item in helpers.streaming_bulk(self._client, actions, raise_on_error=False):
            result = item["index"]
            dim, error = int(result["_id"]), result.get("error")
            if error and result["status"] != 400:
                trouble = f"ElasticSearch answered {result['status']} for feature {dim}"
                continue
            with self._changed:
                if self._waiting.get(dim) is batch[dim]:  # and not one that came later
                    del self._waiting[dim]
                if error:
                    self._rejected[dim] = error["reason"] if isinstance(error, dict) else str(error)
        return trouble

    def _taken(self):
        return {dim: doc for dim, doc in self._documents.items() if dim not in self._rejected}

    def _look_again(self):
        lacking = missing(self._client, self._index, self._taken().values())
        self._waiting = {document["dim"]: document for document in lacking}


def _may_pass(err):
    """Whether the same request may succeed later."""
    if isinstance(err, ApiError):
        return err.status_code in BUSY
    return isinstance(err, TransportError) and not isinstance(err, (TlsError, SerializationError))


def _say(line):
    tqdm.write(line, file=sys.stderr)
