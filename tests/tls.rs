//! Who is let in with a `[tls]` table, who is turned away, and what both sides are told.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use common::gateway::Gateway;
use common::{Cluster, block_on};
use futures::stream::{self, StreamExt as _};
use kv54::cluster::Limits;
use kv54::entry::Packed;
use kv54::error::Error;
use kv54::rpc::{Answer, Service, serve, tls};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn hosts_with_certificates_talk() {
    let (cluster, _) = three_hosts();
    let megabyte = "green ".repeat(170_000);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster
        .kv54_with(["set", "pot", "-"], megabyte.as_bytes())
        .exits(0);
    for via in ["alice", "bob", "carol"] {
        let got = cluster.kv54(["get", "tea", "--via", via]).exits(0);
        assert_eq!(got.text(), "green\n");
        let got = cluster.kv54(["get", "pot", "--raw", "--via", via]).exits(0);
        assert!(got.text() == megabyte, "at {via}");
    }
    cluster.kv54(["where", "tea"]).exits(0);
    cluster.kv54(["status"]).exits(0);
    cluster.kv54(["delete", "tea"]).exits(0);
    for name in ["alice", "bob", "carol"] {
        assert_eq!(warnings(&cluster, name), [""; 0]);
    }
}

#[test]
fn a_node_without_certificates_is_turned_away_in_both_directions() {
    let (mut cluster, _) = three_hosts();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster.stop("carol");
    cluster.start_behind("carol", "plain.toml", &cluster.address("carol"));

    cluster.node("carol").wait_for("waiting for alice");
    cluster.node("alice").wait_for("it does not speak TLS");
    let said = cluster.kv54(["status", "--config", "plain.toml"]).exits(3);
    assert_eq!(said.text().matches("it speaks TLS").count(), 4, "{said:?}");
    let said = cluster.kv54(["status"]).exits(3);
    let shut = "it broke off the TLS handshake";
    assert_eq!(said.text().matches(shut).count(), 1, "{said:?}");
    cluster.kv54(["get", "tea"]).exits(0);
}

#[test]
fn every_node_of_one_process_shows_the_same_certificate() {
    let names = ["alice", "bob", "carol"];
    let (cluster, ca) = hosts(&names);
    ca.writes(&cluster, "host", &names, ever());
    let all = cluster.spawn(["serve", "--all"]);
    all.wait_for("carol: ready with");
    cluster.wait_until_ready();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster.kv54(["get", "tea", "--via", "bob"]).exits(0);
}

#[test]
fn a_plain_connection_is_told_by_an_alert_and_nothing_else() {
    const GET: &[u8] = b"\x94\x00\x01\xa3get\x91\xa3tea";
    let (cluster, _) = alice();
    // The long one is more than what buffers hold: the node must read it all, or writing it fails.
    for question in [GET.to_vec(), GET.repeat(1_000_000)] {
        let mut plain = TcpStream::connect(cluster.address("alice")).unwrap();
        plain.set_read_timeout(Some(PATIENCE)).unwrap();
        plain.write_all(&question).unwrap();
        let mut alert = [0; 7];
        plain.read_exact(&mut alert).unwrap();
        assert_eq!((alert[0], alert[5]), (21, 2), "a fatal alert: {alert:?}");
        let _ = plain.write_all(GET);
        let mut rest = Vec::new();
        let _ = plain.read_to_end(&mut rest);
        assert_eq!(rest, [0; 0], "it was let in after all");
    }
    turned_away(&cluster, "it does not speak TLS");
}

#[test]
fn a_command_without_certificates_is_told_what_is_missing() {
    let (cluster, _) = alice();
    let said = cluster.kv54(["get", "tea", "--via", "alice", "--config", "plain.toml"]);
    said.exits(3).says(&["alice", "it speaks TLS", "[tls]"]);
    turned_away(&cluster, "it does not speak TLS");
}

#[test]
fn somebody_who_shows_no_certificate_is_turned_away() {
    let (cluster, _) = alice();
    let error = block_on(async {
        let address = cluster.address("alice");
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let connector = TlsConnector::from(client(&cluster, false));
        let name = ServerName::try_from("alice").unwrap();
        let mut stream = connector.connect(name, stream).await.unwrap();
        let told = timeout(PATIENCE, stream.read_u8()).await.unwrap();
        told.unwrap_err()
    });
    let told = error.to_string();
    assert!(told.contains("CertificateRequired"), "{told}");
    turned_away(&cluster, "it shows no certificate");
}

