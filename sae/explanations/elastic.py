"""ElasticSearch: the client, the index and its mapping, searching, and a writer that loses no document."""

import json
import math
import os
import re
import ssl
import sys
import time
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from elastic_transport import ConnectionError as NoConnection
from elastic_transport import SerializationError, TlsError, TransportError
from elasticsearch import ApiError, Elasticsearch, NotFoundError, helpers
from tqdm import tqdm

from sae import InputError, cli
from sae.explanations.journal import ORIGIN, refuse_other

KEYWORD, TEXT, INTEGER, FLOAT, DATE = ({"type": t} for t in ("keyword", "text", "integer", "float", "date"))
CONTEXTS = {"properties": {"row": INTEGER, "text": TEXT, "marks": INTEGER}}
CANDIDATES = {"properties": {"interpretation": TEXT, "explained_by": KEYWORD, "judged": FLOAT}}
# What is sent of a document: it may hold more, for the journal alone.
MAPPING = {
    "layer": INTEGER, "dim": INTEGER, "tokens": KEYWORD, "score": FLOAT, "interpretation": TEXT,
    "score_reason": TEXT, "interval": FLOAT, "control": FLOAT, "control_reason": TEXT, "control_dim": INTEGER,
    "counting": FLOAT, "counting_reason": TEXT, "detection": FLOAT, "detection_reason": TEXT,
    "fuzzing": FLOAT, "fuzzing_reason": TEXT, "explained_by": KEYWORD, "candidates": CANDIDATES,
    "promotes": KEYWORD, "suppresses": KEYWORD, "shown": CONTEXTS, "scored": CONTEXTS, "model": KEYWORD,
    "layer_type": KEYWORD, "hookpoint": KEYWORD, "log10_frequency": FLOAT, "max_activation": FLOAT,
    "interpretation_model": KEYWORD, "simulation": KEYWORD, "settings": KEYWORD, "time": DATE,
    "dataset_fingerprint": KEYWORD, "autoencoder_fingerprint": KEYWORD, "samples_fingerprint": KEYWORD,
}  # fmt: skip
DOCUMENT = {"properties": MAPPING}
LONGEST_KEYWORD = 8191  # characters of at most 4 bytes; a server takes 32,766 bytes
# What a search that names no field looks into: all fields would find `import` in most contexts.
SEARCHED = ["tokens", "interpretation"]
PRIVILEGES = ["create_index", "view_index_metadata", "read", "write"]
BUSY = (408, 429, 500, 502, 503, 504)
BULK, BULK_BYTES, FIRST_PAUSE_S, LONGEST_PAUSE_S, MOST_LOOKS = 100, 2**19, 0.5, 30, 3
WORK_S = 5  # for which the work waits for a server, once in LONGEST_PAUSE_S while it fails


class MayPass(InputError):
    """The server failed, and the same request may succeed later."""


def connect(server_address, api_key, ssl_cert=None, insecure=False):
    """A client of the server, which has answered and accepted the key; InputError says what is wrong.

    server_address: [scheme://]host[:port][/path]. api_key: as ElasticSearch shows it, `id:key`, or @FILE.
    ssl_cert: file with the authority's certificates (default: the system's). insecure: verify none.
    """
    url = _url(server_address, ssl_cert)
    if insecure:
        unsafe = "is not verified, whoever sits in between can read the API key"
        print(f"warning: --insecure: the certificate of {url} {unsafe}", file=sys.stderr)
    tls = {}
    try:
        if url.startswith("https"):  # the client's own default would be the authorities that certifi knows
            unverified = {"verify_certs": False, "ssl_show_warn": False}
            tls = unverified if insecure else {"ssl_context": ssl.create_default_context(cafile=ssl_cert)}
    except OSError as err:
        raise InputError(f"--ssl_cert needs a file of certificates, {ssl_cert}: {err}") from None
    # Bulks are compressed; answers are small.
    options = {"http_compress": True, "headers": {"accept-encoding": "identity"}, "api_key": _key(api_key)}
    client = Elasticsearch(url, request_timeout=20, max_retries=3, retry_on_status=BUSY, **options, **tls)
    with _in_one_line(client):
        client.info()
    return client


