"""The images that stages run in: what is in them, what their names depend on, and how pip is asked for packages."""

import datetime
import http.server
import io
import ipaddress
import ssl
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flows import images
from stages.config import UserError


def test_the_score_image_has_no_torch_and_neither_has_prefect_or_docker() -> None:
    score, gpu = (
        {images.plain(each.name) for each in images.closure(images.KINDS[kind].roots)} for kind in images.KINDS
    )
    score, gpu = (gpu, score) if "torch" in score else (score, gpu)
    assert {"pyarrow", "filelock"} <= score
    assert not score & {"torch", "numpy", "transformers", "docker", "prefect"}
    assert {"torch", "transformers", "peft", "bitsandbytes", "pyarrow", "numpy"} <= gpu
    assert not gpu & {"docker", "prefect", "pytest", "flexsink"}


def test_the_names_follow_the_code_and_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {kind: images.image_name(kind) for kind in images.KINDS}
    assert len(set(before.values())) == 2
    packages = images.packages_name("score")
    for name in images.CODE:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "stages" / "score.py").write_text("changed = True\n")
    monkeypatch.setattr(images, "ROOT", tmp_path)
    assert images.image_name("score") != before["score"]
    assert images.packages_name("score") == packages
    monkeypatch.setitem(images.KINDS, "score", images.KINDS["score"]._replace(roots=("pyarrow",)))
    assert images.packages_name("score") != packages


def test_a_task_of_another_distribution_is_in_the_image_and_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images.brought("game2048", "score") == images.brought("", "score") == {}
    (tmp_path / "dicetask").mkdir()
    (tmp_path / "dicetask" / "__init__.py").write_text("")
    (tmp_path / "dicetask" / "task.py").write_text("class Dice: pass\n")
    info = tmp_path / "my_dice-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-dice\nVersion: 0.1\nRequires-Dist: flexsink\n")
    (info / "entry_points.txt").write_text("[flexsink.tasks]\ndice = dicetask.task:Dice\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    files = images.brought("dice", "score")
    assert sorted(files) == [
        "dicetask/__init__.py",
        "dicetask/task.py",
        "my_dice-0.1.dist-info/METADATA",
        "my_dice-0.1.dist-info/entry_points.txt",
    ]
    assert images.image_name("score", "dice") != images.image_name("score")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        images.add_code(tar, files)
    with tarfile.open(fileobj=io.BytesIO(archive.getvalue())) as tar:
        names = set(tar.getnames())
        assert {"Dockerfile", "code/stages/worker.py", "code/dicetask/task.py"} <= names
        assert {(entry.uid, entry.gid) for entry in tar} == {(0, 0)}
    assert not any("__pycache__" in name or name.startswith("code/flows") for name in names)


# pip, and whom it trusts.


def wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two versions of a package, the older of them in the lock."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "smallwheel", "1.0")
    wheel(folder, "smallwheel", "2.0")
    lock = tmp_path / "requirements.lock"
    lock.write_text('# locked\nsmallwheel==1.0; python_version < "3.99"\nsmallwheel==2.0; python_version >= "3.99"\n')
    monkeypatch.setattr(images, "LOCK", lock)
    for name in (
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
        "PIP_CERT",
        "PIP_TRUSTED_HOST",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "SSL_CERT_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    return folder


def test_packages_come_from_a_folder_of_wheels(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not get the packages for stages: Could not") as raised:
        images.install(tmp_path / "none", ["smallwheel"], python=images.version())
    assert "PIP_FIND_LINKS" in raised.value.hint
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    for python in (images.version(), "3.10"):  # of the base's Python too, whatever runs here
        images.install(tmp_path / python, ["smallwheel"], python=python)
        assert (tmp_path / python / "smallwheel.py").read_text() == "version = '1.0'\n"


@pytest.fixture
def index(wheels: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of an index behind a certificate authority of its own, and that authority's certificate."""
    authority, certificate = tmp_path / "authority.pem", tmp_path / "server.pem"
    own, servers = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a private authority")])
    now, hour = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=1)
    no = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    no |= dict.fromkeys(("crl_sign", "encipher_only", "decipher_only"), False)
    for path, subject, key, more in (
        (
            authority,
            who,
            own,
            [
                (x509.BasicConstraints(ca=True, path_length=0), True),
                (x509.KeyUsage(digital_signature=False, key_cert_sign=True, **no), True),
            ],
        ),
        (
            certificate,
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an index")]),
            servers,
            [
                (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False),
                (x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key()), False),
            ],
        ),
    ):
        builder = x509.CertificateBuilder(
            who, subject, key.public_key(), x509.random_serial_number(), now - hour, now + hour
        )
        for extension, critical in [(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False), *more]:
            builder = builder.add_extension(extension, critical=critical)
        path.write_bytes(builder.sign(own, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    with certificate.open("ab") as file:
        file.write(servers.private_bytes(serialization.Encoding.PEM, *private))

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = wheels / Path(self.path).name
            links = "".join(f'<a href="/files/{each.name}">{each.name}</a>' for each in wheels.iterdir())
            body = path.read_bytes() if path.is_file() else f"<html><body>{links}</body></html>".encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/zip" if path.is_file() else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}/simple", authority
    server.shutdown()
    thread.join()
    server.server_close()


def test_packages_come_from_an_index_behind_a_private_authority(
    index: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index[0])
    with pytest.raises(UserError, match="confirming the ssl certificate"):
        images.install(tmp_path / "none", ["smallwheel"], python=images.version())
    monkeypatch.setenv("PIP_CERT", str(index[1]))
    images.install(tmp_path / "packages", ["smallwheel"], python=images.version())
    assert (tmp_path / "packages" / "smallwheel.py").read_text() == "version = '1.0'\n"


def test_every_package_of_the_images_is_locked() -> None:
    for kind in images.KINDS.values():
        names = [images.plain(each.name) for each in images.closure(kind.roots)]
        assert len(images.pinned(names, python="3.11")) == len(names)