#[test]
fn a_certificate_of_another_ca_is_turned_away_and_the_log_stays_short() {
    for stranger in [Authority::named("another"), Authority::named("ca")] {
        let (cluster, _) = alice();
        stranger.writes(&cluster, "host", &["ops"], ever());
        let began = Instant::now();
        let said = cluster.kv54(["set", "tea", "green", "--timeout", "3s"]);
        let alert = "it refused the TLS handshake: ";
        said.exits(3).says(&["set failed", "alice", alert]);
        let lines = warnings(&cluster, "alice");
        assert!(lines[0].contains("not signed by the ca"), "{lines:?}");
        let seconds = usize::try_from(began.elapsed().as_secs()).unwrap();
        assert!(lines.len() <= seconds / 5 + 1, "{seconds} s: {lines:#?}");
    }
}

#[test]
fn a_node_of_another_ca_is_not_believed() {
    let (cluster, _) = alice();
    std::fs::write(cluster.dir.join("ca.pem"), Authority::named("another").pem).unwrap();
    let said = cluster.kv54(["get", "tea", "--via", "alice"]).exits(3);
    said.says(&["alice", "not signed by the ca of [tls]"]);
    turned_away(&cluster, "it refused the TLS handshake: UnknownCA");
}

#[test]
fn an_expired_certificate_is_turned_away() {
    let (cluster, ca) = alice();
    ca.writes(
        &cluster,
        "host",
        &["ops"],
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_500_000_000),
    );
    let said = cluster.kv54(["get", "tea", "--via", "alice"]).exits(3);
    said.says(&["alice", "CertificateExpired"]);
    turned_away(&cluster, "certificate expired");
}

#[test]
fn a_node_whose_certificate_expires_is_not_believed_any_more() {
    let (mut cluster, ca) = hosts(&["alice"]);
    let soon = SystemTime::now() + Duration::from_secs(8);
    ca.writes(&cluster, "alice/host", &["alice"], soon);
    start(&mut cluster, "alice");
    cluster.kv54(["set", "tea", "green"]).exits(0);
    let end = Instant::now() + PATIENCE;
    let said = loop {
        let said = cluster.kv54(["get", "tea", "--via", "alice"]);
        if said.code != 0 {
            break said.exits(3);
        }
        assert!(Instant::now() < end, "it is believed for ever");
    };
    said.says(&["alice", "certificate expired"]);
    cluster.stop("alice");
    let said = cluster.kv54(["serve", "alice", "--config", "alice/cluster.toml"]);
    said.exits(2)
        .says(&["alice/host.pem", "certificate expired"]);
}

#[test]
fn a_certificate_of_another_node_is_not_believed() {
    let (cluster, ca) = alice();
    // The name is what counts, not the address: this file has bob where alice listens.
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    cluster.file("cluster.toml", &file.replace("alice =", "bob ="));
    let said = cluster.kv54(["get", "tea", "--via", "bob"]).exits(3);
    said.says(&["not valid for name \"bob\"", "alice"]);
    turned_away(&cluster, "it refused the TLS handshake");

    ca.writes(&cluster, "host", &["alice"], ever());
    let said = cluster.kv54(["serve", "bob"]).exits(2);
    said.says(&["host.pem", "not valid for name \"bob\"", "alice"]);
}

/// What memcached's clients ask, each about another key, so that no one waits for another.
const ASKED: [&str; 9] = [
    "get tea\r\n",
    "gets milk honey lemon\r\n",
    "set pot 0 0 5\r\nblack\r\n",
    "add cup 0 0 5\r\nblack\r\n",
    "cas jug 0 0 5 1\r\nblack\r\n",
    "incr cups 1\r\n",
    "touch mug 0\r\n",
    "delete kettle\r\n",
    "mg spoon v q\r\n",
];

#[test]
fn a_gateway_without_the_right_certificates_is_turned_away_and_nothing_is_a_miss() {
    let (cluster, ca) = three_hosts();
    let gateway = Gateway::of(&cluster, &[]);
    let megabyte = "x".repeat(1 << 20);
    gateway.client().plays(&[
        ("set tea 0 0 5\r\ngreen\r\n", "STORED\r\n"),
        ("get tea honey\r\n", "VALUE tea 0 5\r\ngreen\r\nEND\r\n"),
        ("set cups 7 0 1\r\n5\r\n", "STORED\r\n"),
        ("incr cups 1\r\n", "6\r\n"),
        (
            &format!("set milk 0 0 1048576\r\n{megabyte}\r\n"),
            "STORED\r\n",
        ),
        (
            "get milk\r\n",
            &format!("VALUE milk 0 1048576\r\n{megabyte}\r\nEND\r\n"),
        ),
    ]);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    let refused = |args: &[&str], why: &str| {
        let stranger = Gateway::of(&cluster, &[&["--timeout", "1s"], args].concat());
        let mut client = stranger.client();
        client.sends(&ASKED.concat());
        for asked in ASKED {
            let line = client.line();
            assert!(
                line.starts_with("SERVER_ERROR unavailable: "),
                "{asked}: {line}"
            );
            assert!(line.contains(why), "{asked}: {line}");
        }
        client.plays(&[("mn\r\n", "MN\r\n")]);
    };
    refused(&["--config", "plain.toml"], "it speaks TLS");
    Authority::named("another").writes(&cluster, "host", &["ops"], ever());
    refused(&[], "it refused the TLS handshake: ");
    ca.writes(&cluster, "host", &["ops"], ever());
    cluster.file("ca.pem", &Authority::named("another").pem);
    refused(&[], "not signed by the ca of [tls]");
    // Nothing has changed, and the one that was let in goes on.
    gateway.client().plays(&[
        (
            "get tea pot cup jug\r\n",
            "VALUE tea 0 5\r\ngreen\r\nEND\r\n",
        ),
        ("get cups\r\n", "VALUE cups 7 1\r\n6\r\nEND\r\n"),
    ]);
}