def _url(address, ssl_cert):
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or "@" in address or parts.query or parts.fragment or scheme not in ("", "http", "https"):
        # What came is not shown: with the two arguments swapped it is the key.
        form = "[http(s)://]host[:port], without user or password"
        raise InputError(f"server_address needs the form {form}; it is the first argument")
    if scheme == "http" and ssl_cert:
        raise InputError("--ssl_cert needs an https address, an http one came")
    port = port or (443 if scheme == "https" else 9200)
    here = re.fullmatch(r"127(\.\d+){3}|::1|(.+\.)?localhost", host)
    scheme = scheme or ("http" if here and not ssl_cert else "https")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


def _key(text):
    """The key in the form the client takes. It never appears in a message, whatever is wrong with it."""
    if text.startswith("@"):
        try:
            text = Path(cli.path(text[1:])).read_text(errors="replace").strip()
        except OSError as err:
            raise InputError(f"api_key: @FILE needs a file, {text[1:]}: {err.strerror}") from None
    if not re.fullmatch(r"[!-~]+", text):
        raise InputError("api_key needs a key of printable characters without spaces, or @FILE")
    return tuple(text.split(":", 1)) if ":" in text else text


@contextmanager
def _in_one_line(client):
    """What goes wrong between us and the server becomes an InputError: one line, without the key."""
    try:
        yield
    except (ApiError, TransportError) as err:
        text, may_pass = str(err), not isinstance(err, (TlsError, SerializationError))
        if isinstance(err, ApiError):
            error = err.body.get("error") if isinstance(err.body, dict) else None
            text = f"it answered {err.status_code}, {_reason(error)}" if error else text
            may_pass = err.status_code in BUSY or "blocked by" in text
            if err.status_code in (401, 403) and not may_pass:
                needed = f"the cluster privilege monitor and, on the index, {', '.join(PRIVILEGES)}"
                text = f"{text}; the API key has to be valid and needs {needed}"
        elif isinstance(err, TlsError):
            text = f"{text}; --ssl_cert names the authority, http:// in the address does without TLS"
        elif isinstance(err, NoConnection):
            cause = err
            while cause.__context__:  # down to what the system said
                cause = cause.__context__
            text = f"no server answers ({getattr(cause, 'strerror', None) or cause})"
        url = next(iter(client.transport.node_pool.all())).base_url
        # No server sends the key back, but nothing here depends on that.
        key = client._headers["authorization"].split()[-1]
        text = f"ElasticSearch needed at {url}: {text}".replace(key, "***")
        raise (MayPass if may_pass else InputError)(" ".join(text.split())) from err


def _reason(error):
    """The server's words for an error, and what lifts it where an index takes no documents."""
    if isinstance(error, dict):
        error = next(iter(error.get("root_cause") or [error])).get("reason")
    if "flood-stage" in str(error):
        return f"{error} (free the server's disk, or set index.blocks.read_only_allow_delete to null)"
    return f"{error} (a setting index.blocks.* of the index)" if "blocked by" in str(error) else str(error)


def index_name(config):
    """The index of an autoencoder's explanations, from its checkpoint's config."""
    model = str(config["model_name"])
    if os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        model = Path(model).name
    keys = ("layer_type", "layer_id", "act_vec_size", "dict_vec_size", "learning_rate", "l1_coefficient")
    tail = "".join(f"_{config[key]}" for key in keys)
    head, tail = (re.sub(r'[\\/*?"<>|,#:\s]', "-", text.lower()) for text in (model, tail))
    # At most 255 bytes; what tells two autoencoders of one model apart stays.
    head = head.encode()[: 255 - len(tail.encode())].decode(errors="ignore")
    return (head + tail).lstrip("-_+.")


