"""Published weights: the table, names, downloads from a server on this machine, the cache."""

import errno
import hashlib
import http.server
import io
import json
import socket
import sys
import threading
import time

import numpy as np
import pytest

import convert
import flax_nets
from benchmarks import make_weights_table
from flax_nets import predict, registry, weights
from flax_nets.preprocess import Preprocess
from flax_nets.weights import cache, download, source
from flax_nets.weights.download import DownloadError

FILE = bytes(range(256)) * 40  # 10,240 bytes


class Web:
    """A server on this machine.

    files: path -> bytes, or (bytes, headers); moved: path -> (address, headers).
    faults: for the next requests: a status, "cut" (half of the answer), "hang up" (none), "whole"
    (no part, whatever was asked), "other part", or "" for none.
    """

    def __init__(self):
        self.files, self.moved, self.faults, self.log, self.delay = {}, {}, [], [], 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request):
        self.log.append((request.path, dict(request.headers)))
        fault = self.faults.pop(0) if self.faults else ""
        time.sleep(self.delay)
        if fault == "hang up":
            return
        if isinstance(fault, int):
            self.head(request, fault, {})
            return
        if request.path in self.moved:
            address, headers = self.moved[request.path]
            self.head(request, 302, {"Location": address} | headers)
            return
        found = self.files.get(request.path)
        if found is None:
            self.head(request, 404, {})
            return
        body, headers = found if isinstance(found, tuple) else (found, {})
        etag = headers.get("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        status, start, size = 200, 0, len(body)
        asked = request.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
        if asked and request.headers.get("If-Range") == etag and fault != "whole":
            start, status = int(asked), 206
            if start >= size:
                self.head(request, 416, {})
                return
            headers = headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
            if fault == "other part":
                headers["Content-Range"] = f"bytes 1-{size - 1}/{size}"
        self.head(request, status, {"ETag": etag, "Content-Length": str(size - start)} | headers)
        body = body[start:]
        request.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    @staticmethod
    def head(request, status, headers):
        request.send_response(status)
        for name, value in headers.items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()

    @property
    def paths(self):
        return [path for path, _ in self.log]


@pytest.fixture(scope="module")
def server():
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def web(server, monkeypatch, tmp_path):
    server.files, server.moved, server.faults, server.log, server.delay = {}, {}, [], [], 0
    for name in ("FLAX_NETS_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLAX_NETS_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    return server


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    """A checkpoint: (its bytes as .pth, as .safetensors, its tensors)."""
    folder = tmp_path_factory.mktemp("lenet")
    tensors = convert.export(flax_nets.create_model("lenet5", rngs=7))
    for suffix in ("pth", "safetensors"):
        convert.write(folder / f"lenet.{suffix}", tensors)
    return *((folder / f"lenet.{s}").read_bytes() for s in ("pth", "safetensors")), tensors


def publish(monkeypatch, name="torchvision/lenet5.V1", **changes):
    """One more entry of the table."""
    entry = weights.Weights(
        name=name,
        model="lenet5",
        default=True,
        preprocess=Preprocess(32, mean=(0.5,), std=(0.5,)),
        classes=None,
        num_classes=10,
        accuracy=None,
        num_params=61_706,
        license=None,
        arguments={"activation": "relu"},
    )
    for field, value in changes.items():
        object.__setattr__(entry, field, value)
    monkeypatch.setitem(weights.table(), name, entry)
    return entry


def same(model, tensors):
    exported = convert.export(model)
    return all(np.array_equal(exported[name], value) for name, value in tensors.items())


# The table


def stored(name):
    return json.loads((make_weights_table.FOLDER / f"{name}.json").read_text())


def test_the_table_is_what_the_installed_libraries_say():
    def as_json(rows):
        return json.loads(make_weights_table.dump(rows))

    assert stored("torchvision") == as_json(make_weights_table.torchvision_rows())
    assert stored("classes") == {"imagenet-1k": make_weights_table.categories()}
    uncounted = {name: row | {"num_params": None} for name, row in stored("timm").items()}
    assert uncounted == as_json(make_weights_table.timm_rows())
    for model in ("resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100", "vgg11"):
        entry = weights.find(f"timm/{model}")
        counted = make_weights_table.count_parameters(model, entry.num_classes)
        assert entry.num_params == counted


def test_the_table_is_whole():
    table = weights.table()
    assert len(table) > 240
    published = {f"{w.library}/{w.model}" for w in table.values()}
    without = set(make_weights_table.NAMES) - published
    assert without == {  # which timm has with random weights alone
        "timm/mobilenetv2_035",
        "timm/mobilenetv2_075",
        "timm/mobilenetv3_large_075",
        "timm/seresnet101",
        "timm/seresnet152",
        "timm/seresnet18",
        "timm/seresnet34",
        "timm/vit_large_patch14_224",
    }
    for name in published:
        assert sum(w.default for w in table.values() if f"{w.library}/{w.model}" == name) == 1
        assert weights.find(name).model == name.partition("/")[2], "DEFAULT is of that very name"
    for name, w in table.items():
        assert w.name == name
        assert (w.url is None) != (w.hub is None)
        assert w.url is None or (w.url.startswith("https://") and len(w.sha256) >= 8), name
        assert set(w.arguments) <= set(registry.resolve(w.network).complete)
        assert w.accuracy is None or 50 < w.accuracy["acc@1"] < w.accuracy["acc@5"] < 100
        assert w.network in flax_nets.list_models()
        assert w.classes is None or w.num_classes == len(
            weights.class_names(w.classes) or range(w.num_classes)
        )
    assert len({w.url or w.hub for w in table.values()}) == len(table)
    for library in ("torchvision", "timm"):
        assert all(row["preprocess"]["antialias"] for row in stored(library).values())


def test_find():
    def found(*request):
        return weights.find(*request).name

    assert found("resnet50") == "torchvision/resnet50.IMAGENET1K_V2"
    assert found("resnet50", "IMAGENET1K_V1") == "torchvision/resnet50.IMAGENET1K_V1"
    assert found("timm/resnet50") == "timm/resnet50.a1_in1k"
    assert found("resnet50", "a2_in1k") == "timm/resnet50.a2_in1k"
    assert found("inception_v4") == "timm/inception_v4.tf_in1k"
    assert found("mobilenetv2_100") == "timm/mobilenetv2_100.ra_in1k"
    assert found("mobilenetv2_100", "IMAGENET1K_V2") == "torchvision/mobilenet_v2.IMAGENET1K_V2"
    assert found("mobilenet_v2", "timm/mobilenetv2_100.ra_in1k") == "timm/mobilenetv2_100.ra_in1k"
    assert found("vit_b_16", "timm/vit_base_patch16_384.augreg_in21k_ft_in1k").endswith("ft_in1k")
    assert found("torchvision/vgg16").startswith("torchvision/vgg16.IMAGENET1K_V1")
    assert found("timm/vgg16") == "timm/vgg16.tv_in1k"
    assert weights.names("wide_resnet50_2", "timm/*")[0].startswith("timm/wide_resnet50_2.")
    senet = weights.find("legacy_senet154")
    assert (senet.sha256, senet.hub) == ("e9eb9fe6", None)
    assert weights.find("resnet50", "DEFAULT").license is None
    assert weights.find("vit_h_14").license.endswith("SWAG/blob/main/LICENSE")
    assert weights.class_names("imagenet-21k") is None


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("resnet50", "IMAGENET1K_V3", "resnet50 has no published weights 'IMAGENET1K_V3': did you"),
        ("resnet50", "timm/resnet50.a1_in1", "did you mean 'timm/resnet50.a1_in1k'"),
        ("resnet50", "resnet50.a1_in1k", "'timm/resnet50.a1_in1k'"),
        ("resnet50", "default", "It has DEFAULT and torchvision/resnet50.IMAGENET1K_V1, "),
        ("resnet50", "timm/resnet18.a1_in1k", "are weights of resnet18, not of resnet50"),
        ("resnet18", "IMAGENET1K_V2", "resnet18 has no published weights 'IMAGENET1K_V2'"),
        ("seresnet50", "timm/legacy_seresnet50.in1k", "of legacy_seresnet50, not of seresnet50"),
        ("lenet5", "DEFAULT", "no published weights of lenet5 are known"),
        ("resnet51", "DEFAULT", "there is no network 'resnet51': did you mean 'resnet50'"),
        ("resnet50", "weights", "resnet50 has no published weights 'weights'"),
        ("resnet50", "hf-hub:resnet50", "expected hf-hub:ORG/NAME"),
        ("resnet50", "hf-hub:../../etc", "expected hf-hub:ORG/NAME"),
    ],
)
def test_names_that_are_none(name, asked, message, web):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        flax_nets.create_model(name, weights=asked)
    assert not web.log


