"""sae/elastic.py against a real server, and against one with keys, TLS and faults before it."""

import fnmatch
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, assert_refused, run_script
from hypothesis import given
from hypothesis import strategies as st
from servers import KEY, NoidaServer, Proxy, api_key, certificates, dropped, first, free_port, refusal, slow
from werkzeug import Response

from sae import InputError
from sae.explanations import elastic
from sae.explanations.elastic import MAPPING, Writer, connect, ensure_index, index_name, missing, search

ORIGIN = {
    "autoencoder_fingerprint": "0123456789abcdef", "samples_fingerprint": "5a", "simulation": "contrastive",
    "interpretation_model": "tiny", "settings": "num_explanations=3 seed=0",
}  # fmt: skip
CONFIG = {
    "model_name": "codellama/CodeLlama-7b-Instruct-hf", "layer_type": "mlp_activations", "layer_id": 19,
    "act_vec_size": 11008, "dict_vec_size": 44032, "learning_rate": 1e-4, "l1_coefficient": 1.0,
}  # fmt: skip


CONTEXT = {"row": 7, "text": "import os\n", "marks": [[0, 6], [9, 10]]}


def document(dim, **fields):
    """A finished feature, every field that is sent filled."""
    return ORIGIN | {
        "layer": 10, "dim": dim, "tokens": ["import", "\\n"], "score": 0.5, "interpretation": "words",
        "score_reason": None, "control": -0.01, "control_reason": None, "interval": [0.25, 0.75],
        "control_dim": 3, "counting": 0.75, "counting_reason": None, "detection": 0.875, "fuzzing": None,
        "detection_reason": None, "fuzzing_reason": "silent", "explained_by": "counted",
        "candidates": [{"interpretation": "words", "explained_by": "text", "judged": None}],
        "promotes": ["os"], "suppresses": [], "shown": [CONTEXT], "scored": [CONTEXT | {"marks": []}],
        "model": "tiny", "layer_type": "mlp_activations", "hookpoint": "model.layers.10.mlp.act_fn",
        "log10_frequency": -1.5, "max_activation": 3.25, "dataset_fingerprint": "d",
        "time": "2026-11-23T04:00:00+00:00",
    } | fields  # fmt: skip


@pytest.fixture
def client(elasticsearch_url):
    return connect(elasticsearch_url, api_key())


@pytest.fixture
def index(client, request):
    name = f"sae-test-{abs(hash(request.node.nodeid)):x}-{time.time_ns():x}"
    yield name
    client.options(ignore_status=404).indices.delete(index=name)


@pytest.fixture(scope="module")
def one_proxy(elasticsearch_url):
    with Proxy(elasticsearch_url) as server:
        yield server


