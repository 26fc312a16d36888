//! What the feature `tls` adds: `rustls` around a connection, on either side of it.

use std::fmt::Display;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use rustls::client::danger::ServerCertVerifier as _;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{
    CertificateDer, DnsName, InvalidDnsNameError, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, Error, InconsistentKeys, RootCertStore, ServerConfig,
};
use tokio::io::AsyncBufRead as _;
use tokio::time::{Instant, timeout};
use tokio_rustls::server::Accept;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::Guard;
use crate::cluster::{Files, Node};
use crate::rpc::serve::close;
use crate::rpc::{Connection, Dial, lock, tcp};

/// The time that the handshake of an accepted connection may take.
const MAX_HANDSHAKE: Duration = Duration::from_secs(10);
/// The time between two warnings: who is turned away tries again many times a second.
const QUIET: Duration = Duration::from_secs(5);

/// Who this host is, and whom it believes.
struct Identity {
    provider: Arc<CryptoProvider>,
    ca: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn read(files: &Files) -> io::Result<Self> {
        let mut ca = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            ca.add(certificate)
                .map_err(|error| invalid(&files.ca, error))?;
        }
        let key = PrivateKeyDer::from_pem_file(&files.key);
        Ok(Identity {
            provider: Arc::new(ring::default_provider()),
            ca: Arc::new(ca),
            chain: certificates(&files.cert)?,
            key: key.map_err(|error| unreadable(&files.key, error, "private key"))?,
        })
    }

    /// Whether others will believe that this is the node of this name: better said here, at the
    /// start, than in the logs of all the others.
    fn check(&self, name: &str) -> Result<(), Error> {
        let verifier =
            WebPkiServerVerifier::builder_with_provider(self.ca.clone(), self.provider.clone());
        let verifier = verifier
            .build()
            .map_err(|e| Error::General(e.to_string()))?;
        let name = server_name(name).map_err(|e| Error::General(e.to_string()))?;
        let (own, between) = self
            .chain
            .split_first()
            .ok_or(Error::NoCertificatesPresented)?;
        verifier.verify_server_cert(own, between, &name, &[], UnixTime::now())?;
        Ok(())
    }
}

pub(super) fn dial(files: &Files) -> io::Result<Dial> {
    let own = Identity::read(files)?;
    let mut config = ClientConfig::builder_with_provider(own.provider)
        .with_safe_default_protocol_versions()
        .and_then(|config| {
            let config = config.with_root_certificates(own.ca);
            config.with_client_auth_cert(own.chain, own.key)
        })
        .map_err(|error| unfit(files, &error))?;
    config.resumption = Resumption::disabled(); // every connection shows both certificates
    let (connector, tcp) = (TlsConnector::from(Arc::new(config)), tcp());
    Ok(Arc::new(move |node: &Node| {
        let (connector, dialled, name) = (connector.clone(), tcp(node), server_name(&node.name));
        Box::pin(async move {
            let (name, stream) = (name.map_err(io::Error::other)?, dialled.await?);
            let mut stream = connector.connect(name, stream).await.map_err(turned_away)?;
            // This side is done before the node has looked at its certificate. The node's first
            // ticket says that it is welcome: before that, an error means that nothing was asked.
            let welcome = poll_fn(|context| {
                let heard = Pin::new(&mut stream)
                    .poll_fill_buf(context)
                    .map_ok(<[u8]>::is_empty);
                match heard {
                    _ if stream.get_ref().1.tls13_tickets_received() > 0 => Poll::Ready(Ok(())),
                    Poll::Ready(Ok(true)) => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                    heard => heard.map_ok(drop),
                }
            });
            welcome.await.map_err(turned_away)?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    }))
}

pub(super) fn guard(files: &Files, name: &str) -> io::Result<Guard> {
    let own = Identity::read(files)?;
    own.check(name)
        .map_err(|error| invalid(&files.cert, error))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(own.ca, own.provider.clone());
    let verifier = verifier
        .build()
        .map_err(|error| invalid(&files.ca, error))?;
    let config = ServerConfig::builder_with_provider(own.provider)
        .with_safe_default_protocol_versions()
        .and_then(|config| {
            let config = config.with_client_cert_verifier(verifier);
            config.with_single_cert(own.chain, own.key)
        })
        .map_err(|error| unfit(files, &error))?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let quiet_until = Arc::new(Mutex::new(Instant::now()));
    Ok(Box::new(move |stream, from| {
        let handshake = acceptor.accept(stream);
        Box::pin(welcome(handshake, from, quiet_until.clone()))
    }))
}

/// Lets a connection in after its handshake. A refused peer gets time to read the alert.
async fn welcome(
    handshake: Accept<Box<dyn Connection>>,
    from: SocketAddr,
    quiet_until: Arc<Mutex<Instant>>,
) -> io::Result<Box<dyn Connection>> {
    let (error, refused) = match timeout(MAX_HANDSHAKE, handshake.into_fallible()).await {
        Ok(Ok(stream)) => return Ok(Box::new(stream)),
        Ok(Err((error, stream))) => (in_words(error), Some(stream)),
        Err(_) => {
            let late = format!("its TLS handshake took more than {MAX_HANDSHAKE:?}");
            (io::Error::other(late), None)
        }
    };
    warn(
        &format!("a connection from {from} is closed: {error}"),
        &quiet_until,
    );
    if let Some(stream) = refused {
        close(stream).await;
    }
    Err(error)
}

fn warn(line: &str, quiet_until: &Mutex<Instant>) {
    let (mut quiet_until, now) = (lock(quiet_until), Instant::now());
    if now < *quiet_until {
        return log::debug!("{line}");
    }
    *quiet_until = now + QUIET;
    log::warn!("{line}");
}

fn server_name(name: &str) -> Result<ServerName<'static>, InvalidDnsNameError> {
    DnsName::try_from(name.to_owned()).map(ServerName::DnsName)
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(none) if none.is_empty() => Err(pem::Error::NoItemsFound),
        read => read,
    }
    .map_err(|error| unreadable(path, error, "certificate"))
}

fn unreadable(path: &Path, error: pem::Error, what: &str) -> io::Error {
    match error {
        pem::Error::Io(error) => invalid(path, error),
        _ => invalid(path, format_args!("there is no {what} in it, as PEM")),
    }
}

fn unfit(files: &Files, error: &Error) -> io::Error {
    match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            let why = format!("it is not the key of {}", files.cert.display());
            invalid(&files.key, why)
        }
        error => invalid(&files.key, error),
    }
}

fn invalid(path: &Path, why: impl Display) -> io::Error {
    io::Error::other(format!("{}: {why}", path.display()))
}

/// What broke a handshake, where the library's own words would puzzle a person.
fn in_words(error: io::Error) -> io::Error {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    let why = match cause {
        Some(Error::InvalidMessage(_)) => "it does not speak TLS".to_owned(),
        Some(Error::NoCertificatesPresented) => "it shows no certificate".to_owned(),
        // The same issuer's name with another key is what a ca made anew looks like.
        Some(Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        )) => "its certificate is not signed by the ca of [tls]".to_owned(),
        Some(Error::AlertReceived(alert)) => format!("it refused the TLS handshake: {alert:?}"),
        Some(other) => other.to_string(),
        None => return error,
    };
    io::Error::other(why)
}

/// The same for whoever has dialled.
fn turned_away(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            io::Error::other("it broke off the TLS handshake, as a node without [tls] does")
        }
        _ => in_words(error),
    }
}