def test_paths_still_are_paths(web, tmp_path, monkeypatch):
    for path in ("nowhere.pth", "no/where"):
        with pytest.raises(FileNotFoundError, match=path):
            flax_nets.create_model("lenet5", weights=path)
    monkeypatch.chdir(tmp_path)
    convert.write("mine.npz", convert.export(flax_nets.create_model("lenet5", rngs=3)))
    (tmp_path / "mine.npz").rename("mine")
    for path in ("mine", tmp_path / "mine"):
        assert flax_nets.create_model("lenet5", weights=path).spec.weights == str(tmp_path / "mine")
    assert not web.log


def test_transform_input_goes_with_torchvision_s_published_weights(monkeypatch):
    """As arguments of the spec, which what the caller gives overrides (test_weights_by_name)."""
    monkeypatch.setattr(source, "_fetch_published", lambda entry: "fetched")

    def arguments(name, given):
        spec, _ = source.resolve(registry.resolve(name), name, given)
        return spec.complete.get("transform_input")

    assert arguments("googlenet", "DEFAULT")
    assert arguments("inception_v3", "torchvision/inception_v3.IMAGENET1K_V1")
    assert not arguments("timm/inception_v3", "DEFAULT")
    assert not arguments("inception_v3", "timm/inception_v3.gluon_in1k")
    for given in ("inception.pth", {}):
        assert not arguments("inception_v3", given)