@pytest.fixture
def proxy(one_proxy):
    """Passes everything on until the test gives it a fault."""
    one_proxy.fault, one_proxy.requests = lambda _request: None, 0
    return one_proxy


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(elastic, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(elastic, "WORK_S", 1)


def stored(client, index):
    client.indices.refresh(index=index)
    hits = client.search(index=index, size=1000)["hits"]["hits"]
    return {int(hit["_id"]): hit["_source"] for hit in hits}


# The address, the key


@pytest.mark.parametrize(
    "address, ssl_cert, url",
    [
        ("127.0.0.1:9200", None, "http://127.0.0.1:9200"),
        ("localhost", None, "http://localhost:9200"),
        ("[::1]:9", None, "http://[::1]:9"),
        ("127.0.0.1:9200", "ca.pem", "https://127.0.0.1:9200"),
        ("es.example.org", None, "https://es.example.org:9200"),
        ("10.0.0.3:9300", None, "https://10.0.0.3:9300"),
        ("http://es.example.org", None, "http://es.example.org:9200"),
        ("https://es.example.org/path/", None, "https://es.example.org:443/path"),
        ("HTTPS://127.0.0.1:1", "ca.pem", "https://127.0.0.1:1"),
    ],
)
def test_the_scheme_follows_the_contract(address, ssl_cert, url):
    assert elastic._url(address, ssl_cert) == url


@pytest.mark.parametrize(
    "address", ["", "http://", "ftp://host", "://host", "host:port", "http://host:99999", "[::1", "host?x=1"]
)
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(InputError, match="server_address needs") as refused:
        connect(address, KEY)
    assert len(address) < 5 or address not in str(refused.value)  # with swapped arguments it is the key


def test_a_password_in_the_address_is_refused_unread():
    with pytest.raises(InputError) as refused:
        connect("http://me:pass-word@host:x", KEY)
    assert "pass-word" not in str(refused.value)


@pytest.mark.parametrize("key", ["", "two words", "line\nline", "ключ"])
def test_a_key_that_is_none_is_refused_unread(key, elasticsearch_url):
    with pytest.raises(InputError) as refused:
        connect(elasticsearch_url, key)
    assert "api_key needs" in str(refused.value)
    assert not key or key not in str(refused.value)


@pytest.mark.parametrize("form", ["key", "file", "pair"])
def test_every_form_of_the_key_reaches_the_server(form, elasticsearch_url, tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    key = {"key": KEY, "file": f"@{tmp_path / 'key'}", "pair": "secret:key"}[
        form
    ]  # KEY is base64 of the pair
    with Proxy(elasticsearch_url, check_key=True) as server:
        connect(server.address, key)


def test_a_key_file_may_lie_in_the_home_folder(elasticsearch_url, tmp_path, monkeypatch):
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    with Proxy(elasticsearch_url, check_key=True) as server:
        connect(server.address, "@~/key")


def test_a_key_file_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match=r"api_key: @FILE needs a file, .*no-key: No such file"):
        connect("localhost", f"@{tmp_path / 'no-key'}")


# What answers, and how


def one_line(refused):
    text = str(refused.value)
    assert "\n" not in text
    assert KEY not in text
    return text


def test_a_server_that_is_not_there():
    with pytest.raises(InputError) as refused:
        connect(f"127.0.0.1:{free_port()}", KEY)
    assert one_line(refused).endswith(": no server answers (Connection refused)")


def test_a_host_that_does_not_exist():
    with pytest.raises(InputError) as refused:
        connect("http://no-such-host.invalid", KEY)
    assert "no server answers (Name or service not known)" in one_line(refused)


def echo(status):
    """Refuses, and sends the key back as no ElasticSearch does."""
    return lambda request: refusal(status, f"bad key {request.headers['Authorization']}, ask for [manage]")


@pytest.mark.parametrize(
    "fault, words",
    [
        (echo(401), ["answered 401, bad key ApiKey ***", "the API key has to be valid"]),
        (echo(403), ["answered 403, bad key ApiKey ***", "ask for [manage]", "needs the", "create_index"]),
        (lambda _request: refusal(429, "too many"), ["answered 429, too many"]),
        (lambda _request: refusal(503, "no master"), ["answered 503, no master"]),
        (lambda _request: Response("<h1>nginx</h1>", content_type="text/html"), ["is not Elasticsearch"]),
        (lambda _request: Response("{}", 200, content_type="application/json"), ["is not Elasticsearch"]),
        (lambda _request: Response("gone", 404), ["404", "gone"]),
        (lambda _request: Response("x", 200, content_type="application/zip"), ["Unknown mimetype"]),
        (lambda _request: Response("{", 200, content_type="application/json"), ["Unable to deserialize"]),
        (dropped, ["closed connection without response"]),
    ],
    ids=["401", "403", "429", "503", "html", "other_product", "404", "zip", "half_json", "dropped"],
)
def test_what_is_wrong_with_the_server_in_one_line(proxy, fault, words):
    proxy.fault = fault
    with pytest.raises(InputError) as refused:
        connect(proxy.address, KEY)
    for word in [proxy.address, *words]:
        assert word in one_line(refused)


def test_a_short_hiccup_at_the_start_is_no_error(proxy):
    proxy.fault = first(2, lambda _request: refusal(503, "starting"), method="GET")
    connect(proxy.address, KEY)
    assert proxy.requests == 3


# TLS


@pytest.mark.parametrize(
    "host, expired, same_authority, words",
    [
        ("127.0.0.1", False, True, None),
        ("127.0.0.1", True, True, "certificate has expired"),
        ("es.example.org", False, True, "not valid for '127.0.0.1'"),
        ("127.0.0.1", False, False, "unable to get local issuer certificate"),
    ],
)
def test_certificates(elasticsearch_url, tmp_path, host, expired, same_authority, words):
    context, authority = certificates(tmp_path, host, expired)
    if not same_authority:
        authority = certificates(tmp_path, "other")[1]
    with Proxy(elasticsearch_url, tls=context) as server:
        if words is None:
            connect(server.address, KEY, ssl_cert=authority)
        else:
            with pytest.raises(InputError) as refused:
                connect(server.address, KEY, ssl_cert=authority)
            assert words in one_line(refused)
        # Without --ssl_cert the system's authorities decide, and they know none of ours.
        with pytest.raises(InputError, match=r"issuer certificate|expired|mismatch"):
            connect(f"https://{server.address}", KEY)


def test_insecure_warns_in_one_line_on_every_start(elasticsearch_url, tmp_path):
    context, _authority = certificates(tmp_path, "es.example.org", expired=True)
    program = "import sys; from sae.explanations import connect; connect(*sys.argv[1:], insecure=True).info()"
    with Proxy(elasticsearch_url, tls=context) as server:
        command = [sys.executable, "-c", program, f"https://{server.address}", KEY]
        for _start in range(2):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            assert done.stderr.startswith("warning: --insecure: the certificate of https://127.0.0.1")
            assert done.stderr.count("\n") == 1


def test_the_systems_authorities_are_trusted(elasticsearch_url, tmp_path, monkeypatch):
    context, authority = certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", authority)  # how OpenSSL is told where the system keeps them
    with Proxy(elasticsearch_url, tls=context) as server:
        connect(f"https://{server.address}", KEY)


def test_a_certificate_for_another_name(elasticsearch_url, tmp_path):
    context, authority = certificates(tmp_path, "es.example.org")
    with Proxy(elasticsearch_url, tls=context) as server, pytest.raises(InputError) as refused:
        connect(f"localhost:{server.port}", KEY, ssl_cert=authority)
    assert "not valid for 'localhost'" in one_line(refused)


def test_plain_http_where_tls_was_meant_and_the_other_way_round(proxy, elasticsearch_url, tmp_path):
    with pytest.raises(InputError) as refused:
        connect(f"https://{proxy.address}", KEY)
    assert "TLS error" in one_line(refused) and "http:// in the address" in one_line(refused)
    with (
        Proxy(elasticsearch_url, tls=certificates(tmp_path)[0]) as server,
        pytest.raises(InputError) as refused,
    ):
        connect(server.address, KEY)
    assert "no server answers" in one_line(refused)


def test_certificate_files_that_are_none(tmp_path):
    (tmp_path / "no.pem").write_text("nothing")
    for file in ("no.pem", "gone.pem"):
        with pytest.raises(InputError, match=f"--ssl_cert needs a file of certificates.*{file}"):
            connect("localhost", KEY, ssl_cert=str(tmp_path / file))
    with pytest.raises(InputError, match="--ssl_cert needs an https address"):
        connect("http://localhost", KEY, ssl_cert=str(tmp_path / "no.pem"))


# The index


def test_index_name_of_the_contract(tmp_path):
    tail = "mlp_activations_19_11008_44032_0.0001_1.0"
    assert index_name(CONFIG) == f"codellama-codellama-7b-instruct-hf_{tail}"
    (tmp_path / "My Model").mkdir()
    for folder in (tmp_path / "My Model", "/somewhere/else/My Model", "./My Model", "a/b/My Model/"):
        assert index_name(CONFIG | {"model_name": str(folder)}) == f"my-model_{tail}"
    assert index_name(CONFIG | {"model_name": "_+-X"}) == f"x_{tail}"
    assert index_name(CONFIG | {"model_name": "ü" * 300}) == "ü" * ((255 - len(tail) - 1) // 2) + f"_{tail}"


@given(st.text(min_size=1), st.floats(1e-9, 1e9))
def test_elasticsearch_takes_every_index_name(model, rate):
    name = index_name(CONFIG | {"model_name": model, "learning_rate": rate})
    assert name == name.lower()
    assert not set(name) & set('\\/*?"<>|,#: \t\n\r')
    assert name[0] not in "-_+."
    assert len(name.encode("utf-8", "surrogatepass")) <= 255
    assert name.endswith(f"mlp_activations_19_11008_44032_{rate}_1.0")


def test_documents_are_found_by_tokens_and_by_interpretation(client, index, elasticsearch_url):
    ensure_index(client, index, ORIGIN)
    ensure_index(client, index, ORIGIN)  # a second run finds its own index
    texts = {1: (["import"], "words that open"), 2: (["("], "the import keyword"), 3: (["("], "brackets")}
    none = {"score": None, "control": None, "interval": None, "score_reason": "constant", "tokens": []}
    submitted = [document(dim, tokens=tokens, interpretation=text) for dim, (tokens, text) in texts.items()]
    with Writer(client, index, 5) as writer:
        writer.submit([*submitted, document(4, **none)])
    assert (writer.sent, writer.unsent, writer.rejected, writer.trouble) == (4, 0, [], None)

    def found(query):
        return [found["dim"] for found in search(elasticsearch_url, index, query, api_key=api_key())]

    # Every document has `import` in its contexts: only the named fields count, on every server alike.
    assert found("import") == [1, 2]
    assert found("tokens:import") == [1]
    assert found("dim:[3 TO 3]") == [3]
    assert found("score:[0.4 TO 0.6]") == [1, 2, 3]
    assert found("promotes:os AND NOT tokens:import") == [2, 3, 4]
    assert found(None) == [1, 2, 3, 4]
    there = client.indices.get_mapping(index=index)[index]["mappings"]
    assert there["properties"] == MAPPING
    assert there["_meta"] == ORIGIN
    # noida-db looks into every field all the same; ElasticSearch does as this says.
    settings = client.indices.get_settings(index=index)[index]["settings"]["index"]
    assert settings["query"]["default_field"] == ["tokens", "interpretation"]


def test_the_five_fields_of_the_contract_keep_name_and_type():
    types = {name: MAPPING[name]["type"] for name in ("layer", "dim", "tokens", "score", "interpretation")}
    assert list(types.values()) == ["integer", "integer", "keyword", "float", "text"]


def test_only_what_the_mapping_names_is_sent_and_long_keywords_are_cut(client, index):
    ensure_index(client, index, ORIGIN)
    long, fits = "é" * 9000, "é" * 8191
    whole = document(1, tokens=["a", long, fits], simulated=[[0.5]], examples=["old"], interpretation=long)
    whole["candidates"] = [{"interpretation": long, "explained_by": "text", "judged": 0.5, "seconds": 1}]
    with Writer(client, index, 5) as writer:
        writer.submit([whole])
    assert (writer.sent, writer.rejected) == (1, [])
    there = stored(client, index)[1]
    assert there["tokens"] == ["a", "é" * 8190 + "…", fits]
    assert there["interpretation"] == long  # text may be as long as it likes
    assert there["candidates"] == [{"interpretation": long, "explained_by": "text", "judged": 0.5}]
    assert not {"simulated", "examples"} & there.keys()
    assert missing(client, index, [whole]) == []


# The fields of the version before, which wrote only the autoencoder into the index.
BEFORE = {
    name: kind for name, kind in MAPPING.items()
    if name not in ("counting", "counting_reason", "detection", "detection_reason", "fuzzing", "candidates",
                    "fuzzing_reason", "explained_by", "promotes", "suppresses", "shown", "scored")
} | {"examples": {"type": "text"}}  # fmt: skip


def index_of_the_version_before(client, index, *documents):
    meta = {"autoencoder_fingerprint": ORIGIN["autoencoder_fingerprint"]}
    client.indices.create(index=index, mappings={"dynamic": "strict", "properties": BEFORE, "_meta": meta})
    for one in documents:
        client.index(index=index, id=str(one["dim"]), document=one)  # searches do not find it yet


@pytest.mark.parametrize("holds", [0, 1])
def test_an_index_of_ours_gets_the_fields_that_it_lacks(client, index, holds):
    old = {name: value for name, value in document(1).items() if name in BEFORE}
    index_of_the_version_before(client, index, *[old][:holds])
    ensure_index(client, index, ORIGIN)
    there = client.indices.get_mapping(index=index)[index]["mappings"]
    assert there["properties"] == MAPPING | BEFORE
    assert there["_meta"] == ORIGIN
    with Writer(client, index, 5) as writer:
        writer.submit([document(2)])
    assert stored(client, index)[2] == document(2)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({}, ["another autoencoder, None instead of 0123456789abcdef", "--index"]),
        (ORIGIN, ["dim", "cannot be changed from type [keyword] to [integer]"]),
    ],
)
def test_an_index_with_another_mapping_is_refused_and_left_alone(client, index, meta, words):
    there = {"properties": {"dim": {"type": "keyword"}}} | ({"_meta": meta} if meta else {})
    client.indices.create(index=index, mappings=there)
    before = client.indices.get_mapping(index=index)[index]
    with pytest.raises(InputError) as refused:
        ensure_index(client, index, ORIGIN)
    assert all(word in one_line(refused) for word in [index if not meta else "ElasticSearch", *words])
    assert client.indices.get_mapping(index=index)[index] == before


