//! PEM files to what rustls takes.

use super::TlsConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// Largest PEM file (bytes).
const FILE_BYTES_MAX: u64 = 1 << 20;
/// What gRPC needs TLS to agree on.
const HTTP_2: &[u8] = b"h2";
/// What the HTTP interface needs TLS to agree on.
const HTTP_1: &[u8] = b"http/1.1";

/// Why certificates cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("tls.{key}: cannot read {}: {source}", path.display())]
    Read {
        /// The key that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("tls.{key}: {} holds no {what} in PEM: {source}", path.display())]
    Pem {
        /// The key that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wanted.
        what: &'static str,
        /// Why.
        source: pem::Error,
    },
    /// A certificate of an authority cannot be used.
    #[error("tls.ca: {}: {source}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// Certificate and key do not belong together, or cannot be used.
    #[error("tls.cert, tls.key: {} and {}: {source}", cert.display(), key.display())]
    Identity {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The authorities cannot judge clients.
    #[error("tls.ca: cannot verify clients: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// Neither the settings nor the system name an authority.
    #[error("tls.ca: is missing, and this system has no certificates of authorities")]
    NoAuthorities,
    /// rustls has no TLS 1.3.
    #[error("TLS: {0}")]
    Protocol(#[from] rustls::Error),
}

/// The bytes of the files.
#[derive(PartialEq, Eq)]
pub(super) struct Files {
    /// Of the certificate and of the key.
    identity: Option<(Vec<u8>, Vec<u8>)>,
    /// Of the authorities.
    ca: Option<Vec<u8>>,
}

impl Files {
    /// Reads all of them.
    ///
    /// # Errors
    /// Every file that cannot be read.
    pub(super) fn read(config: &TlsConfig) -> Result<Self, Vec<TlsError>> {
        let mut errors = Vec::new();
        let mut bytes = |key, path: &Path| {
            read(path).map_err(|source| errors.push(TlsError::Read { key, path: path.to_owned(), source })).ok()
        };
        let identity = config.identity.as_ref().map(|(cert, key)| (bytes("cert", cert), bytes("key", key)));
        let ca = config.ca.as_ref().and_then(|path| bytes("ca", path));
        let identity = identity.and_then(|(cert, key)| cert.zip(key));
        if errors.is_empty() { Ok(Self { identity, ca }) } else { Err(errors) }
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let message = format!("it is larger than {FILE_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(bytes)
}

/// What connections are made with.
pub(super) struct Material {
    /// For connections that this process opens.
    pub client: Arc<ClientConfig>,
    /// For those that it accepts, gRPC; none without a certificate.
    pub http_2: Option<Arc<ServerConfig>>,
    /// The same for HTTP.
    pub http_1: Option<Arc<ServerConfig>>,
}

impl Material {
    /// Of files.
    ///
    /// # Errors
    /// Every file that is not what it should be.
    pub(super) fn new(config: &TlsConfig, files: &Files) -> Result<Self, Vec<TlsError>> {
        let mut errors = Vec::new();
        let roots = roots(config, files).map_err(|error| errors.push(error)).ok();
        let identity = match (&config.identity, &files.identity) {
            (Some(paths), Some(bytes)) => identity(paths, bytes).map_err(|problems| errors.extend(problems)).ok(),
            _ => None,
        };
        let Some(roots) = roots.filter(|_| errors.is_empty()) else { return Err(errors) };
        Self::build(config, Arc::new(roots), identity).map_err(|error| vec![error])
    }

    fn build(config: &TlsConfig, roots: Arc<RootCertStore>, identity: Option<Identity>) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&TLS13])?;
        let client = client.with_root_certificates(Arc::clone(&roots));
        let (Some((chain, key)), Some((cert_file, key_file))) = (identity, &config.identity) else {
            let mut client = client.with_no_client_auth();
            client.alpn_protocols = vec![HTTP_2.to_vec()];
            return Ok(Self { client: Arc::new(client), http_2: None, http_1: None });
        };
        let unfit = |source| TlsError::Identity { cert: cert_file.clone(), key: key_file.clone(), source };
        let mut client = client.with_client_auth_cert(chain.clone(), key.clone_key()).map_err(unfit)?;
        client.alpn_protocols = vec![HTTP_2.to_vec()];
        let server = server(provider, config.require_client_cert.then_some(roots))?;
        let mut http_2 = server.with_single_cert(chain, key).map_err(unfit)?;
        let mut http_1 = http_2.clone();
        http_2.alpn_protocols = vec![HTTP_2.to_vec()];
        http_1.alpn_protocols = vec![HTTP_1.to_vec()];
        Ok(Self { client: Arc::new(client), http_2: Some(Arc::new(http_2)), http_1: Some(Arc::new(http_1)) })
    }
}

/// A server's settings but its certificate; with `roots`, clients must show one of theirs.
fn server(
    provider: Arc<CryptoProvider>,
    roots: Option<Arc<RootCertStore>>,
) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>, TlsError> {
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&TLS13])?;
    Ok(match roots {
        Some(roots) => {
            builder.with_client_cert_verifier(WebPkiClientVerifier::builder_with_provider(roots, provider).build()?)
        }
        None => builder.with_no_client_auth(),
    })
}

/// The authorities in the file, or the system's.
fn roots(config: &TlsConfig, files: &Files) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    if let (Some(path), Some(bytes)) = (&config.ca, &files.ca) {
        for certificate in certificates("ca", path, bytes)? {
            roots.add(certificate).map_err(|source| TlsError::Authority { path: path.clone(), source })?;
        }
        return Ok(roots);
    }
    // Some of a system's are in a form that rustls does not take.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(TlsError::NoAuthorities) } else { Ok(roots) }
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(paths: &(PathBuf, PathBuf), bytes: &(Vec<u8>, Vec<u8>)) -> Result<Identity, Vec<TlsError>> {
    let chain = certificates("cert", &paths.0, &bytes.0);
    let key = PrivateKeyDer::from_pem_slice(&bytes.1);
    let key = key.map_err(|source| TlsError::Pem { key: "key", path: paths.1.clone(), what: "private key", source });
    match (chain, key) {
        (Ok(chain), Ok(key)) => Ok((chain, key)),
        (chain, key) => Err(chain.err().into_iter().chain(key.err()).collect()),
    }
}

/// At least one certificate.
fn certificates(key: &'static str, path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    let read = read.and_then(|found| if found.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(found) });
    read.map_err(|source| TlsError::Pem { key, path: path.to_owned(), what: "certificate", source })
}
