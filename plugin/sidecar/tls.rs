//! Who a host is, and how it makes sure of others: TLS 1.3, a certificate each
//! that nobody else has signed, and fingerprints that the admin has carried
//! from host to host.
//!
//! Names and dates in a certificate mean nothing. A host is its key: one whose
//! clock is wrong still is who it was, and who is trusted stands in `vne.conf`.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::Resumption;
use rustls::crypto::{verify_tls13_signature, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName as CaName, OtherError,
    ServerConfig, SignatureScheme,
};
use serde::{Deserialize, Serialize};

use super::files;
use crate::image::Name;

/// What both sides say that they speak (ALPN).
pub const PROTOCOL: &[u8] = b"xl-vne/1";
/// The secret part of an identity, below Xen's folder of configuration files.
pub const KEY_FILE: &str = "vne.key";
/// The public part.
pub const CERTIFICATE_FILE: &str = "vne.crt";
/// Either file has less than 1 KiB.
const PEM_BYTES_MAX: u64 = 64 << 10;
const FINGERPRINT_BYTES: usize = 16;

/// What can go wrong with who is who.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a fingerprint.
    #[error("{text:?} is no fingerprint; they are 8 groups of 4 hexadecimal digits, as 'xl vne-snapshot peer id' prints on the other host")]
    BadFingerprint {
        /// What was given.
        text: String,
    },
    /// A file can't be used.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is an identity already, or a part of one.
    #[error("there is {} already; to give this host another identity, which no peer knows, remove {KEY_FILE} and {CERTIFICATE_FILE} first", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Only one of two files is there.
    #[error("there is {}, but no {}; put it back, or remove both and run 'xl vne-snapshot peer init'", there.display(), missing.display())]
    Half {
        /// One.
        there: PathBuf,
        /// The other.
        missing: PathBuf,
    },
    /// A secret that may be none.
    #[error("others than this user may read {}; if none has, 'chown 0:0' and 'chmod 600' make it good", path.display())]
    NotSecret {
        /// The file.
        path: PathBuf,
    },
    /// A file that doesn't have what it should.
    #[error("{} can't be used; put it back, or remove {KEY_FILE} and {CERTIFICATE_FILE} and run 'xl vne-snapshot peer init'", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it shows.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No key or certificate could be made.
    #[error("can't make a certificate")]
    Make {
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// The TLS library refuses.
    #[error("can't set up TLS")]
    Tls {
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// Somebody who isn't meant.
    #[error("the fingerprint {fingerprint} isn't one that is trusted here")]
    Stranger {
        /// What its certificate has.
        fingerprint: Fingerprint,
    },
}

/// What a host is recognised by: the first 16 bytes of its certificate's
/// BLAKE3. Short enough to be read out, and nobody finds another certificate
/// to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; FINGERPRINT_BYTES]);

impl Fingerprint {
    /// That of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let mut first = [0; FINGERPRINT_BYTES];
        let hash = blake3::hash(certificate);
        first.copy_from_slice(&hash.as_bytes()[..FINGERPRINT_BYTES]);
        Fingerprint(first)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = self.0.chunks(2).map(|group| {
            let digits = group.iter().map(|byte| format!("{byte:02x}"));
            digits.collect::<String>()
        });
        f.pad(&groups.collect::<Vec<_>>().join("-"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::BadFingerprint {
            text: text.to_owned(),
        };
        let digits: String = text.chars().filter(|&each| each != '-').collect();
        // Rust's parser takes signs as well.
        if digits.len() != 2 * FINGERPRINT_BYTES
            || !digits.bytes().all(|digit| digit.is_ascii_hexdigit())
        {
            return Err(bad());
        }
        let number = u128::from_str_radix(&digits, 16).map_err(|_| bad())?;
        Ok(Fingerprint(number.to_be_bytes()))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

/// This host's key and certificate.
#[derive(Debug, Clone)]
pub struct Identity {
    pair: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
}

impl Identity {
    /// Makes one, and its files in `dir`. The key comes first: a certificate
    /// without its key could be given to peers and be of no use.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if there is one; nothing is replaced.
    pub fn create(dir: &Path, name: &Name) -> Result<Self, Error> {
        let (key_path, certificate_path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        for path in [&key_path, &certificate_path] {
            if path.symlink_metadata().is_ok() {
                return Err(Error::Exists { path: path.clone() });
            }
        }
        let (key, certificate) = make(name).map_err(|source| Error::Make { source })?;
        let write = |path: &PathBuf, text: &str, mode| {
            files::create(path, text.as_bytes(), mode).map_err(|source| match source.kind() {
                ErrorKind::AlreadyExists => Error::Exists { path: path.clone() },
                _ => file_error(path)(source),
            })
        };
        write(&key_path, &key.serialize_pem(), 0o600)?;
        write(&certificate_path, &certificate.pem(), 0o644)?;
        Self::load(dir)?.ok_or_else(|| file_error(&key_path)(ErrorKind::NotFound.into()))
    }

    /// Reads the one in `dir`, if there is one.
    ///
    /// # Errors
    ///
    /// If others may read the key, or the files aren't what was written.
    pub fn load(dir: &Path) -> Result<Option<Self>, Error> {
        let (key_path, certificate_path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        let half = |there: &PathBuf, missing: &PathBuf| Error::Half {
            there: there.clone(),
            missing: missing.clone(),
        };
        let (key, certificate) = match (open(&key_path)?, open(&certificate_path)?) {
            (Some(key), Some(certificate)) => (key, certificate),
            (Some(_), None) => return Err(half(&key_path, &certificate_path)),
            (None, Some(_)) => return Err(half(&certificate_path, &key_path)),
            (None, None) => return Ok(None),
        };
        let facts = key.metadata().map_err(file_error(&key_path))?;
        let owner = rustix::process::geteuid().as_raw();
        if facts.mode() & 0o077 != 0 || ![0, owner].contains(&facts.uid()) {
            return Err(Error::NotSecret { path: key_path });
        }
        let key = PrivateKeyDer::from_pem_slice(&read(&key_path, key)?)
            .map_err(|error| damaged(&key_path, error))?;
        let certificate = CertificateDer::from_pem_slice(&read(&certificate_path, certificate)?)
            .map_err(|error| damaged(&certificate_path, error))?;
        let fingerprint = Fingerprint::of(&certificate);
        // Whether they belong together is checked here.
        let pair = CertifiedKey::from_der(vec![certificate], key, &provider())
            .map_err(|error| damaged(&key_path, error))?;
        Ok(Some(Identity {
            pair: Arc::new(pair),
            fingerprint,
        }))
    }

    /// What peers recognise this host by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

fn make(name: &Name) -> Result<(KeyPair, rcgen::Certificate), rcgen::Error> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    // For whoever looks at the file.
    let subject = &mut parameters.distinguished_name;
    subject.push(DnType::CommonName, format!("xl-vne {name}"));
    let certificate = parameters.self_signed(&key)?;
    Ok((key, certificate))
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path, source }
}

fn damaged(path: &Path, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Damaged {
        path: path.to_owned(),
        source: Box::new(source),
    }
}

fn open(path: &Path) -> Result<Option<File>, Error> {
    match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some).map_err(file_error(path)),
    }
}

fn read(path: &Path, file: File) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    file.take(PEM_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(file_error(path))?;
    Ok(text)
}

/// Decides whether a host with this fingerprint is talked to.
pub type Trusted = Arc<dyn Fn(&Fingerprint) -> bool + Send + Sync>;

/// For the side that is connected to. The handshake fails with clients that
/// have no certificate, or none that is `trusted` at that moment.
///
/// # Errors
///
/// What the TLS library says.
pub fn server_config(identity: &Identity, trusted: Trusted) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(provider());
    let pinned = Arc::new(Pinned::new(&provider, trusted));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| Error::Tls { source })?
        .with_client_cert_verifier(pinned)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.pair.clone())));
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // A session that is resumed shows no certificate, and who is trusted may
    // have changed.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// For the side that connects: to the host with exactly this fingerprint.
