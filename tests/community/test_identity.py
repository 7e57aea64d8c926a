"""Keys, the host's certificate, signatures: the package `cryptography` makes them, these say what we ask of it."""

import socket
import ssl
import subprocess
import threading

import pytest

from fanformer.errors import CheckpointError, ConfigError

pytest.importorskip("cryptography", reason="needs the extra `community` (cryptography)")

from fanformer.community.identity import (
    CERTIFICATE,
    CERTIFICATE_KEY,
    PublicKey,
    certificate_addresses,
    certificate_fingerprint,
    ensure_host_identity,
    make_member_key,
    read_member_key,
    read_public_key,
    read_public_members,
    read_signing_key,
)
from fanformer.community.invitation import (
    Invitation,
    UnreachableError,
    check_address,
    fetch_certificate,
    fetch_status,
    invite,
    parse_invitation,
)


@pytest.fixture
def identity(tmp_path):
    """A host's keys, made once."""
    ensure_host_identity(tmp_path / "keys", tmp_path, ["127.0.0.1", "host.example.org"])
    return tmp_path


def test_a_members_key_is_private_and_its_public_half_is_read_by_the_host(tmp_path):
    private, public = make_member_key("alice", tmp_path)
    assert private.stat().st_mode & 0o777 == 0o600
    (tmp_path / "members").mkdir()
    public.rename(tmp_path / "members" / public.name)
    [member] = read_public_members(tmp_path / "members")
    assert member.name == "alice"
    assert len(member.fingerprint) == 64
    assert read_member_key(private).curve.name == "secp384r1"


def test_a_key_is_never_replaced(tmp_path):
    make_member_key("alice", tmp_path)
    before = (tmp_path / "alice.key").read_bytes()
    with pytest.raises(ConfigError, match=r"alice\.key is there already: a key is never replaced"):
        make_member_key("alice", tmp_path)
    assert (tmp_path / "alice.key").read_bytes() == before


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 65, "-first", "caf\u00e9"])
def test_a_name_that_could_be_a_path_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="must be 1 to 64 letters"):
        make_member_key(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read `--key`"), (b"no key", "must be a private key in OpenSSH's format")],
)
def test_what_is_no_key_is_one_line(tmp_path, content, words):
    path = tmp_path / "some.key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_member_key(path)
    assert "\n" not in str(caught.value)