#[test]
fn files_that_do_not_fit_are_named() {
    let (cluster, ca) = hosts(&["alice"]);
    let refused = |parts: &[&str]| {
        for command in [&["serve", "alice"][..], &["get", "tea"], &["status"]] {
            cluster.kv54(command).exits(2).says(parts);
        }
    };
    for (file, what) in [
        ("ca.pem", "no certificate"),
        ("host.pem", "no certificate"),
        ("host.key", "no private key"),
    ] {
        ca.writes(&cluster, "host", &["alice"], ever());
        cluster.file("ca.pem", &ca.pem);
        cluster.file(file, "green\n");
        refused(&[file, what]);
        std::fs::remove_file(cluster.dir.join(file)).unwrap();
        refused(&[file, "No such file"]);
    }
    cluster.file("host.key", &KeyPair::generate().unwrap().serialize_pem());
    refused(&["host.key", "not the key of host.pem"]);
}

#[test]
fn a_table_that_is_not_whole_is_refused_and_so_is_a_name_that_no_certificate_can_have() {
    let cluster = Cluster::of(&["alice"]);
    let rest = "ca = \"ca.pem\"\ncert = \"host.pem\"\nkey = \"host.key\"\n";
    for (file, parts) in [
        ("[tls]\nca = \"ca.pem\"\n", ["bad.toml:3: ", "cert"]),
        (&format!("[tls]\n{rest}psk = 5\n"), ["bad.toml:7: ", "psk"]),
        (
            &format!("\"-\" = \"h:1\"\n[tls]\n{rest}"),
            ["bad.toml:4: tls: ", "\"-\""],
        ),
    ] {
        cluster.file("bad.toml", &format!("[nodes]\nalice = \"h:5\"\n{file}"));
        let said = cluster.kv54(["status", "--config", "bad.toml"]);
        said.exits(2).says(&parts);
    }
}

#[test]
fn who_never_ends_the_handshake_is_let_go_and_meanwhile_counts() {
    let (mut cluster, ca) = hosts(&["alice"]);
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    let limited = file.replace("[limits]\n", "[limits]\nconnections = 2\n");
    cluster.file("alice/cluster.toml", &limited);
    ca.writes(&cluster, "alice/host", &["alice"], ever());
    start(&mut cluster, "alice");
    let silent = [(); 2].map(|()| TcpStream::connect(cluster.address("alice")).unwrap());
    let said = cluster.kv54(["get", "tea", "--via", "alice"]).exits(3);
    said.says(&["alice"]);
    let warned = warnings(&cluster, "alice");
    assert!(
        warned[0].contains("refused: at most 2 may be open"),
        "{warned:?}"
    );
    for mut stream in silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let end = stream.read(&mut [0]);
        assert!(
            matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
        );
    }
    cluster.node("alice").wait_for("took more than 10s");
    cluster.kv54(["set", "tea", "green"]).exits(0);
}

#[test]
fn an_answer_arrives_to_its_last_byte_on_the_narrowest_network() {
    struct Talker;

    impl Service for Talker {
        async fn answer(&self, _: &str, _: &[&[u8]]) -> Result<Answer, Error> {
            Ok(Packed::of("green ".repeat(5_000)).into())
        }
    }

    let (cluster, _) = hosts(&["ops"]);
    let guard = tls::guard(&cluster.ring(), "ops").unwrap();
    let (near, far) = tokio::io::duplex(100);
    let accepted = guard(Box::new(far), ([127, 0, 0, 1], 1).into());
    let incoming = stream::iter([Ok(accepted)]).chain(stream::pending());
    let limits = Limits {
        connections: 1,
        buffers: 1 << 20,
        ..Limits::default()
    };
    let question = async {
        let connector = TlsConnector::from(client(&cluster, true));
        let name = ServerName::try_from("ops").unwrap();
        let mut stream = connector.connect(name, near).await.unwrap();
        stream.write_all(b"\x94\x00\x01\xa3say\x90").await.unwrap();
        stream.flush().await.unwrap();
        stream.read_exact(&mut vec![0; 30_000]).await.unwrap();
    };
    block_on(async {
        tokio::select! {
            answered = timeout(PATIENCE, question) => answered.unwrap(),
            () = serve(incoming, &Talker, || limits, CancellationToken::new()) => panic!("it stopped"),
        }
    });
}