///
/// With TLS 1.3 its handshake ends before the server has looked at the
/// client's certificate. Only what the server sends tells that it agrees.
///
/// # Errors
///
/// What the TLS library says.
pub fn client_config(
    identity: &Identity,
    expected: Fingerprint,
) -> Result<Arc<ClientConfig>, Error> {
    let provider = Arc::new(provider());
    let is_it = move |fingerprint: &Fingerprint| *fingerprint == expected;
    let pinned = Arc::new(Pinned::new(&provider, Arc::new(is_it)));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| Error::Tls { source })?
        .dangerous()
        .with_custom_certificate_verifier(pinned)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.pair.clone())));
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// Whom a finished handshake was with: `peer_certificates()` of the connection.
pub fn peer_fingerprint(certificates: Option<&[CertificateDer<'_>]>) -> Option<Fingerprint> {
    certificates?.first().map(Fingerprint::of)
}

/// Why a handshake failed, as an admin can use it.
pub fn explain(error: &io::Error) -> String {
    use rustls::Error::{InvalidCertificate, NoCertificatesPresented};
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(NoCertificatesPresented) => String::from("it has no certificate"),
        Some(InvalidCertificate(CertificateError::Other(OtherError(why)))) => why.to_string(),
        Some(InvalidCertificate(CertificateError::BadSignature)) => {
            String::from("it doesn't have the key of the certificate that it shows")
        }
        _ => error.to_string(),
    }
}