# From a name to a model


def test_weights_by_name(web, lenet, monkeypatch, tmp_path):
    """Downloaded once, checked, and with the arguments that belong to them."""
    pth, _, tensors = lenet
    web.files["/models/lenet-1.pth"] = pth
    digest = hashlib.sha256(pth).hexdigest()[:8]
    publish(monkeypatch, url=f"{web.url}/models/lenet-1.pth", sha256=digest)
    for asked in ("DEFAULT", "V1", "torchvision/lenet5.V1"):
        model = flax_nets.create_model("lenet5", weights=asked)
        assert same(model, tensors)
        assert model.spec.complete["activation"] == "relu"
        assert model.spec.weights == "torchvision/lenet5.V1"
        assert flax_nets.preprocess.for_model(model).mean == (0.5,)
    assert len(web.log) == 1
    monkeypatch.setenv("FLAX_NETS_OFFLINE", "1")
    path = weights.fetch("lenet5")
    assert path == tmp_path / "cache" / "torchvision" / "lenet-1.pth"
    assert [p.name for p in path.parent.iterdir()] == ["lenet-1.pth"], "nothing is left beside"
    model = flax_nets.create_model("lenet5", weights="V1", activation="tanh", num_classes=3)
    assert model.spec.complete["activation"] == "tanh"
    assert model.spec.complete["num_classes"] == 3


def test_weights_of_timm_from_the_hub(web, lenet, monkeypatch, tmp_path):
    _, safetensors, tensors = lenet
    publish(monkeypatch, name="timm/lenet5.tag", hub="timm/lenet5.tag", arguments={})
    repository = "/timm/lenet5.tag/resolve/main"
    web.files["/blob"] = (safetensors, {"ETag": '"of another server"'})
    linked = {"X-Linked-Etag": f'"{hashlib.sha256(safetensors).hexdigest()}"'}
    there = f"http://localhost:{web.port}/blob?signature=1"
    web.files["/blob?signature=1"] = web.files["/blob"]
    web.moved[f"{repository}/model.safetensors"] = (there, linked)
    web.files[f"{repository}/config.json"] = b'{"pretrained_cfg": {}}'
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert same(flax_nets.create_model("lenet5", weights="timm/lenet5.tag"), tensors)
    path = weights.fetch("lenet5", "tag")
    assert path == tmp_path / "cache/hub/timm/lenet5.tag/main/model.safetensors"
    assert (path.parent / "config.json").is_file()
    assert len(web.log) == 3
    told = {path: headers.get("Authorization") for path, headers in web.log}
    assert told.pop("/blob?signature=1") is None, "the token is for the hub alone"
    assert set(told.values()) == {"Bearer secret"}

    path.unlink()
    web.moved[f"{repository}/model.safetensors"] = (there, {"X-Linked-Etag": f'"{"0" * 64}"'})
    with pytest.raises(DownloadError, match=r"its SHA-256 is [0-9a-f]{64}, expected 0{64};"):
        weights.fetch("lenet5", "tag")
    assert not path.exists()