@pytest.mark.parametrize("key", ORIGIN)
def test_an_index_of_other_making_is_refused_and_both_are_named(client, index, key):
    ensure_index(client, index, ORIGIN | {key: "theirs"})
    with pytest.raises(InputError) as refused:
        ensure_index(client, index, ORIGIN)
    for words in (index, "theirs", ORIGIN[key], "--index"):
        assert words in one_line(refused)


def test_an_index_of_the_version_before_by_another_llm_is_refused(client, index):
    old = {name: value for name, value in document(1).items() if name in BEFORE}
    index_of_the_version_before(client, index, old | {"interpretation_model": "llama"})
    with pytest.raises(InputError) as refused:
        ensure_index(client, index, ORIGIN)
    for words in (index, "another LLM", "llama", "tiny", "--index"):
        assert words in one_line(refused)
    assert "shown" not in client.indices.get_mapping(index=index)[index]["mappings"]["properties"]


def test_what_the_key_lacks_on_the_index_is_said(proxy, index):
    def lacks_write(request):
        """What ElasticSearch's security answers; noida-db has none."""
        if not request.path.endswith("_has_privileges"):
            return None
        has = {name: name != "write" for name in elastic.PRIVILEGES}
        answer = {"username": "me", "has_all_requested": False, "cluster": {}, "index": {index: has}}
        product = {"X-Elastic-Product": "Elasticsearch"}
        return Response(json.dumps(answer), 200, product, content_type="application/json")

    proxy.fault = lacks_write
    with pytest.raises(InputError, match=f"the API key lacks write on the index {index}$"):
        ensure_index(connect(proxy.address, KEY), index, ORIGIN)
    proxy.fault = lambda request: (
        refusal(403, "indices:admin/get is unauthorized") if index in request.path else None
    )
    with pytest.raises(
        InputError, match=r"403, indices:admin/get is unauthorized\): it needs .* read and|write"
    ):
        ensure_index(connect(proxy.address, KEY), index, ORIGIN)


