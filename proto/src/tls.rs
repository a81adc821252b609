//! Who is who: Ed25519 keys pinned by fingerprint, carried as raw public keys (RFC 7250) in TLS 1.3.
//!
//! There is no certificate and no authority: a side is its public key, shown as `SHA256:…` of the key in
//! SubjectPublicKeyInfo form, in unpadded base64 as SSH shows it. A key that is not pinned gets no further than the
//! handshake: the verifier runs before any stream exists.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::Ed25519KeyPair;
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime, pem::PemObject,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use serde::{Deserialize, Serialize};

use crate::codec::printable;
use crate::control::ALPN;

/// SHA-256 of a public key: the name of a side.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of a key in SubjectPublicKeyInfo form (DER).
    #[must_use]
    pub fn of_spki(der: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SHA256:{}", STANDARD_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no fingerprint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{given}' is not a key fingerprint: copy the SHA256:… line that `twinsite id` prints on the other machine")]
pub struct FingerprintParseError {
    given: String,
}

impl FromStr for Fingerprint {
    type Err = FingerprintParseError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix("SHA256:")
            .and_then(|b| STANDARD_NO_PAD.decode(b).ok())
            .and_then(|b| b.try_into().ok())
            .map(Self)
            .ok_or_else(|| FingerprintParseError { given: printable(text, 80) })
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What can be wrong with keys.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The library could not make a key.
    #[error("cannot generate a key: the system's random source failed")]
    Generate,
    /// The text is not a private key in PKCS#8 PEM form.
    #[error("not a private key in PKCS#8 PEM form")]
    Parse,
    /// The TLS library refuses the key or the configuration.
    #[error("TLS refuses the key: {0}")]
    Tls(#[from] rustls::Error),
    /// The QUIC library refuses the configuration.
    #[error("QUIC needs TLS 1.3 with AES-128-GCM")]
    Quic,
}

/// This node's key pair.
#[derive(Clone)]
pub struct Identity {
    certified: Arc<CertifiedKey>,
    provider: Arc<CryptoProvider>,
    fingerprint: Fingerprint,
    /// Derived from the private key; see [`Identity::quic_endpoint`].
    endpoint_secret: [u8; 32],
}

impl fmt::Debug for Identity {
    /// Never the private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.fingerprint)
    }
}

impl Identity {
    /// A new private key in PKCS#8 PEM form. The caller stores it with mode 0600.
    ///
    /// # Errors
    /// [`IdentityError::Generate`].
    pub fn generate_pem() -> Result<String, IdentityError> {
        let der = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| IdentityError::Generate)?;
        let base64 = base64::engine::general_purpose::STANDARD.encode(der.as_ref());
        Ok(format!("-----BEGIN PRIVATE KEY-----\n{base64}\n-----END PRIVATE KEY-----\n"))
    }

    /// The identity of a stored private key.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| IdentityError::Parse)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, der.secret_pkcs8_der()), b"twinsite quic endpoint 1");
        let mut endpoint_secret = [0; 32];
        endpoint_secret.copy_from_slice(tag.as_ref());
        let key = provider.key_provider.load_private_key(PrivateKeyDer::Pkcs8(der))?;
        let spki = key.public_key().ok_or(IdentityError::Parse)?;
        let fingerprint = Fingerprint::of_spki(spki.as_ref());
        let certified = Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki.as_ref().to_vec())], key));
        Ok(Self { certified, provider, fingerprint, endpoint_secret })
    }

    /// What the other side pins.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// QUIC endpoint settings whose secrets outlive the process: a receiver that restarted can then tell its primaries at once
    /// that their connections are gone (stateless reset, RFC 9000 section 10.3), rather than leave them to time out.
    ///
    /// # Panics
    /// Never: the payload size is a constant within QUIC's limits.
    #[must_use]
    pub fn quic_endpoint(&self) -> quinn_proto::EndpointConfig {
        let mut config = quinn_proto::EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &self.endpoint_secret)));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.endpoint_secret), b"connection ids");
        let key = tag.as_ref().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        config.max_udp_payload_size(crate::transport::UDP_PAYLOAD_BYTES_MAX).expect("a constant within QUIC's limits");
        config.cid_generator(move || Box::new(quinn_proto::HashedConnectionIdGenerator::from_key(key)));
        config
    }

    /// QUIC configuration of a receiver that lets in `clients` only.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn quic_server(
        &self,
        clients: BTreeSet<Fingerprint>,
    ) -> Result<quinn_proto::crypto::rustls::QuicServerConfig, IdentityError> {
        let resolver = rustls::server::AlwaysResolvesServerRawPublicKeys::new(self.certified.clone());
        let mut config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(self.pinned(clients)))
            .with_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.max_early_data_size = 0;
        config.try_into().map_err(|_| IdentityError::Quic)
    }

    /// QUIC configuration of a primary that talks to `receiver` only.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn quic_client(&self, receiver: Fingerprint) -> Result<quinn_proto::crypto::rustls::QuicClientConfig, IdentityError> {
        let resolver = rustls::client::AlwaysResolvesClientRawPublicKeys::new(self.certified.clone());
        let mut config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.pinned(BTreeSet::from([receiver]))))
            .with_client_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.try_into().map_err(|_| IdentityError::Quic)
    }

    fn pinned(&self, keys: BTreeSet<Fingerprint>) -> PinnedKeys {
        PinnedKeys { keys, algorithms: self.provider.signature_verification_algorithms }
    }
}

/// A peer's key that is not pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("key {shown} is not pinned here")]
pub struct NotPinned {
    /// The key it showed.
    pub shown: Fingerprint,
}

/// Accepts exactly the keys it was given, whoever presents them, and checks that the peer owns the key.
#[derive(Debug)]
struct PinnedKeys {
    keys: BTreeSet<Fingerprint>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedKeys {
    fn check(&self, end_entity: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let shown = Fingerprint::of_spki(end_entity.as_ref());
        if self.keys.contains(&shown) {
            Ok(())
        } else {
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(NotPinned { shown })))))
        }
    }

    fn verify(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature_with_raw_key(message, &SubjectPublicKeyInfoDer::from(key.as_ref()), dss, &self.algorithms)
    }

    fn no_tls12() -> rustls::Error {
        rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered)
    }
}

impl ServerCertVerifier for PinnedKeys {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(Self::no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, key, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for PinnedKeys {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(Self::no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, key, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_reads_back_and_a_key_keeps_its_own() {
        let pem = Identity::generate_pem().unwrap();
        let (a, b) = (Identity::from_pem(&pem).unwrap(), Identity::from_pem(&pem).unwrap());
        assert_eq!(a.fingerprint(), b.fingerprint());
        let text = a.fingerprint().to_string();
        assert!(text.starts_with("SHA256:") && text.len() == 50, "{text}");
        assert_eq!(text.parse::<Fingerprint>().unwrap(), a.fingerprint());
        assert!(!format!("{a:?}").contains("PRIVATE"));
        for bad in ["", "SHA256:", "SHA256:abc", "MD5:00", &text[1..]] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
        assert!(Identity::from_pem("no key").is_err());
        assert!(a.quic_server(BTreeSet::from([b.fingerprint()])).is_ok());
        assert!(a.quic_client(b.fingerprint()).is_ok());
    }
}