def ensure_index(client, index, origin):
    """Create `index`, or check that its documents have our mapping and come from where this run's come from.

    origin: the fields that all documents of the run have in common. InputError names both sides, or says
    what the key lacks. To an index of the version before the fields that it lacks are added.
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
    owner = {key: origin.get(key) for key in ORIGIN}
    try:
        there = next(iter(client.indices.get_mapping(index=index).values()))["mappings"]
    except NotFoundError:
        mappings = {"dynamic": "strict", "properties": MAPPING, "_meta": owner}
        settings = {"index.query.default_field": SEARCHED}
        client.indices.create(index=index, mappings=mappings, settings=settings)
        return
    meta, fields = there.get("_meta", {}), there.get("properties", {})
    if "autoencoder_fingerprint" in meta and "settings" not in meta:  # of the version before
        meta = next(iter(_found(client, index, size=1)), owner) | meta  # its documents say the rest
    refuse_other(f"the index {index}", meta, owner, "--index names another")
    if (
        meta != owner or fields | MAPPING != fields
    ):  # what it lacks is added; no server changes a field's type
        client.indices.put_mapping(index=index, properties=MAPPING, meta=owner)


def missing(client, index, documents):
    """Those of `documents` that the server has not, or has otherwise."""
    documents, lacking = list(documents), []
    for start in range(0, len(documents), BULK):
        batch = documents[start : start + BULK]
        with _in_one_line(client):
            found = client.mget(index=index, ids=[str(document["dim"]) for document in batch])["docs"]
        lacking += [doc for doc, at in zip(batch, found, strict=True) if at.get("_source") != as_sent(doc)]
    return lacking


def as_sent(value, kind=DOCUMENT):
    """What the server gets of a document: the fields of the mapping, keywords as long as it takes."""
    if isinstance(value, list):
        return [as_sent(part, kind) for part in value]
    if isinstance(value, dict):
        fields = kind["properties"]
        return {name: as_sent(part, fields[name]) for name, part in value.items() if name in fields}
    too_long = kind == KEYWORD and isinstance(value, str) and len(value) > LONGEST_KEYWORD
    return f"{value[: LONGEST_KEYWORD - 1]}…" if too_long else value


def search(server_address, index, query=None, size=10, api_key="none", ssl_cert=None, insecure=False):
    """Documents of explained features, the best score first: [dict].

    query: `import` (in tokens and interpretations), `promotes:import`, `tokens:def AND score:[0.5 TO 1]`
    (Lucene's form), or a dict of ElasticSearch's query language; None: all.
    """
    client = connect(server_address, api_key, ssl_cert, insecure)
    named = {"query_string": {"query": query, "fields": SEARCHED}}  # so that every server answers alike
    asked = query if isinstance(query, dict) else named if query else {"match_all": {}}
    order = [{"score": {"order": "desc", "missing": "_last"}}, {"dim": "asc"}]
    with _in_one_line(client):
        return _found(client, index, query=asked, size=size, sort=order)


def _found(client, index, **asked):
    """The documents that a search finds, what was sent just now among them."""
    with suppress(ApiError):  # a key that only reads waits for the next refresh
        client.indices.refresh(index=index)
    return [hit["_source"] for hit in client.search(index=index, **asked)["hits"]["hits"]]


class Writer(AbstractContextManager):
    """Sends documents in bulks while the work goes on; on leaving, what is left.

    A server that fails holds the work up for WORK_S seconds and is asked again LONGEST_PAUSE_S later. On
    leaving it is asked after growing pauses until `patience_s` seconds have passed without success, or
    `stopping()`. Then `sent` and `unsent` (counts), `rejected` [(dim, reason)] and `trouble` (the last
    failure in one line, or None) are final. A document counts as sent when the server shows it at the end:
    one that restarts may have forgotten it.
    """

    def __init__(self, client, index, patience_s, stopping=lambda: False):
        self._client = client.options(request_timeout=WORK_S, max_retries=0)
        self._index, self._patience_s, self._stopping = index, patience_s, stopping
        self._documents, self._waiting, self._rejected = {}, {}, {}  # by dim
        self._most_bytes, self._next_try, self._may_pass, self.trouble = BULK_BYTES, 0, True, None

    def submit(self, documents):
        new = {document["dim"]: as_sent(document) for document in documents}
        self._documents |= new
        self._waiting |= new
        if self._documents and time.monotonic() >= self._next_try:
            self._try(WORK_S)

    def __exit__(self, error_type, *_error):
        if not error_type:
            self._finish()
        self.unsent, self.rejected = len(self._waiting), sorted(self._rejected.items())
        self.sent = len(self._documents) - self.unsent - len(self.rejected)

    def _finish(self):
        # Several attempts fit into the patience.
        self._client = self._client.options(request_timeout=min(30, max(1, self._patience_s / 4)))
        if self.trouble:
            tqdm.write(f"waiting up to {self._patience_s:g} s for ElasticSearch", file=sys.stderr)
        pause, since, fewest, looks = FIRST_PAUSE_S, time.monotonic(), len(self._waiting), 0
        while self._documents:
            self._try(math.inf, look=True)
            looks += not self.trouble
            if not self.trouble and (not self._waiting or looks == MOST_LOOKS):
                changed = "ElasticSearch shows other documents than it was sent"
                self.trouble = changed if self._waiting else None
                return
            if len(self._waiting) < fewest:
                pause, since, fewest = FIRST_PAUSE_S, time.monotonic(), len(self._waiting)
            left = self._patience_s - (time.monotonic() - since)
            if left <= 0 or self._stopping() or (self.trouble and not self._may_pass):
                self._waiting = self._waiting or self._taken()  # nobody knows what the server kept
                return
            until = time.monotonic() + min(pause, max(left, 1))
            while time.monotonic() < until and not self._stopping():
                time.sleep(0.05)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _try(self, seconds, look=False):
        """Send until nothing waits, a bulk fails or it is late; `look`: see what the server lacks then."""
        trouble, late = None, time.monotonic() + seconds
        try:
            with _in_one_line(self._client):
                # A bulk to an index that is gone would create it with a guessed mapping.
                _same_index(self._client, self._index, next(iter(self._documents.values())))
                while self._waiting and time.monotonic() < late:
                    self._bulks(late)
            if look:
                lacking = missing(self._client, self._index, self._taken().values())
                self._waiting = {document["dim"]: document for document in lacking}
        except InputError as err:
            trouble, self._may_pass = str(err), isinstance(err, MayPass)
            self._next_try = time.monotonic() + LONGEST_PAUSE_S
        if trouble and not self.trouble:
            tqdm.write(f"{trouble}; the work goes on, what is finished is sent later", file=sys.stderr)
        elif self.trouble and not trouble:
            tqdm.write("ElasticSearch answers again", file=sys.stderr)
        self.trouble = trouble

    def _bulks(self, late):
        """Send what waits, in bulks begun before it is `late`; what is taken or rejected waits no longer."""
        actions = (
            {"_index": self._index, "_id": str(dim), "_source": document}
            for dim, document in list(self._waiting.items())
            if time.monotonic() < late
        )
        size = {"chunk_size": BULK, "max_chunk_bytes": self._most_bytes}
        try:
            for _ok, item in helpers.streaming_bulk(self._client, actions, raise_on_error=False, **size):
                result = item["index"]
                dim, error = int(result["_id"]), result.get("error")
                if error and result["status"] != 400:
                    said = f"{result['status']} for feature {dim}: {_reason(error)}"
                    raise MayPass(f"ElasticSearch answered {said}")
                del self._waiting[dim]
                if error:
                    self._rejected[dim] = _reason(error)
        except ApiError as err:
            if err.status_code != 413:
                raise
            # Bulks are answered in order: the first document that waits is in the one that was too large.
            dim, document = next(iter(self._waiting.items()))
            size = len(json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode())
            if size < self._most_bytes:
                self._most_bytes //= 2
            else:  # it was alone in its bulk
                del self._waiting[dim]
                self._rejected[dim] = f"the server or a proxy takes no {size} bytes (413)"

    def _taken(self):
        return {dim: doc for dim, doc in self._documents.items() if dim not in self._rejected}