@pytest.mark.parametrize("path", ["_has_privileges", "_mapping"])
def test_a_connection_that_drops_while_the_index_is_made_ready(proxy, index, path):
    there = connect(proxy.address, KEY)
    proxy.fault = lambda request: dropped(request) if request.path.endswith(path) else None
    with pytest.raises(InputError, match="no server answers"):
        ensure_index(there, index, ORIGIN)
    with pytest.raises(InputError, match="no server answers"):
        proxy.fault = dropped
        missing(there, index, [document(1)])


# The writer


def submit(client, index, dims, patience_s=20):
    with Writer(client, index, patience_s) as writer:
        writer.submit([document(dim) for dim in dims])
    return writer


def test_missing_are_those_the_server_has_not_or_has_otherwise(client, index):
    ensure_index(client, index, ORIGIN)
    submit(client, index, range(250))
    changed = document(249, score=0.25)
    wanted = [document(dim) for dim in range(249)] + [changed, document(250)]
    assert missing(client, index, wanted) == [changed, document(250)]
    assert missing(client, index, []) == []


def test_a_rejected_document_is_reported_and_the_others_go_through(client, index):
    ensure_index(client, index, ORIGIN)
    with Writer(client, index, 5) as writer:
        bad = {2: {"layer": "ten"}, 3: {"time": "noon"}}
        writer.submit([document(dim, **bad.get(dim, {})) for dim in range(5)])
    assert (writer.sent, writer.unsent) == (3, 0)
    assert [dim for dim, _reason in writer.rejected] == [2, 3]
    assert "failed to parse field [layer]" in writer.rejected[0][1]
    assert sorted(stored(client, index)) == [0, 1, 4]


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "dropped", "slow", "after"])
def test_a_fault_that_passes_costs_nothing(proxy, client, index, short_pauses, capfd, fault):
    ensure_index(client, index, ORIGIN)
    # "after": the server takes the bulk, then the answer is lost; the second bulk must change nothing.
    kinds = {"dropped": dropped, "slow": slow(1.5), "after": lambda r: proxy._pass_on(r) and dropped(r)}
    proxy.fault = first(2, kinds.get(fault, lambda _request: refusal(fault, "busy")), method="PUT")
    writer = submit(connect(proxy.address, KEY), index, range(7), patience_s=8)
    assert (writer.sent, writer.unsent, writer.rejected, writer.trouble) == (7, 0, [], None)
    assert stored(client, index) == {dim: document(dim) for dim in range(7)}
    said = capfd.readouterr().err
    assert "the work goes on" in said
    assert "answers again" in said
    assert KEY not in said


