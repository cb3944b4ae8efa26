//! Against a real etcd that wants certificates.

use super::suite;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use unmask_controller::store::{Etcd, RawStoreTls, Store as _, StoreTls};

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Files of an authority and of one certificate for everybody.
fn issue(folder: &Path) -> [PathBuf; 3] {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let cert = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let files = ["ca.pem", "cert.pem", "cert.key"].map(|name| folder.join(name));
    for (path, pem) in files.iter().zip([ca.pem(), cert.pem(), key.serialize_pem()]) {
        std::fs::write(path, pem).unwrap();
    }
    files
}

#[tokio::test]
async fn etcd_is_reached_with_certificates_and_not_without() {
    let data = tempfile::tempdir().unwrap();
    let [ca, cert, key] = issue(data.path());
    let [client, peer] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let (listen, peers) = (format!("https://{client}"), format!("http://{peer}"));
    let etcd = Command::new("etcd")
        .args(["--name", "one", "--log-level", "error", "--data-dir"])
        .arg(data.path().join("etcd"))
        .args(["--listen-client-urls", &listen, "--advertise-client-urls", &listen])
        .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .args(["--initial-cluster", &format!("one={peers}"), "--client-cert-auth"])
        .args([Path::new("--trusted-ca-file"), &ca, Path::new("--cert-file"), &cert, Path::new("--key-file"), &key])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd is installed (Debian: apt-get install etcd-server)");
    let _etcd = Process(etcd);
    let url = format!("etcd://{client}");
    let trusting = StoreTls::read(RawStoreTls { ca: Some(ca.clone()), ..RawStoreTls::default() }).unwrap();
    let known = StoreTls::read(RawStoreTls { ca: Some(ca), cert: Some(cert), key: Some(key) }).unwrap();
    let opened = async {
        loop {
            if let Ok(store) = Etcd::open(&url, Some(&known)).await {
                return store;
            }
        }
    };
    let store = tokio::time::timeout(suite::LIMIT, opened).await.expect("etcd starts");
    let revision = suite::put(&store, "a", "1").await;
    assert_eq!(store.get("a").await.unwrap().unwrap().revision, revision);
    assert!(Etcd::open(&url, Some(&trusting)).await.is_err());
    assert!(Etcd::open(&url, None).await.is_err());
}