#[test]
fn a_node_stops_at_once_while_a_handshake_is_open() {
    let (mut cluster, _) = alice();
    let _silent = TcpStream::connect(cluster.address("alice")).unwrap();
    cluster.kv54(["set", "tea", "green"]).exits(0); // so the one before it has been accepted
    cluster.signal("alice", "TERM");
    cluster.node("alice").wait_for("stopped");
    assert_eq!(warnings(&cluster, "alice"), [""; 0]);
    cluster.stop("alice");
}

/// Somebody who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn named(name: &str) -> Authority {
        let (key, mut params) = (KeyPair::generate().unwrap(), CertificateParams::default());
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Authority {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// Writes a new key and a certificate of it for these names: FILE.key and FILE.pem.
    fn writes(&self, cluster: &Cluster, file: &str, names: &[&str], until: SystemTime) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let (key, mut params) = (
            KeyPair::generate().unwrap(),
            CertificateParams::new(names).unwrap(),
        );
        params.not_after = until.into();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        cluster.file(&format!("{file}.key"), &key.serialize_pem());
        cluster.file(&format!("{file}.pem"), &certificate.pem());
    }
}

fn ever() -> SystemTime {
    SystemTime::now() + Duration::from_secs(1_000_000_000)
}

/// A directory for each host, and around them the one in which commands run; none is running yet.
fn hosts(names: &[&str]) -> (Cluster, Authority) {
    let (cluster, ca) = (Cluster::of(names), Authority::named("ca"));
    let plain = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    cluster.file("plain.toml", &plain);
    let table = "[tls]\nca = \"ca.pem\"\ncert = \"host.pem\"\nkey = \"host.key\"\n";
    let all = names.iter().map(|name| (format!("{name}/"), *name));
    for (dir, name) in all.chain([(String::new(), "ops")]) {
        std::fs::create_dir_all(cluster.dir.join(&dir)).unwrap();
        cluster.file(&format!("{dir}cluster.toml"), &format!("{plain}{table}"));
        cluster.file(&format!("{dir}ca.pem"), &ca.pem);
        ca.writes(&cluster, &format!("{dir}host"), &[name], ever());
    }
    (cluster, ca)
}

fn start(cluster: &mut Cluster, name: &str) {
    let file = format!("{name}/cluster.toml");
    cluster.start_behind(name, &file, &cluster.address(name));
}

/// One host, its node running.
fn alice() -> (Cluster, Authority) {
    let (mut cluster, ca) = hosts(&["alice"]);
    start(&mut cluster, "alice");
    cluster.wait_until_ready();
    (cluster, ca)
}

/// Three hosts, their nodes running.
fn three_hosts() -> (Cluster, Authority) {
    let names = ["alice", "bob", "carol"];
    let (mut cluster, ca) = hosts(&names);
    for name in names {
        start(&mut cluster, name);
    }
    cluster.wait_until_ready();
    (cluster, ca)
}

/// What a node has warned of.
fn warnings(cluster: &Cluster, name: &str) -> Vec<String> {
    let mut lines = cluster.node(name).log();
    lines.retain(|line| line.contains("warning: "));
    lines
}

/// Alice has warned of one connection, for this reason.
#[track_caller]
fn turned_away(cluster: &Cluster, why: &str) {
    let line = cluster.node("alice").wait_for("warning: ");
    assert!(line.contains("a connection from 127.0.0.1:"), "{line}");
    assert!(line.contains(why), "{line}");
    assert_eq!(warnings(cluster, "alice").len(), 1);
}

/// Somebody who believes the ca, and has the certificate of the outer host or none.
fn client(cluster: &Cluster, certified: bool) -> Arc<ClientConfig> {
    let file = |name: &str| cluster.dir.join(name);
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(file("ca.pem")).unwrap();
    roots.add(ca).unwrap();
    let config = ClientConfig::builder_with_provider(default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    if !certified {
        return config.with_no_client_auth().into();
    }
    let chain = vec![CertificateDer::from_pem_file(file("host.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(file("host.key")).unwrap();
    config.with_client_auth_cert(chain, key).unwrap().into()
}
