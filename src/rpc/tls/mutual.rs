//! What the feature `tls` adds: `rustls` around a connection, on either side of it.

use std::error;
use std::fmt::Display;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures::TryFutureExt as _;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, DnsName, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, ClientConfig, Error, InconsistentKeys};
use rustls::{RootCertStore, ServerConfig};
use tokio::io::AsyncBufRead as _;
use tokio::time::timeout;
use tokio_rustls::server::Accept;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::Guard;
use crate::cluster::Files;
use crate::rpc::serve::close;
use crate::rpc::{Connecting, Connection, Dial, Rarely, tcp};

/// The time that the handshake of an accepted connection may take.
const MAX_HANDSHAKE: Duration = Duration::from_secs(10);

/// What this host shows to its peers, and the `ca` that must have signed what they show.
struct Identity {
    ca: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn read(files: &Files) -> io::Result<Self> {
        // If the program has chosen its cryptography already, this changes nothing.
        let _ = ring::default_provider().install_default();
        let mut ca = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            ca.add(certificate)
                .map_err(|error| invalid(&files.ca, error))?;
        }
        let key = PrivateKeyDer::from_pem_file(&files.key);
        Ok(Identity {
            ca: Arc::new(ca),
            chain: certificates(&files.cert)?,
            key: key.map_err(|error| unreadable(&files.key, error, "private key"))?,
        })
    }

    /// Whether peers will believe that this is the node of this name. An error at the start of
    /// this node is easier to find than errors in the logs of all the others.
    fn check(&self, name: &str) -> Result<(), Box<dyn error::Error>> {
        let verifier = WebPkiServerVerifier::builder(self.ca.clone()).build()?;
        let (name, chain) = (server_name(name)?, self.chain.split_first());
        let (own, between) = chain.ok_or(Error::NoCertificatesPresented)?;
        verifier.verify_server_cert(own, between, &name, &[], UnixTime::now())?;
        Ok(())
    }
}

pub(super) fn dial(files: &Files) -> io::Result<Dial> {
    let own = Identity::read(files)?;
    let mut config = ClientConfig::builder()
        .with_root_certificates(own.ca)
        .with_client_auth_cert(own.chain, own.key)
        .map_err(|error| unfit(files, &error))?;
    config.resumption = Resumption::disabled(); // every connection shows both certificates
    let (connector, tcp) = (TlsConnector::from(Arc::new(config)), tcp());
    Ok(Arc::new(move |node| {
        let name = server_name(&node.name);
        Box::pin(connect(connector.clone(), name, tcp(node)).map_err(in_words))
    }))
}

async fn connect(
    connector: TlsConnector,
    name: io::Result<ServerName<'static>>,
    dialled: Connecting,
) -> io::Result<Box<dyn Connection>> {
    let mut stream = connector.connect(name?, dialled.await?).await?;
    // Here the node has not yet looked at this side's certificate. It sends its first ticket
    // after that: an error before the ticket means that it refuses this side.
    let accepted = poll_fn(|context| {
        let ended = Pin::new(&mut stream)
            .poll_fill_buf(context)
            .map_ok(<[u8]>::is_empty);
        match (stream.get_ref().1.tls13_tickets_received(), ended) {
            (1.., _) => Poll::Ready(Ok(())),
            (0, Poll::Ready(Ok(true))) => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            (0, read) => read.map_ok(drop),
        }
    });
    accepted.await?;
    Ok(Box::new(stream))
}

pub(super) fn guard(files: &Files, name: &str) -> io::Result<Guard> {
    let own = Identity::read(files)?;
    own.check(name)
        .map_err(|error| invalid(&files.cert, error))?;
    let verifier = WebPkiClientVerifier::builder(own.ca)
        .build()
        .map_err(|error| invalid(&files.ca, error))?;
    let config = ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(own.chain, own.key)
        .map_err(|error| unfit(files, &error))?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let refused = Arc::new(Rarely::every(Duration::from_secs(5)));
    Ok(Arc::new(move |stream, from| {
        Box::pin(accept(acceptor.accept(stream), from, refused.clone()))
    }))
}

/// Waits for the handshake of an accepted connection.
async fn accept(
    handshake: Accept<Box<dyn Connection>>,
    from: SocketAddr,
    warned: Arc<Rarely>,
) -> io::Result<Box<dyn Connection>> {
    let (error, refused) = match timeout(MAX_HANDSHAKE, handshake.into_fallible()).await {
        Ok(Ok(stream)) => return Ok(Box::new(stream)),
        Ok(Err((error, stream))) => (in_words(error), Some(stream)),
        Err(_) => {
            let late = format!("its TLS handshake took more than {MAX_HANDSHAKE:?}");
            (io::Error::other(late), None)
        }
    };
    warned.warn(&format!("a connection from {from} is closed: {error}"));
    if let Some(stream) = refused {
        close(stream).await; // the peer has time to read the alert, which says why
    }
    Err(error)
}

fn server_name(name: &str) -> io::Result<ServerName<'static>> {
    let name = DnsName::try_from(name.to_owned()).map_err(io::Error::other)?;
    Ok(ServerName::DnsName(name))
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

/// A certificate and a key that are not used together.
fn unfit(files: &Files, error: &Error) -> io::Error {
    let why = match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            format!("it is not the key of {}", files.cert.display())
        }
        error => error.to_string(),
    };
    invalid(&files.key, why)
}

fn invalid(path: &Path, why: impl Display) -> io::Error {
    io::Error::other(format!("{}: {why}", path.display()))
}

/// Says in plain words what broke a handshake, where the words of `rustls` would puzzle a person.
fn in_words(error: io::Error) -> io::Error {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    io::Error::other(match cause {
        Some(Error::InvalidMessage(_)) => "it does not speak TLS".to_owned(),
        Some(Error::NoCertificatesPresented) => "it shows no certificate".to_owned(),
        // A ca that was made anew has the same name and another key: its signature is bad.
        Some(Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        )) => "its certificate is not signed by the ca of [tls]".to_owned(),
        Some(Error::AlertReceived(alert)) => format!("it refused the TLS handshake: {alert:?}"),
        _ if error.kind() == io::ErrorKind::UnexpectedEof => {
            "it broke off the TLS handshake, as a program without [tls] does".to_owned()
        }
        _ => return error,
    })
}