def test_a_single_document_that_comes_too_fast_is_sent_again(proxy, client, index, short_pauses):
    """ElasticSearch answers a bulk with 200 and a 429 for those documents that its queue had no room for."""
    ensure_index(client, index, ORIGIN)

    def busy(request):
        answer = json.loads(proxy._pass_on(request).data)
        client.delete(index=index, id="3")
        answer["items"] = [
            {"index": {"_index": index, "_id": "3", "status": 429, "error": {"reason": "full"}}}
            if item["index"]["_id"] == "3" else item for item in answer["items"]
        ]  # fmt: skip
        product = {"X-Elastic-Product": "Elasticsearch"}
        return Response(json.dumps(answer), 200, product, content_type="application/json")

    proxy.fault = first(1, busy, method="PUT")
    writer = submit(connect(proxy.address, KEY), index, [2, 3])
    assert (writer.sent, writer.unsent) == (2, 0)
    assert sorted(stored(client, index)) == [2, 3]


def test_a_dead_server_costs_the_work_one_short_wait(proxy, client, index, monkeypatch):
    """One that never answers: the work waits WORK_S for it, and asks again only LONGEST_PAUSE_S later."""
    ensure_index(client, index, ORIGIN)
    monkeypatch.setattr(elastic, "WORK_S", 0.5)
    there = connect(proxy.address, KEY)
    proxy.fault, proxy.requests = slow(3), 0
    writer = Writer(there, index, 60)
    for dim in range(1000):
        writer.submit([document(dim)])
        assert proxy.requests == 1
    assert "timed out" in writer.trouble
    monkeypatch.setattr(elastic, "LONGEST_PAUSE_S", 0)
    writer._next_try = 0  # as if the pause were over
    proxy.fault = lambda _request: None
    writer.submit([document(1000)])
    assert len(stored(client, index)) > 0  # while the work goes on


def test_the_work_sends_what_waits_only_as_long_as_it_may(proxy, client, index, monkeypatch):
    ensure_index(client, index, ORIGIN)
    monkeypatch.setattr(elastic, "WORK_S", 0.4)
    there = connect(proxy.address, KEY)
    proxy.fault = lambda request: time.sleep(0.3) if request.path.endswith("_bulk") else None
    with Writer(there, index, 20) as writer:
        writer.submit([document(dim) for dim in range(1000)])
        assert 100 <= len(stored(client, index)) < 600
    assert (writer.sent, writer.unsent) == (1000, 0)


def test_pauses_grow_at_the_end(proxy, client, index, short_pauses):
    ensure_index(client, index, ORIGIN)
    times = []

    def refuse(request):
        times.append(time.monotonic())
        return refusal(503, "down")

    there = connect(proxy.address, KEY)
    proxy.fault = refuse
    writer = submit(there, index, range(3), patience_s=2)
    assert (writer.sent, writer.unsent) == (0, 3)
    assert "503, down" in writer.trouble
    gaps = [later - sooner for sooner, later in itertools.pairwise(times[1:])][:5]
    assert all(gap > 0.04 * 2**n for n, gap in enumerate(gaps)), gaps


def test_the_newer_of_two_documents_stays_when_the_older_failed(proxy, client, index, short_pauses):
    ensure_index(client, index, ORIGIN)
    proxy.fault = first(1, lambda _request: refusal(503, "down"), method="PUT")
    with Writer(connect(proxy.address, KEY), index, 20) as writer:
        writer.submit([document(1, score=0.25)])
        writer.submit([document(1, score=0.75)])
    assert (writer.sent, writer.unsent) == (1, 0)
    assert stored(client, index)[1]["score"] == 0.75