def test_a_key_of_another_kind_is_refused(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    (tmp_path / "other.key").write_bytes(key.private_bytes(*form))
    with pytest.raises(ConfigError, match="must be of the curve P-384"):
        read_member_key(tmp_path / "other.key")


def test_members_need_keys_of_their_own(tmp_path):
    _, public = make_member_key("alice", tmp_path)
    (tmp_path / "bob.pub").write_bytes(public.read_bytes())
    with pytest.raises(ConfigError, match=r"bob\.pub holds the key of alice\.pub"):
        read_public_members(tmp_path)
    with pytest.raises(ConfigError, match="must be a folder of public keys"):
        read_public_members(tmp_path / "missing")
    (tmp_path / "bob.pub").write_text("ssh-rsa nonsense")
    with pytest.raises(ConfigError, match="must hold a public key in OpenSSH's format"):
        read_public_members(tmp_path)


def test_a_file_that_holds_no_key_of_its_own_may_be_left_out(tmp_path):
    _, public = make_member_key("alice", tmp_path)
    (tmp_path / "bob.pub").write_bytes(public.read_bytes())
    (tmp_path / "cyd.pub").write_text("ssh-rsa nonsense")
    told = []
    [member] = read_public_members(tmp_path, told.append)
    assert member.name == "alice"
    assert "bob.pub holds the key of alice.pub" in told[0]
    assert "cyd.pub must hold a public key in OpenSSH's format" in told[1]
    with pytest.raises(ConfigError, match="must be a folder of public keys"):
        read_public_members(tmp_path / "missing", told.append)


def test_openssh_reads_the_keys(tmp_path):
    """The same formats as `ssh-keygen`, so that a member may make its key with that."""
    private, public = make_member_key("alice", tmp_path)
    try:
        done = subprocess.run(["ssh-keygen", "-y", "-f", private], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs ssh-keygen")
    assert done.stdout.split()[:2] == public.read_text().split()[:2], done.stderr


def test_only_what_the_key_signed_has_its_signature(identity):
    key, public = read_signing_key(identity / "keys"), read_public_key(identity)
    signature = key.sign(b"a round")
    assert len(signature) == 128
    assert public.has_signed(b"a round", signature)
    assert not public.has_signed(b"a rounD", signature)
    assert not public.has_signed(b"a round", f"{int(signature, 16) ^ 1:0128x}")
    assert not public.has_signed(b"a round", "no hexadecimal")


def test_a_public_key_of_another_kind_is_refused(identity, tmp_path):
    with pytest.raises(CheckpointError, match="must hold an Ed25519 public key"):
        PublicKey("no key", "a file")
    with pytest.raises(CheckpointError, match=r"is .* the folder of a community run"):
        read_public_key(tmp_path / "missing")


def test_keys_stay_and_a_new_address_is_refused(identity):
    names = (CERTIFICATE, CERTIFICATE_KEY, "signing-key.pem")
    before = [(identity / "keys" / name).read_bytes() for name in names]
    assert all((identity / "keys" / name).stat().st_mode & 0o777 == 0o600 for name in names[1:])
    ensure_host_identity(identity / "keys", identity, ["host.example.org"])
    assert [(identity / "keys" / name).read_bytes() for name in names] == before
    assert certificate_addresses(identity / "keys" / CERTIFICATE) == ["127.0.0.1", "host.example.org"]
    with pytest.raises(ConfigError, match=r"names 127\.0\.0\.1, host\.example\.org, got the address other\.org"):
        ensure_host_identity(identity / "keys", identity, ["other.org"])


def test_an_ip_address_may_be_spelled_in_any_way(tmp_path):
    for address in ("2001:DB8:0::1", "2001:db8::1"):
        ensure_host_identity(tmp_path / "keys", tmp_path, [address])
    assert certificate_addresses(tmp_path / "keys" / CERTIFICATE) == ["2001:db8::1"]


@pytest.fixture
def tls_host(identity):
    """A server on the loopback that has the host's certificate, and answers every request with a status."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity / "keys" / CERTIFICATE, identity / "keys" / CERTIFICATE_KEY)
    plain = socket.create_server(("127.0.0.1", 0))
    body = b'{"format_version": 1}'

    def serve():
        while True:
            try:
                accepted, _ = plain.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(accepted, server_side=True) as shown:
                    shown.recv(4096)
                    shown.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    pem = (identity / "keys" / CERTIFICATE).read_text()
    yield invite("127.0.0.1", plain.getsockname()[1], pem, (identity / "public-key.pem").read_text())
    plain.close()


def test_the_invitations_certificate_is_fetched_and_then_trusted(tls_host, tmp_path):
    fetch_certificate(tls_host, tmp_path / "host.pem")
    assert certificate_fingerprint((tmp_path / "host.pem").read_text()).startswith(tls_host.certificate)
    assert fetch_status(tls_host, tmp_path / "host.pem") == {"format_version": 1}


def test_another_certificate_is_refused(tls_host, tmp_path):
    other = Invitation(tls_host.host, tls_host.port, "0" * 32, tls_host.key)
    with pytest.raises(ConfigError, match=r"must begin with 0{32}, got [0-9a-f]{32}: this is not the host"):
        fetch_certificate(other, tmp_path / "host.pem")
    assert not (tmp_path / "host.pem").exists()


def test_a_host_that_is_away_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnreachableError, match=rf"no host answers at 127\.0\.0\.1:{port}"):
        fetch_certificate(Invitation("127.0.0.1", port, "0" * 32, "0" * 32), tmp_path / "host.pem")


def test_an_invitation_comes_back_from_its_text():
    for host in ("host.example.org", "10.1.2.3", "2001:db8::1"):
        invitation = Invitation(host, 8000, "a" * 32, "b" * 32)
        assert parse_invitation(str(invitation)) == invitation


def test_what_members_are_to_dial_has_no_port():
    for address in ("host.example.org", "10.1.2.3", "2001:db8::1", "localhost"):
        check_address(address)
    for address in ("host:8000", "https://host", "", "a b", "a..b", f"{'x' * 64}.org"):
        with pytest.raises(ConfigError, match="`--address` must be a name or an IP address, got"):
            check_address(address)


@pytest.mark.parametrize(
    "text",
    ["", "host:8000", "http://host:8000/#" + "a" * 32 + "-" + "b" * 32, "https://host/#" + "a" * 32 + "-" + "b" * 32,
     "https://host:8000/", "https://host:8000/#" + "a" * 32, "https://host:99999/#x-y", "https://[host:8000/#x-y",
     "https://a..b:8000/#" + "a" * 32 + "-" + "b" * 32],
)  # fmt: skip
def test_half_an_invitation_is_refused(text):
    with pytest.raises(ConfigError, match=r"an invitation must be https://HOST:PORT/#CERTIFICATE-KEY, got"):
        parse_invitation(text)