fn provider() -> CryptoProvider {
    rustls::crypto::ring::default_provider()
}

/// Trusts by fingerprint. That the other side has the certificate's key is
/// what the handshake's signature shows.
struct Pinned {
    trusted: Trusted,
    algorithms: rustls::crypto::WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn new(provider: &CryptoProvider, trusted: Trusted) -> Self {
        Self {
            trusted,
            algorithms: provider.signature_verification_algorithms,
        }
    }

    fn look_at(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let fingerprint = Fingerprint::of(certificate);
        if (self.trusted)(&fingerprint) {
            return Ok(());
        }
        let stranger = OtherError(Arc::new(Error::Stranger { fingerprint }));
        Err(CertificateError::Other(stranger).into())
    }

    fn look_at_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned").finish_non_exhaustive()
    }
}

/// The library asks for it, and would never be called: 1.3 is all we speak.
fn refuse_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General(String::from(
        "TLS 1.2 isn't spoken here",
    )))
}

impl ClientCertVerifier for Pinned {
    /// Who is trusted is nobody's business.
    fn root_hint_subjects(&self) -> &[CaName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.look_at(certificate)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.look_at_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.look_at(certificate)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.look_at_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rustls::{ClientConnection, HandshakeKind, ServerConnection};
    use std::fs::{set_permissions, Permissions};
    use std::os::unix::fs::PermissionsExt;

    fn identity() -> Identity {
        let dir = tempfile::tempdir().unwrap();
        Identity::create(dir.path(), &Name::new("alpha").unwrap()).unwrap()
    }

    fn trusting(those: &[&Identity]) -> Trusted {
        let those: Vec<_> = those.iter().map(|one| one.fingerprint()).collect();
        Arc::new(move |one: &Fingerprint| those.contains(one))
    }

    struct Pair {
        client: ClientConnection,
        server: ServerConnection,
    }

    /// Hands over what each says until both are silent; then each side's error.
    fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<Pair, rustls::Error> {
        let name = ServerName::try_from("vned").unwrap();
        let mut pair = Pair {
            client: ClientConnection::new(client, name).unwrap(),
            server: ServerConnection::new(server).unwrap(),
        };
        while pair.client.wants_write() || pair.server.wants_write() {
            let mut wire = Vec::new();
            pair.client.write_tls(&mut wire).unwrap();
            pair.server.read_tls(&mut wire.as_slice()).unwrap();
            let at_server = pair.server.process_new_packets();
            let mut wire = Vec::new();
            pair.server.write_tls(&mut wire).unwrap();
            pair.client.read_tls(&mut wire.as_slice()).unwrap();
            let at_client = pair.client.process_new_packets();
            at_server?;
            at_client?;
        }
        assert!(!pair.client.is_handshaking() && !pair.server.is_handshaking());
        Ok(pair)
    }

    #[test]
    fn two_that_know_each_other_shake_hands() {
        let (alpha, beta) = (identity(), identity());
        let client = client_config(&alpha, beta.fingerprint()).unwrap();
        let server = server_config(&beta, trusting(&[&alpha])).unwrap();
        // The second time as in full as the first.
        for _ in 0..2 {
            let Pair { client, server } = shake(client.clone(), server.clone()).unwrap();
            let to_client = peer_fingerprint(client.peer_certificates());
            let to_server = peer_fingerprint(server.peer_certificates());
            assert_eq!(to_client, Some(beta.fingerprint()));
            assert_eq!(to_server, Some(alpha.fingerprint()));
            assert_eq!(client.alpn_protocol(), Some(PROTOCOL));
            assert_eq!(server.alpn_protocol(), Some(PROTOCOL));
            assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
            assert_eq!(
                client.protocol_version(),
                Some(rustls::ProtocolVersion::TLSv1_3)
            );
            assert_eq!(client.tls13_tickets_received(), 0);
        }
    }

    #[test]
    fn a_stranger_is_refused_by_the_handshake() {
        let (alpha, beta, gamma) = (identity(), identity(), identity());
        let client = client_config(&gamma, beta.fingerprint()).unwrap();
        let server = server_config(&beta, trusting(&[&alpha, &beta])).unwrap();
        let error = shake(client, server).err().unwrap().to_string();
        assert!(error.contains(&gamma.fingerprint().to_string()), "{error}");
    }

    #[test]
    fn a_client_without_a_certificate_is_refused() {
        let (alpha, beta) = (identity(), identity());
        let mut client = (*client_config(&alpha, beta.fingerprint()).unwrap()).clone();
        #[derive(Debug)]
        struct Nothing;
        impl rustls::client::ResolvesClientCert for Nothing {
            fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
                None
            }
            fn has_certs(&self) -> bool {
                false
            }
        }
        client.client_auth_cert_resolver = Arc::new(Nothing);
        let server = server_config(&beta, Arc::new(|_: &Fingerprint| true)).unwrap();
        let refused = shake(Arc::new(client), server).err();
        assert_eq!(refused, Some(rustls::Error::NoCertificatesPresented));
    }