def limited(proxy, most_bytes):
    """Fault: a proxy that takes no larger requests; `sizes` of the bulks it saw are kept."""
    sizes = []

    def fault(request):
        if not request.path.endswith("_bulk"):
            return None
        sizes.append(len(request.get_data()))
        return Response("<h1>413</h1>", 413, content_type="text/html") if sizes[-1] > most_bytes else None

    proxy.fault = fault
    return sizes


def noise(dim, size):
    """Text that hardly compresses."""
    return random.Random(dim).randbytes(size // 2).hex()


def test_bulks_are_halved_until_a_proxy_takes_them(proxy, client, index):
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)
    sizes = limited(proxy, 100_000)
    documents = [document(dim, interpretation=noise(dim, 12_000)) for dim in range(100)]
    with Writer(there, index, 20) as writer:
        writer.submit(documents)
    assert (writer.sent, writer.unsent, writer.rejected) == (100, 0, [])
    assert sorted(stored(client, index)) == list(range(100))
    assert sum(size > 100_000 for size in sizes) <= 3  # found once, then kept to


def test_bulks_are_limited_in_bytes_and_compressed(proxy, client, index):
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)
    sizes = limited(proxy, 2**20)
    documents = [document(dim, interpretation=noise(dim, 40_000)) for dim in range(100)]
    with Writer(there, index, 20) as writer:
        writer.submit(documents)
    assert writer.sent == 100
    assert 8 <= len(sizes) <= 9 and max(sizes) < 0.6 * 2**19  # of hexadecimal digits half remains


def test_a_document_that_is_too_large_alone_is_reported_and_the_others_go_through(proxy, client, index):
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)
    limited(proxy, 20_000)
    documents = [
        document(dim, interpretation=noise(dim, 100_000 if dim in (0, 7) else 100)) for dim in range(20)
    ]
    with Writer(there, index, 20) as writer:
        writer.submit(documents)
    assert (writer.sent, writer.unsent) == (18, 0)
    assert [dim for dim, _reason in writer.rejected] == [0, 7]
    assert "413" in writer.rejected[0][1]


FLOOD = (
    "index [i] blocked by: [TOO_MANY_REQUESTS/12/disk usage exceeded flood-stage watermark, "
    "index has read-only-allow-delete block];"
)


@pytest.mark.parametrize("where", ["item", "request"])
def test_a_full_disk_is_told_with_what_lifts_it(proxy, client, index, short_pauses, capfd, where):
    ensure_index(client, index, ORIGIN)

    def flooded(request):
        if not request.path.endswith("_bulk"):
            return None
        if where == "request":
            return refusal(403, FLOOD)
        error = {"type": "cluster_block_exception", "reason": FLOOD}
        item = {"index": {"_index": index, "_id": "3", "status": 429, "error": error}}
        product = {"X-Elastic-Product": "Elasticsearch"}
        body = json.dumps({"errors": True, "items": [item]})
        return Response(body, 200, product, content_type="application/json")

    there = connect(proxy.address, KEY)
    proxy.fault = first(2, flooded, method="PUT")
    writer = submit(there, index, [3])
    assert (writer.sent, writer.unsent) == (1, 0)  # it passed
    said = capfd.readouterr().err
    for words in ("flood-stage watermark", "free the server's disk", "read_only_allow_delete"):
        assert words in said
    assert "API key" not in said


def test_patience_ends_and_what_is_left_is_counted(proxy, client, index, short_pauses):
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)
    proxy.fault = first(10**9, lambda _request: refusal(503, "down"), method="PUT")
    begun = time.monotonic()
    writer = submit(there, index, range(3), patience_s=1.5)
    assert 1.5 <= time.monotonic() - begun < 20
    assert (writer.sent, writer.unsent) == (0, 3)
    proxy.fault = lambda _request: None
    lacking = missing(there, index, [document(dim) for dim in range(3)])
    assert submit(there, index, [doc["dim"] for doc in lacking]).sent == 3


def test_a_server_that_hangs_is_not_waited_for_longer_than_the_patience(proxy, client, index, short_pauses):
    ensure_index(client, index, ORIGIN)
    there, begun = connect(proxy.address, KEY), time.monotonic()
    proxy.fault = slow(8)
    assert submit(there, index, [1], patience_s=0.5).unsent == 1
    assert time.monotonic() - begun < 8


def test_what_nobody_could_look_at_again_counts_as_unsent(proxy, client, index, short_pauses):
    """The server took everything, then fell silent: it may have forgotten."""
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)
    proxy.fault = lambda r: refusal(503, "down") if r.path.endswith("_mget") else None
    writer = submit(there, index, range(3), patience_s=0.2)
    assert (writer.sent, writer.unsent) == (0, 3)
    assert "503, down" in writer.trouble


