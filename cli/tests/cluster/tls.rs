//! A cluster under mutual TLS: who is let in, and what happens to streams when the authority changes.

use crate::processes::{LIMIT, Process};
use crate::request;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use unmask::local::gateway;
use unmask::tls::ClientTlsArgs;
use unmask_proto::v1::ListModelsRequest;
use unmask_proto::v1::generate_response::Event;

const SERVICES: [&str; 4] = ["controller", "gateway", "worker", "client"];

fn unmask(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_unmask")).args(arguments).output().unwrap()
}

fn complaint(output: &Output) -> String {
    assert!(!output.status.success(), "it is refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until a refusal says why. A machine that is busy with other tests may answer later than who dials waits for what
/// the other side says of its certificate: it is refused all the same, without a reason.
fn refused(arguments: &[&str], why: &str) {
    let begun = Instant::now();
    loop {
        let error = complaint(&unmask(arguments));
        if error.contains(why) {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{error}");
    }
}

/// The files of a new authority take the place of those of before; each service and the client has a certificate of it.
fn issue(folder: &Path) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "unmask-ca");
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    for service in SERVICES {
        let key = KeyPair::generate().unwrap();
        let names = vec![service.to_owned(), "127.0.0.1".into()];
        let cert = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
        std::fs::write(folder.join(format!("{service}.pem")), cert.pem()).unwrap();
        std::fs::write(folder.join(format!("{service}.key")), key.serialize_pem()).unwrap();
    }
    std::fs::write(folder.join("ca.pem"), ca.pem()).unwrap();
}

/// Processes whose certificates lie in a folder.
struct Secured {
    folder: tempfile::TempDir,
    controller: Process,
    gateway: Process,
    workers: Vec<Process>,
    /// host:port of the gateway's HTTP interface.
    http: String,
}

fn path(folder: &Path, file: &str) -> String {
    folder.join(file).to_str().unwrap().to_owned()
}

fn flags(folder: &Path, service: &str) -> [String; 6] {
    let file = |name: String| path(folder, &name);
    let [cert, key] = [file(format!("{service}.pem")), file(format!("{service}.key"))];
    ["--tls-cert".into(), cert, "--tls-key".into(), key, "--tls-ca".into(), file("ca.pem".into())]
}

fn start(folder: &Path, service: &str, arguments: &[&str]) -> Process {
    let flags = flags(folder, service);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Process::start(&[&[service], arguments, &flags].concat(), "127.0.0.1:0")
}

impl Secured {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        issue(folder.path());
        let store = format!("embedded:{}", path(folder.path(), "store"));
        let controller = start(folder.path(), "controller", &["--store", &store]);
        let http = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let gateway = start(folder.path(), "gateway", &["--controller", &controller.address, "--http", &http]);
        let mut cluster = Self { folder, controller, gateway, workers: Vec::new(), http };
        cluster.add_worker();
        cluster.serving(1, &cluster.client()).await;
        cluster
    }

    fn add_worker(&mut self) {
        let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar");
        let arguments = ["--controller", &self.controller.address, "--model", model.to_str().unwrap()];
        let quick = ["--threads", "1", "--dtype", "f32"];
        self.workers.push(start(self.folder.path(), "worker", &[&arguments[..], &quick].concat()));
    }

    /// Trusts the authority of now, and shows nothing.
    fn client(&self) -> ClientTlsArgs {
        ClientTlsArgs { tls_ca: Some(self.folder.path().join("ca.pem")), ..ClientTlsArgs::default() }
    }

    fn endpoint(&self) -> String {
        format!("https://{}", self.gateway.address)
    }

    /// Waits until the gateway has so many groups.
    async fn serving(&self, groups: u32, tls: &ClientTlsArgs) {
        let serving = async {
            loop {
                let mut client = gateway(&self.endpoint(), tls).unwrap();
                let models = client.list_models(ListModelsRequest {}).await.map(|m| m.into_inner().models);
                if models.is_ok_and(|models| models.iter().map(|model| model.ready_groups).sum::<u32>() == groups) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, serving).await.expect("the groups serve");
    }
}

async fn get(address: &str, ca: &Path, target: &str) -> String {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let connector =
        tokio_rustls::TlsConnector::from(Arc::new(config.with_root_certificates(roots).with_no_client_auth()));
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream = connector.connect(ServerName::try_from("127.0.0.1").unwrap(), stream).await.unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn under_mutual_tls_only_those_with_certificates_are_let_in() {
    let cluster = Secured::start().await;
    let (folder, control) = (cluster.folder.path(), cluster.controller.address.as_str());
    let ca = path(folder, "ca.pem");
    let generate = ["generate", "--max-tokens", "32", "--quiet", "def f(x):", "--endpoint"];
    let done = unmask(&[&generate[..], &[&cluster.endpoint(), "--tls-ca", &ca]].concat());
    assert!(done.status.success() && done.stdout.len() > "def f(x):".len(), "{done:?}");
    let error = complaint(&unmask(&[&generate[..], &[&cluster.endpoint()]].concat()));
    assert!(error.contains("UnknownIssuer") || error.contains("no certificates of authorities"), "{error}");
    let plain = format!("http://{}", cluster.gateway.address);
    let error = complaint(&unmask(&[&generate[..], &[&plain]].concat()));
    assert!(error.contains("this port speaks TLS: use https"), "{error}");
    // The worker shows its certificate to the gateway, and lets in nobody else.
    let worker = format!("https://{}", cluster.workers[0].address);
    refused(&[&generate[..], &[&worker, "--tls-ca", &ca]].concat(), "CertificateRequired");

    let status = ["status", "--json", "--controller", control];
    let shown = flags(folder, "client");
    let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
    let seen = unmask(&[&status[..], &shown].concat());
    let seen: serde_json::Value = serde_json::from_slice(&seen.stdout).unwrap();
    assert_eq!((seen["members"][0]["state"].as_str(), seen["members"].as_array().unwrap().len()), (Some("ready"), 1));
    refused(&[&status[..], &["--tls-ca", &ca]].concat(), "CertificateRequired");
    let error = complaint(&unmask(&status));
    assert!(error.contains("this port speaks TLS"), "{error}");

    let answer = get(&cluster.http, &folder.join("ca.pem"), "/v1/models").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"sdar\""), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_last_while_the_authority_changes() {
    let mut cluster = Secured::start().await;
    let former = cluster.folder.path().join("former.pem");
    std::fs::copy(cluster.folder.path().join("ca.pem"), &former).unwrap();
    let former = ClientTlsArgs { tls_ca: Some(former), ..ClientTlsArgs::default() };
    // Streams over one connection, which could not be opened again once the authority has changed.
    let stop = Arc::new(AtomicBool::new(false));
    let streams = tokio::spawn({
        let (mut client, stop) = (gateway(&cluster.endpoint(), &former).unwrap(), Arc::clone(&stop));
        async move {
            let mut ended = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut events = client.generate(request(ended)).await.unwrap().into_inner();
                let mut finished = false;
                while let Some(response) = events.message().await.unwrap() {
                    finished |= matches!(response.event, Some(Event::Finish(_)));
                }
                assert!(finished);
                ended += 1;
            }
            ended
        }
    });
    let begun = Instant::now();
    issue(cluster.folder.path());
    cluster.serving(1, &cluster.client()).await;
    let taken = begun.elapsed();
    let error = gateway(&cluster.endpoint(), &former).unwrap().list_models(ListModelsRequest {}).await.unwrap_err();
    assert!(error.message().contains("invalid peer certificate"), "{error}");
    // All have the new files: the controller lets in a worker with them, and the gateway reaches it.
    cluster.add_worker();
    cluster.serving(2, &cluster.client()).await;
    stop.store(true, Ordering::Relaxed);
    let ended = tokio::time::timeout(LIMIT, streams).await.unwrap().unwrap();
    println!("new certificates were in force after {taken:?}; {ended} streams over the old connection meanwhile");
    assert!(ended > 1, "{ended}");
}

#[test]
fn plain_services_stay_on_this_machine() {
    for service in [
        &["gateway", "--controller", "127.0.0.1:1", "--listen", "0.0.0.0:0"][..],
        &["up", "--port", "0", "--host", "0.0.0.0"],
    ] {
        let error = complaint(&unmask(service));
        assert!(
            error.contains("--insecure") && (error.contains("certificates") || error.contains("--tls-cert")),
            "{error}"
        );
    }
}