    #[test]
    fn a_server_that_is_not_the_expected_one_is_refused() {
        let (alpha, beta, gamma) = (identity(), identity(), identity());
        let client = client_config(&alpha, beta.fingerprint()).unwrap();
        let server = server_config(&gamma, trusting(&[&alpha])).unwrap();
        let error = shake(client, server).err().unwrap().to_string();
        assert!(error.contains(&gamma.fingerprint().to_string()), "{error}");
    }

    /// `of`'s certificate with another key.
    fn forged(of: &Identity) -> Identity {
        let pair = CertifiedKey::new(of.pair.cert.clone(), identity().pair.key.clone());
        Identity {
            pair: Arc::new(pair),
            fingerprint: of.fingerprint,
        }
    }

    #[test]
    fn a_certificate_without_its_key_is_refused_of_a_client() {
        let (alpha, beta) = (identity(), identity());
        let client = client_config(&forged(&alpha), beta.fingerprint()).unwrap();
        let server = server_config(&beta, trusting(&[&alpha])).unwrap();
        let refused = shake(client, server).err();
        let expected = rustls::Error::InvalidCertificate(CertificateError::BadSignature);
        assert_eq!(refused, Some(expected));
    }

    #[test]
    fn a_certificate_without_its_key_is_refused_of_a_server() {
        let (alpha, beta) = (identity(), identity());
        let client = client_config(&alpha, beta.fingerprint()).unwrap();
        let server = server_config(&forged(&beta), trusting(&[&alpha])).unwrap();
        let refused = shake(client, server).err();
        let expected = rustls::Error::InvalidCertificate(CertificateError::BadSignature);
        assert_eq!(refused, Some(expected));
    }