def test_patience_counts_from_the_last_success(proxy, client, index, short_pauses):
    """Each bulk takes one document and has no room for the others: slow, but never without success."""
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)

    def one_at_a_time(request):
        if not request.path.endswith("_bulk"):
            return None
        time.sleep(0.3)
        answer = json.loads(proxy._pass_on(request).data)
        for item in answer["items"][1:]:
            client.delete(index=index, id=item["index"]["_id"])
            item["index"] |= {"status": 429, "error": {"reason": "full"}}
        product = {"X-Elastic-Product": "Elasticsearch"}
        return Response(json.dumps(answer), 200, product, content_type="application/json")

    proxy.fault = one_at_a_time
    writer = submit(there, index, range(8), patience_s=2)
    assert (writer.sent, writer.unsent) == (8, 0)


def test_patience_begins_when_the_work_has_ended(proxy, client, index, short_pauses):
    """However long the server had been away before."""
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)
    proxy.fault = lambda _request: refusal(503, "down")
    with Writer(there, index, 2) as writer:
        writer.submit([document(1)])
        time.sleep(2.5)
        threading.Timer(0.5, setattr, (proxy, "fault", lambda _request: None)).start()
    assert (writer.sent, writer.unsent) == (1, 0)


def test_a_stop_ends_the_waiting_at_once(proxy, client, index):
    ensure_index(client, index, ORIGIN)
    there, stop = connect(proxy.address, KEY), threading.Event()
    proxy.fault = lambda _request: refusal(503, "down")
    threading.Timer(1.2, stop.set).start()
    begun = time.monotonic()
    with Writer(there, index, 60, stop.is_set) as writer:
        writer.submit([document(1)])
    assert time.monotonic() - begun < 30
    assert (writer.sent, writer.unsent) == (0, 1)


def test_a_server_that_changes_what_it_is_sent_is_not_asked_for_ever(proxy, client, index, short_pauses):
    """As one with a pipeline of its own does."""
    ensure_index(client, index, ORIGIN)

    def changed(request):
        if not request.path.endswith("_mget"):
            return None
        answer = json.loads(proxy._pass_on(request).data)
        for found in answer["docs"]:
            found["_source"]["layer"] = 11
        product = {"X-Elastic-Product": "Elasticsearch"}
        return Response(json.dumps(answer), 200, product, content_type="application/json")

    there = connect(proxy.address, KEY)
    proxy.fault = changed
    writer = submit(there, index, [1], patience_s=60)
    assert (writer.sent, writer.unsent) == (0, 1)
    assert "other documents" in writer.trouble


def test_a_revoked_key_is_not_waited_for(proxy, client, index, capfd):
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)
    proxy.fault = echo(403)
    begun = time.monotonic()
    writer = submit(there, index, range(3), patience_s=60)
    assert time.monotonic() - begun < 30
    assert (writer.sent, writer.unsent) == (0, 3)
    assert "answered 403" in writer.trouble and "needs the cluster privilege" in writer.trouble
    assert KEY not in writer.trouble + capfd.readouterr().err


def test_an_error_in_the_work_ends_without_waiting(proxy, client, index):
    ensure_index(client, index, ORIGIN)
    there = connect(proxy.address, KEY)
    proxy.fault = lambda _request: refusal(503, "down")
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError), Writer(there, index, 60) as writer:
        writer.submit([document(1)])
        raise ZeroDivisionError
    assert time.monotonic() - begun < 30
    assert writer.unsent == 1


def test_a_server_that_is_killed_and_forgets_ends_with_every_document(short_pauses):
    """noida-db loses the last second, and with it the index, when it is killed."""
    with NoidaServer() as server:
        client = connect(server.url, KEY)
        ensure_index(client, "i", ORIGIN)
        with Writer(client, "i", 30) as writer:
            for dim in range(60):
                writer.submit([document(dim)])
                if dim == 20:
                    back = threading.Thread(target=server.restart, kwargs={"after_s": 0.5})
                    back.start()
                time.sleep(0.02)
            back.join()
        assert (writer.sent, writer.unsent, writer.trouble) == (60, 0, None)
        assert stored(client, "i") == {dim: document(dim) for dim in range(60)}
        assert client.indices.get_mapping(index="i")["i"]["mappings"]["properties"] == MAPPING


def test_the_table_is_read_back_best_score_first(client, index, elasticsearch_url):
    ensure_index(client, index, ORIGIN)
    with Writer(client, index, 5) as writer:
        for dim, score in enumerate((0.125, None, 0.75)):
            fields = {"score": score, "counting": score, "interpretation": "one\nline"}
            fields["tokens"] = ["as", f"t{dim}"]
            writer.submit([document(dim, **fields)])
    script = "experiments/print_table.py"
    table = run_script(script, elasticsearch_url, index, "--api_key", api_key())
    rows = [line.split() for line in table.stdout.splitlines()]
    assert rows[1:] == [
        ["2", "0.75", "-0.01", "0.75", "one", "line", "as", "t2"],
        ["0", "0.12", "-0.01", "0.12", "one", "line", "as", "t0"],
        ["1", "-", "-0.01", "-", "one", "line", "as", "t1"],
        ["3", "features"],
    ]
    found = run_script(script, elasticsearch_url, index, "--api_key", api_key(), "--query", "tokens:t1")
    assert found.stdout.splitlines()[1].split()[0] == "1"
    assert found.stdout.splitlines()[-1] == "1 features"
    assert_refused(run_script(script, elasticsearch_url, f"{index}-x", "--api_key", api_key()), f"{index}-x")


