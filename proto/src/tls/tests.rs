//! Connections over real sockets, with certificates made here.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::{Links, Protocol, RawTls, Tls, TlsConfig};
use crate::network::{Connection, Incoming, Network};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic::transport::Endpoint;

/// Bounds every wait: far beyond what anything takes.
const LIMIT: Duration = Duration::from_secs(30);

/// An authority, and the folder that its files lie in.
struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        std::fs::write(folder.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { folder, issuer: Issuer::new(params, key) }
    }

    fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Files of a certificate for some names or addresses, and of its key.
    fn issue(&self, file: &str, names: &[&str]) -> (PathBuf, PathBuf) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let paths = (self.folder.join(format!("{file}.pem")), self.folder.join(format!("{file}.key")));
        std::fs::write(&paths.0, cert.pem()).unwrap();
        std::fs::write(&paths.1, key.serialize_pem()).unwrap();
        paths
    }

    /// What shows a certificate of this authority and trusts this authority.
    fn tls(&self, file: &str, names: &[&str], require_client_cert: bool) -> Tls {
        let identity = Some(self.issue(file, names));
        Tls::load(TlsConfig { identity, ca: Some(self.ca()), require_client_cert }).unwrap()
    }

    /// What only trusts it.
    fn trusting(&self) -> Tls {
        Tls::load(TlsConfig { ca: Some(self.ca()), ..TlsConfig::default() }).unwrap()
    }
}

