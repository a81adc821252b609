//! TLS settings from files. The protocol (STARTTLS) is in `negotiate`, the records are rustls'.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or holds no PEM of the right kind.
    #[error("{}: {source}: give a PEM file", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// From the parser.
        source: pem::Error,
    },
    /// No certificate in the file.
    #[error("{}: no certificate in this file", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key do not fit each other, or are not usable.
    #[error("{}: certificate or key not usable: {source}", path.display())]
    Unusable {
        /// The certificate's file.
        path: PathBuf,
        /// From rustls.
        source: rustls::Error,
    },
    /// The authority for clients' certificates cannot be used.
    #[error("{}: not usable as an authority for clients: {source}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// From rustls.
        source: rustls::server::VerifierBuilderError,
    },
    /// From the system.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Server settings from a certificate chain and its key (PEM). With `client_ca`, clients must show a certificate
/// signed by it.
///
/// # Errors
/// See [`TlsError`].
pub fn server_config(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates(certificate)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|source| TlsError::Pem { path: key.to_path_buf(), source })?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let unusable = |source| TlsError::Unusable { path: certificate.to_path_buf(), source };
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().map_err(unusable)?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(path)? {
                roots.add(authority).map_err(|source| TlsError::Unusable { path: path.to_path_buf(), source })?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|source| TlsError::Authority { path: path.to_path_buf(), source })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    Ok(Arc::new(builder.with_single_cert(chain, private).map_err(unusable)?))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = |source| TlsError::Pem { path: path.to_path_buf(), source };
    let found = CertificateDer::pem_file_iter(path).map_err(pem)?.collect::<Result<Vec<_>, _>>().map_err(pem)?;
    if found.is_empty() {
        return Err(TlsError::Empty { path: path.to_path_buf() });
    }
    Ok(found)
}