def test_a_repository_of_transformers(web, tmp_path):
    """Its two configurations say what the names of its tensors cannot show, and of its images."""
    import torch
    import transformers

    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.ViTConfig(**size, image_size=32, layer_norm_eps=1e-3, num_labels=5)
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "saved")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "saved"
    )
    for file in (tmp_path / "saved").iterdir():
        web.files[f"/org/vit/resolve/main/{file.name}"] = file.read_bytes()
    model = flax_nets.create_model("vit_b_16", weights="hf-hub:org/vit")
    x = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(model(x), expected, atol=1e-6)
    assert flax_nets.preprocess.for_model(model).crop_mode == "squash"
    assert predict.class_names(model.spec.weights)(3) == "LABEL_3"


def test_a_repository_in_shards(web, lenet):
    _, _, tensors = lenet
    names = sorted(tensors)
    parts = {"a-1-of-2.safetensors": names[:4], "a-2-of-2.safetensors": names[4:]}
    root = "/org/some.net/resolve/refs%2Fpr%2F1"
    for shard, part in parts.items():
        web.files[f"{root}/{shard}"] = as_bytes({name: tensors[name] for name in part})
    index = {"weight_map": {name: shard for shard, part in parts.items() for name in part}}
    web.files[f"{root}/model.safetensors.index.json"] = json.dumps(index).encode()
    web.files[f"{root}/preprocessor_config.json"] = b"{}"
    model = flax_nets.create_model("lenet5", weights="hf-hub:org/some.net@refs/pr/1")
    assert same(model, tensors)
    requests = len(web.log)
    path = weights.fetch("lenet5", "hf_hub:org/some.net@refs/pr/1")
    assert len(web.log) == requests
    there = {p.name for p in path.parent.iterdir()}
    assert there == {*parts, "model.safetensors.index.json", "preprocessor_config.json"}


def as_bytes(tensors):
    import safetensors.numpy

    return safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()})


def test_what_a_repository_can_lack(web, lenet, tmp_path, monkeypatch):
    pth, _, tensors = lenet
    web.files["/org/bin/resolve/main/pytorch_model.bin"] = pth
    assert same(flax_nets.create_model("lenet5", weights="hf-hub:org/bin"), tensors)
    with pytest.raises(DownloadError, match=r"org/none has no weights at 'v2': .* model\.safet"):
        weights.fetch("lenet5", "hf-hub:org/none@v2")
    web.faults = [401]
    with pytest.raises(DownloadError, match=r"answered 401 .*HF_TOKEN can hold a token"):
        weights.fetch("lenet5", "hf-hub:org/hidden")
    with monkeypatch.context() as patched:
        patched.setenv("FLAX_NETS_OFFLINE", "1")
        folder = tmp_path / "cache/hub/org/net/main"
        with pytest.raises(DownloadError, match=f"model.safetensors and .* put into {folder}"):
            weights.fetch("lenet5", "hf-hub:org/net")
    root = "/org/trick/resolve/main"
    for text, message in [
        ('{"weight_map": {"a": "../../b"}}', r"names '\.\./\.\./b' as a file beside it"),
        ('{"weight_map": {"a": 1}}', "is no index of shards"),
        ("[", "is no index of shards"),
        ('{"weight_map": {"a": "gone.bin"}}', "lists gone.bin, which is not there"),
    ]:
        web.files[f"{root}/model.safetensors.index.json"] = text.encode()
        with pytest.raises(DownloadError, match=message):
            weights.fetch("lenet5", "hf-hub:org/trick")
        for path in (tmp_path / "cache/hub/org/trick/main").iterdir():
            path.unlink()