/// Answers every connection with the bytes that it sends.
async fn echo(tls: Tls) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut incoming = Incoming::tls(listener, tls, Protocol::Grpc);
    let address = incoming.local_addr().unwrap();
    tokio::spawn(async move {
        while let Some(Ok(connection)) = incoming.next().await {
            tokio::spawn(async move {
                let (mut from, mut to) = tokio::io::split(connection);
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    address
}

async fn ping(connection: &mut Connection) -> std::io::Result<()> {
    connection.write_all(b"ping").await?;
    connection.flush().await?;
    let mut answer = [0; 4];
    connection.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"ping");
    Ok(())
}

/// Opens a connection and uses it: a server's refusal comes after the client's handshake.
async fn try_ping(tls: Tls, address: impl std::fmt::Display) -> std::io::Result<Connection> {
    let dialled = Network::tls(tls).dial(address.to_string());
    let work = async {
        let mut connection = dialled.await?;
        ping(&mut connection).await?;
        Ok(connection)
    };
    timeout(LIMIT, work).await.unwrap()
}

async fn refusal(tls: Tls, address: impl std::fmt::Display) -> String {
    try_ping(tls, address).await.err().expect("it is refused").to_string()
}

#[tokio::test]
async fn only_those_who_trust_each_other_talk() {
    let data = TempDir::new().unwrap();
    let (ours, theirs) = (Authority::new(data.path(), "ours"), Authority::new(data.path(), "theirs"));
    let open = echo(ours.tls("open", &["127.0.0.1", "localhost"], false)).await;
    try_ping(ours.trusting(), open).await.unwrap();
    try_ping(ours.trusting(), format!("localhost:{}", open.port())).await.unwrap();
    let error = refusal(theirs.trusting(), open).await;
    assert!(error.contains("UnknownIssuer"), "{error}");

    let mutual = echo(ours.tls("mutual", &["127.0.0.1"], true)).await;
    try_ping(ours.tls("client", &["client"], false), mutual).await.unwrap();
    let error = refusal(ours.trusting(), mutual).await;
    assert!(error.contains("CertificateRequired"), "{error}");
    let identity = Some(theirs.issue("client", &["client"]));
    let stranger = Tls::load(TlsConfig { identity, ca: Some(ours.ca()), ..TlsConfig::default() }).unwrap();
    let error = refusal(stranger, mutual).await;
    assert!(error.contains("alert"), "{error}");

    let other = echo(ours.tls("other", &["worker-1"], false)).await;
    let error = refusal(ours.trusting(), other).await;
    assert!(error.contains("not valid for name") && error.contains("worker-1"), "{error}");
}

#[tokio::test]
async fn who_speaks_no_tls_is_told_so() {
    let data = TempDir::new().unwrap();
    let ours = Authority::new(data.path(), "ours");
    let tls = ours.tls("server", &["127.0.0.1"], false);
    let address = echo(tls.clone()).await;
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let channel = Network::default().connect(&endpoint).await.unwrap();
    let mut health = tonic::client::Grpc::new(channel);
    health.ready().await.unwrap();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/a/b");
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let status = health.unary(tonic::Request::new(()), path, codec).await.unwrap_err();
    assert!(format!("{status:?}").contains("this port speaks TLS: use https"), "{status:?}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http = listener.local_addr().unwrap();
    let _incoming = Incoming::tls(listener, tls.clone(), Protocol::Http);
    let mut plain = TcpStream::connect(http).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    plain.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.ends_with("use https://\n"), "{answer}");

    // The other way around.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let error = refusal(ours.trusting(), address).await;
    assert!(error.contains("speaks no TLS"), "{error}");
}

#[tokio::test]
async fn clients_that_say_nothing_hold_up_nobody() {
    let data = TempDir::new().unwrap();
    let ours = Authority::new(data.path(), "ours");
    let address = echo(ours.tls("server", &["127.0.0.1"], false)).await;
    let mut silent = Vec::new();
    for _ in 0..super::accept::HANDSHAKES_MAX + 8 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let begun = Instant::now();
    try_ping(ours.trusting(), address).await.unwrap();
    assert!(begun.elapsed() < super::HANDSHAKE_LIMIT, "{:?}", begun.elapsed());
    // The oldest gave way, and the youngest is given up in time.
    assert_eq!(silent[0].read(&mut [0]).await.unwrap_or(0), 0);
    let youngest = silent.last_mut().unwrap();
    assert_eq!(timeout(LIMIT, youngest.read(&mut [0])).await.unwrap().unwrap_or(0), 0);
}

#[tokio::test]
async fn new_files_are_for_new_connections() {
    let data = TempDir::new().unwrap();
    let (old, new) = (Authority::new(data.path(), "old"), Authority::new(data.path(), "new"));
    let tls = old.tls("server", &["127.0.0.1"], true);
    let address = echo(tls.clone()).await;
    let former = old.tls("client", &["client"], false);
    let mut open = try_ping(former.clone(), address).await.unwrap();
    assert!(!tls.reload().unwrap());

    // A file that is half there: what was in force stays, and is complained of once.
    let (cert, key) = (old.folder.join("server.pem"), old.folder.join("server.key"));
    let (new_cert, new_key) = new.issue("server", &["127.0.0.1"]);
    std::fs::copy(&new_cert, &cert).unwrap();
    assert!(tls.reload().unwrap_err()[0].to_string().contains("server.key"));
    assert!(!tls.reload().unwrap());
    std::fs::write(&key, "no key").unwrap();
    assert!(tls.reload().unwrap_err()[0].to_string().starts_with("tls.key: "));
    try_ping(former.clone(), address).await.unwrap();

    std::fs::copy(&new_key, &key).unwrap();
    std::fs::copy(new.ca(), old.ca()).unwrap();
    assert!(tls.reload().unwrap());
    ping(&mut open).await.unwrap();
    // Not even with a session of before.
    let error = refusal(former, address).await;
    assert!(error.contains("UnknownIssuer"), "{error}");
    try_ping(new.tls("client", &["client"], false), address).await.unwrap();
    let identity = Some((old.folder.join("client.pem"), old.folder.join("client.key")));
    let late = Tls::load(TlsConfig { identity, ca: Some(new.ca()), ..TlsConfig::default() }).unwrap();
    let error = refusal(late, address).await;
    assert!(error.contains("alert"), "{error}");
    ping(&mut open).await.unwrap();
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named() {
    let data = TempDir::new().unwrap();
    let ours = Authority::new(data.path(), "ours");
    let (cert, _) = ours.issue("a", &["a"]);
    let (_, key) = ours.issue("b", &["b"]);
    let raw = |cert: &Path, key: &Path, ca: PathBuf| RawTls {
        cert: Some(cert.to_owned()),
        key: Some(key.to_owned()),
        ca: Some(ca),
        require_client_cert: None,
    };
    let missing = Path::new("/nowhere");
    let errors = Links::new(Some(raw(missing, missing, missing.into())), Some(true), false).unwrap_err();
    let keys: Vec<_> = errors.iter().filter_map(|error| error.split(':').next()).collect();
    assert_eq!(keys, ["insecure", "tls.cert", "tls.key", "tls.ca"]);
    let errors = Links::new(Some(raw(&key, &cert, key.clone())), None, true).unwrap_err();
    let keys: Vec<_> = errors.iter().filter_map(|error| error.split(':').next()).collect();
    assert_eq!(keys, ["tls.ca", "tls.cert", "tls.key"]);
    let errors = Links::new(Some(raw(&cert, &key, ours.ca())), None, true).unwrap_err();
    assert!(errors.len() == 1 && errors[0].contains("b.key"), "{errors:?}");
}

#[tokio::test]
async fn plain_links_stay_on_this_machine_unless_said_otherwise() {
    let plain = Links::default();
    let bind = async |address: &str| TcpListener::bind(address).await.unwrap();
    assert!(plain.incoming(bind("127.0.0.1:0").await, Protocol::Grpc).is_ok());
    let error = plain.incoming(bind("0.0.0.0:0").await, Protocol::Grpc).unwrap_err().to_string();
    assert!(error.contains("--tls-cert") && error.contains("--insecure"), "{error}");
    let insecure = Links::new(None, Some(true), true).unwrap();
    assert!(insecure.incoming(bind("0.0.0.0:0").await, Protocol::Grpc).is_ok());
}