# What the docs and the Kibana file say


@pytest.fixture(scope="module")
def six(elasticsearch_url):
    """Index of six features that the questions of the docs tell apart."""
    client, index = connect(elasticsearch_url, api_key()), f"sae-six-{time.time_ns():x}"
    two = [{"interpretation": "closing brackets", "explained_by": "text", "judged": 0.1}]
    features = [
        {"tokens": ["import", "from"], "score": 0.25},
        {"tokens": ["self"], "score": None, "promotes": ["self"], "layer": 11},
        {"tokens": ["import"], "score": 0.75, "log10_frequency": -3.5, "max_activation": 2.0},
        {"tokens": ["def"], "score": -0.5, "promotes": ["self", "cls"]},
        {"tokens": ["def"], "score": 0.5, "log10_frequency": -4.0, "max_activation": 9.0, "candidates": two},
        {"tokens": [")"], "score": 0.125, "interpretation": "brackets of calls"},
    ]
    ensure_index(client, index, ORIGIN)
    with Writer(client, index, 5) as writer:
        writer.submit([document(dim, **fields) for dim, fields in enumerate(features)])
    assert writer.sent == 6
    client.indices.refresh(index=index)
    yield index
    client.indices.delete(index=index)


ASKED = (ROOT / "docs" / "elasticsearch.md").read_text()
QUESTIONS = re.findall(r"^\{\"query.*\}$", ASKED, re.MULTILINE)


@pytest.mark.parametrize(
    ("number", "dims"), enumerate([[2, 0], [2, 4, 0, 5, 3], [3], [4, 2], [5, 4]]),
    ids=["fires on", "best", "promotes", "rare and strong", "speak of"],
)  # fmt: skip
def test_the_questions_of_the_docs_have_these_answers(six, client, number, dims):
    assert len(QUESTIONS) == 5
    hits = client.search(index=six, body=json.loads(QUESTIONS[number]))["hits"]["hits"]
    assert [hit["_source"]["dim"] for hit in hits] == dims


@pytest.mark.parametrize(
    ("query", "dims"),
    [
        ("tokens:import", [2, 0]), ("score:[0.5 TO 1]", [2, 4]), ("promotes:self AND layer:[10 TO 10]", [3]),
        ("log10_frequency:[* TO -3]", [2, 4]), ("interpretation:brackets", [5]),
        # Each document has `import` in its contexts, two in their tokens: no server may show the others.
        ("import", [2, 0]),
    ],
)  # fmt: skip
def test_the_same_in_lucenes_form(six, elasticsearch_url, query, dims):
    assert query == "import" or f"`{query}`" in ASKED
    found = search(elasticsearch_url, six, query, api_key=api_key())
    assert [one["dim"] for one in found] == dims
    assert [one["dim"] for one in search(elasticsearch_url, six, query, 1, api_key=api_key())] == dims[:1]


def test_a_query_that_cannot_be_read_is_refused_with_the_servers_words(six, elasticsearch_url):
    with pytest.raises(InputError, match=r"answered 400.*\("):
        search(elasticsearch_url, six, "(import", api_key=api_key())


def test_kibanas_objects_fit_the_mapping_and_each_other(six, client):
    lines = (ROOT / "experiments" / "kibana.ndjson").read_text().splitlines()
    objects = {(one["type"], one["id"]): one for one in map(json.loads, lines)}
    for one in objects.values():
        for reference in one["references"]:
            assert (reference["type"], reference["id"]) in objects
    patterns = objects["index-pattern", "sae-features"]["attributes"]["title"].split(",")
    for layer_type in ("mlp_activations", "mlp_sublayer", "attn_sublayer", "residual"):
        name = index_name(CONFIG | {"layer_type": layer_type})
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), name
    table = objects["search", "sae-features-table"]["attributes"]
    assert {*table["columns"], *(field for field, _ in table["sort"])} <= MAPPING.keys()
    for one in json.loads(objects["visualization", "sae-scores"]["attributes"]["visState"])["aggs"][1:]:
        wanted = {"field": one["params"]["field"]} | {
            name: one["params"][name] for name in ("interval",) if name in one["params"]
        }
        answer = client.search(index=six, size=0, aggs={"a": {one["type"]: wanted}})
        counts = [bucket["doc_count"] for bucket in answer["aggregations"]["a"]["buckets"]]
        assert sum(counts) == (5 if one["params"]["field"] == "score" else 6)
    panels = json.loads(objects["dashboard", "sae-dashboard"]["attributes"]["panelsJSON"])
    names = {reference["name"] for reference in objects["dashboard", "sae-dashboard"]["references"]}
    assert {f"{panel['panelIndex']}:{panel['panelRefName']}" for panel in panels} == names


def test_the_docs_name_every_field_with_its_type():
    page = (ROOT / "docs" / "files.md").read_text()
    for name, kind in MAPPING.items():
        rows = [row for row in page.splitlines() if row.startswith("|") and f"`{name}`" in row.split("|")[1]]
        assert any(kind.get("type", "object") in row.split("|")[2] for row in rows), name