    #[test]
    fn trust_is_looked_up_at_each_handshake() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let (alpha, beta) = (identity(), identity());
        let still = Arc::new(AtomicBool::new(true));
        let asked = still.clone();
        let trusted: Trusted = Arc::new(move |_| asked.load(Ordering::Relaxed));
        let client = client_config(&alpha, beta.fingerprint()).unwrap();
        let server = server_config(&beta, trusted).unwrap();
        assert!(shake(client.clone(), server.clone()).is_ok());
        still.store(false, Ordering::Relaxed);
        assert!(shake(client, server).is_err());
    }

    #[test]
    fn another_protocol_is_refused() {
        let (alpha, beta) = (identity(), identity());
        let mut client = (*client_config(&alpha, beta.fingerprint()).unwrap()).clone();
        client.alpn_protocols = vec![b"xl-vne/2".to_vec()];
        let server = server_config(&beta, trusting(&[&alpha])).unwrap();
        let refused = shake(Arc::new(client), server).err();
        assert_eq!(refused, Some(rustls::Error::NoApplicationProtocol));
    }

    #[test]
    fn an_identity_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Identity::load(dir.path()).unwrap().is_none());
        let name = Name::new("alpha").unwrap();
        let made = Identity::create(dir.path(), &name).unwrap();
        let read = Identity::load(dir.path()).unwrap().unwrap();
        assert_eq!(made.fingerprint(), read.fingerprint());
        assert_ne!(made.fingerprint(), identity().fingerprint());
        let again = Identity::create(dir.path(), &name).unwrap_err();
        assert!(matches!(again, Error::Exists { .. }), "{again}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Identity::create(dir.path(), &Name::new("alpha").unwrap()).unwrap();
        let key = dir.path().join(KEY_FILE);
        let mode = key.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        for mode in [0o640, 0o604, 0o620, 0o644] {
            set_permissions(&key, Permissions::from_mode(mode)).unwrap();
            let error = Identity::load(dir.path()).unwrap_err();
            assert!(matches!(error, Error::NotSecret { .. }), "{error}");
        }
        set_permissions(&key, Permissions::from_mode(0o400)).unwrap();
        assert!(Identity::load(dir.path()).is_ok());
    }

    #[test]
    fn half_an_identity_is_refused_and_not_completed() {
        for missing in [KEY_FILE, CERTIFICATE_FILE] {
            let dir = tempfile::tempdir().unwrap();
            let name = Name::new("alpha").unwrap();
            Identity::create(dir.path(), &name).unwrap();
            std::fs::remove_file(dir.path().join(missing)).unwrap();
            let error = Identity::load(dir.path()).unwrap_err();
            assert!(matches!(error, Error::Half { .. }), "{error}");
            let error = Identity::create(dir.path(), &name).unwrap_err();
            assert!(matches!(error, Error::Exists { .. }), "{error}");
        }
    }

    #[test]
    fn a_key_of_another_identity_is_refused() {
        let name = Name::new("alpha").unwrap();
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        for dir in &dirs {
            Identity::create(dir.path(), &name).unwrap();
        }
        let [from, to] = dirs.each_ref().map(|dir| dir.path().join(KEY_FILE));
        std::fs::rename(from, to).unwrap();
        let error = Identity::load(dirs[1].path()).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
    }

    #[test]
    fn fingerprints_have_several_spellings() {
        let text = "3f2a-90c1-0000-ffff-1234-5678-9abc-def0";
        let read: Fingerprint = text.parse().unwrap();
        assert_eq!(read.to_string(), text);
        let others = [text.to_uppercase(), text.replace('-', "")];
        for other in others {
            assert_eq!(other.parse::<Fingerprint>().unwrap(), read);
        }
        for bad in ["", "3f2a", &text.replace('f', "g"), &format!("{text}0")] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
        assert!("+0000000000000000000000000000001"
            .parse::<Fingerprint>()
            .is_err());
    }
}
