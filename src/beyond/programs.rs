//! What a program of one's own needs beside a client: the ring's file, patience, and errors that people can read.
//! `examples/logs.rs`, `examples/queue.rs` and `examples/deploy.rs` are such programs.

use std::error::Error as AnyError;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fmt, process};

use msgpack_rpc::Value;
use tokio::time::sleep;

use crate::client::Client;
use crate::cluster::Cluster;
use crate::entry::Packed;
use crate::error::{Error, Kind, plain};
use crate::replicas::Replicas;
use crate::rpc::tls;

/// How long one operation is tried.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Before it is asked again.
const PAUSE: Duration = Duration::from_millis(200);

/// A client of the ring in `cluster.toml`, or in the file that `KV54_CONFIG` names.
pub fn client() -> Result<Client, Failed> {
    let named = env::var_os("KV54_CONFIG").filter(|path| !path.is_empty());
    let path = named.map_or("cluster.toml".into(), PathBuf::from);
    let cluster = Arc::new(Cluster::read(&path)?);
    let dial = tls::dial(&cluster)?;
    let replicas = Replicas::new(cluster, TIMEOUT, &dial);
    Ok(Client { replicas })
}

/// The name of this host, which is one word: what `HOST` says, or else the machine.
pub fn host() -> String {
    let named = env::var_os("HOST").filter(|name| !name.is_empty());
    let name = named.unwrap_or_else(|| hostname::get().unwrap_or_default());
    plain(name.to_string_lossy().as_bytes()).replace(char::is_whitespace, "-")
}

/// The arguments as text.
pub fn words() -> Vec<String> {
    let words = env::args_os().skip(1);
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect()
}

/// Writes to standard output, and ends the program where nobody reads on, as behind `head`.
pub fn say(what: impl AsRef<[u8]>) -> io::Result<()> {
    match io::stdout().write_all(what.as_ref()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => process::exit(0),
        said => said,
    }
}

/// A value that is text; an absent one, or another one, is none.
pub fn text(value: &Packed) -> String {
    let value = value.value().unwrap_or(Value::Nil);
    value.as_str().unwrap_or_default().to_owned()
}

/// Asks until there is an answer, or a refusal that stands, and says on standard error why it asks again. Only for
/// what may be done twice, since the outcome may have been unknown.
pub async fn again<T>(ask: impl AsyncFn() -> Result<T, Error>) -> Result<T, Error> {
    loop {
        match ask().await {
            // A full node may have room once something has expired.
            Err(error) if !error.kind.is_refusal() || error.kind == Kind::Full => {
                let _ = writeln!(io::stderr(), "waiting: {error}");
            }
            answer => return answer,
        }
        sleep(PAUSE).await;
    }
}

/// Any error, for `main` to return: Rust prints its `Debug`, which is one line that people can read.
pub struct Failed(Box<dyn AnyError>);

impl<E: Into<Box<dyn AnyError>>> From<E> for Failed {
    fn from(error: E) -> Self {
        Failed(error.into())
    }
}

impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&plain(self.0.to_string()))
    }
}