def test_weights_at_an_address(web, lenet, tmp_path):
    pth, _, tensors = lenet
    web.files["/a/net%201.pth"] = pth
    url = f"{web.url}/a/net%201.pth"
    assert same(flax_nets.create_model("lenet5", weights=url), tensors)
    path = weights.fetch("lenet5", url)
    assert path.name == "net_1.pth"
    digest = hashlib.sha256(pth).hexdigest()
    assert weights.fetch("lenet5", f"{url}#sha256={digest}") == path
    assert len(web.log) == 1
    path.unlink()
    with pytest.raises(DownloadError, match="expected 12345678"):
        weights.fetch("lenet5", f"{url}#sha256=12345678")
    assert not list(path.parent.iterdir())


# Downloads


def get(web, target, name="/file", **options):
    return download.download(web.url + name, target, **options)


def test_a_file_comes_whole(web, tmp_path):
    web.files["/file"] = FILE
    target = tmp_path / "deep" / "er" / "file"
    assert get(web, target, sha256=hashlib.sha256(FILE).hexdigest()) == target
    assert target.read_bytes() == FILE
    get(web, target)
    assert len(web.log) == 1
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("fault", ["cut", "hang up", 503, 500, 429])
def test_what_goes_better_the_second_time(fault, web, tmp_path):
    web.files["/file"] = FILE
    web.faults = [fault, "", fault]
    assert get(web, tmp_path / "file").read_bytes() == FILE
    assert len(web.log) == 2
    ranges = [headers.get("Range") for _, headers in web.log]
    assert ranges == [None, f"bytes={len(FILE) // 2}-" if fault == "cut" else None]


def test_a_part_serves_another_day(web, tmp_path):
    """A download that ended in between is taken up where it ended, with an unchanged file."""
    web.files["/file"] = FILE
    target = tmp_path / "file"
    web.faults = ["cut", *[503] * 20]
    with pytest.raises(DownloadError, match=r"answered 503 .*, 5 times in a row\. .*by hand.*put"):
        get(web, target)
    assert (tmp_path / "file.part").stat().st_size == len(FILE) // 2
    assert not target.exists()
    web.faults, web.log = [], []
    assert get(web, target, sha256=hashlib.sha256(FILE).hexdigest()).read_bytes() == FILE
    (asked,) = web.log
    assert asked[1]["Range"] == f"bytes={len(FILE) // 2}-"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "case", ["changed", "shorter", "whole", "other part", "no validator", "no length"]
)
def test_a_part_that_is_of_no_use(case, web, tmp_path):
    web.files["/file"] = FILE
    if case == "no validator":
        web.files["/file"] = FILE, {"ETag": None}
    web.faults = ["cut", *[503] * 20]
    with pytest.raises(DownloadError):
        get(web, tmp_path / "file")
    expected = FILE
    web.faults = [case] if case in ("whole", "other part") else []
    if case == "changed":
        expected = web.files["/file"] = FILE[::-1]
    if case == "shorter":  # with the same validator
        expected = FILE[:100]
        web.files["/file"] = expected, {"ETag": f'"{hashlib.md5(FILE).hexdigest()}"'}
    if case == "no length":
        web.files["/file"] = FILE, {"Content-Length": None}
    assert get(web, tmp_path / "file").read_bytes() == expected


def test_a_file_that_keeps_breaking_off_ends(web, tmp_path):
    web.files["/file"] = FILE
    web.faults = ["cut"] * 100
    with pytest.raises(DownloadError, match=r"connection ended after [\d,]+ of 10,240 bytes, 5 t"):
        get(web, tmp_path / "file")
    assert len(web.log) < 25, "each attempt got half of the rest"


def test_a_wrong_hash(web, tmp_path):
    web.files["/file"] = FILE
    right = hashlib.sha256(FILE).hexdigest()
    with pytest.raises(DownloadError, match=rf"is {right}, expected 0badc0de\.\.\.; what came was"):
        get(web, tmp_path / "file", sha256="0badc0de")
    assert not list(tmp_path.iterdir())
    assert get(web, tmp_path / "file", sha256=right[:8]).exists()


def test_redirections(web, tmp_path):
    web.files["/c"] = FILE
    web.moved |= {"/a": ("/b", {}), "/b": (f"{web.url}/c", {}), "/loop": ("/loop", {})}
    web.moved["/away"] = ("file:///etc/hostname", {})
    assert get(web, tmp_path / "file", "/a", token="t").read_bytes() == FILE
    assert {h.get("Authorization") for _, h in web.log} == {"Bearer t"}
    for name in ("/loop", "/away"):
        with pytest.raises(DownloadError, match="the server answered 302"):
            get(web, tmp_path / "other", name)
    with pytest.raises(DownloadError, match="expected an address of http or https"):
        download.download("file:///etc/hostname", tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_errors_say_what_to_do(web, tmp_path, monkeypatch):
    target = tmp_path / "file"
    with pytest.raises(DownloadError, match="answered 404") as caught:
        get(web, target)
    assert f"It can be downloaded by hand, and put at {target}" in str(caught.value)
    assert len(web.log) == 1, "once is enough"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(DownloadError, match=r"refused.*by hand.*put at"):
            download.download(f"http://127.0.0.1:{port}/file", target)

    def no_network(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", no_network)
        with pytest.raises(DownloadError, match=r"name resolution.*by hand.*put at"):
            download.download("https://example.invalid/file", target)
    monkeypatch.setenv("FLAX_NETS_OFFLINE", "1")
    with pytest.raises(DownloadError, match=r"FLAX_NETS_OFFLINE forbids it.*by hand.*put at"):
        get(web, target)
    assert len(web.log) == 1
    monkeypatch.setenv("FLAX_NETS_OFFLINE", "0")
    (tmp_path / "taken").write_text("")
    with pytest.raises(DownloadError, match="FLAX_NETS_HOME can name another directory"):
        get(web, tmp_path / "taken" / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk(web, tmp_path, monkeypatch):
    claim = download._claim

    class Full(io.BufferedRandom):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def claim_full(target):
        with claim(target):
            return Full(io.FileIO(f"{target}.part", "a+b"))

    web.files["/file"] = FILE
    monkeypatch.setattr(download, "_claim", claim_full)
    with pytest.raises(DownloadError, match=r"No space left on device; FLAX_NETS_HOME can name"):
        get(web, tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("locks", [True, False])
def test_several_at_a_time(locks, web, tmp_path, monkeypatch, capsys):
    """One fetches and the others wait; without locks each fetches, and one of them wins."""
    if not locks:
        monkeypatch.setattr(download, "fcntl", None)
    web.files["/file"] = FILE
    web.delay = 0.1
    results = []

    def fetch():
        results.append(get(web, tmp_path / "file").read_bytes())

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [FILE] * 4
    assert ("waiting for another process to download file" in capsys.readouterr().err) == locks
    assert len(web.log) == 1 if locks else len(web.log) <= 4
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(web, tmp_path, monkeypatch, capsys):
    web.files["/file"] = FILE
    get(web, tmp_path / "one")
    assert capsys.readouterr() == ("", ""), "too short to mention"
    monkeypatch.setattr(download, "QUIET", -1.0)
    get(web, tmp_path / "two")
    assert capsys.readouterr().err.splitlines() == [
        "downloading two: 0.0 of 0.0 MB ...",
        "downloading two: 0.0 of 0.0 MB",
    ]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    get(web, tmp_path / "three")
    assert "three" in terminal.getvalue()
    assert "10.2/10.2 kB" in terminal.getvalue()
    line = download._Line("four", 0, None)
    line.shown = -1.0
    line.advance(2_500_000)
    line.close()
    assert terminal.getvalue().endswith("\rdownloading four: 2.5 MB\n")
    monkeypatch.setitem(sys.modules, "rich", None)
    with download._progress("five", 0, 10) as advance:
        advance(10)


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("FLAX_NETS_HOME", "XDG_CACHE_HOME", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.home() == tmp_path / ".cache" / "flax_nets"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert weights.home() == tmp_path / "x" / "flax_nets"
    monkeypatch.setenv("FLAX_NETS_HOME", "~/own")
    assert weights.home() == tmp_path / "own"
    assert cache.endpoint() == "https://huggingface.co"
    assert cache.file_name("https://host/..%2f..%2fetc/") == "weights"
    assert cache.file_name("https://host/a/..%2fb%20c.pth?x=1") == "b_c.pth"
    first, second = (cache.of_url(f"https://host/{n}/w.pth") for n in "ab")
    assert first.name == second.name == "w.pth"
    assert first != second
