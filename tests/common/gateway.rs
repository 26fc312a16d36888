//! A gateway for memcached's clients, and connections to it with nothing but bytes on them.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::{Cluster, Node};

/// A gateway that says nothing for so long has forgotten somebody.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A gateway, and where it listens.
pub struct Gateway {
    pub node: Node,
    pub address: String,
}

/// A connection to it.
pub struct Client {
    pub stream: BufReader<TcpStream>,
}

impl Gateway {
    pub fn of(cluster: &Cluster, args: &[&str]) -> Gateway {
        let node = cluster.spawn([&["memcached", "--listen", "127.0.0.1:0"], args].concat());
        let line = node.wait_for("listening on ");
        let address = line.rsplit(' ').next().unwrap().to_owned();
        Gateway { node, address }
    }

    /// The most memory that it has had, in KiB.
    pub fn peak(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.node.pid())).unwrap();
        let mut lines = status.lines();
        let peak = lines.find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub fn client(&self) -> Client {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let stream = BufReader::new(stream);
        Client { stream }
    }
}

impl Client {
    /// Sends each request, and hears its answer.
    #[track_caller]
    pub fn plays(&mut self, story: &[(&str, &str)]) {
        for (request, answer) in story {
            self.sends(request);
            self.hears(answer);
        }
    }

    pub fn sends(&mut self, request: &str) {
        self.stream.get_mut().write_all(request.as_bytes()).unwrap();
    }

    #[track_caller]
    pub fn hears(&mut self, answer: &str) {
        let mut heard = vec![0; answer.len()];
        let mut length = 0;
        while length < heard.len() {
            match self.stream.read(&mut heard[length..]) {
                Ok(count @ 1..) => length += count,
                end => panic!("{end:?} after {:?}", text(&heard[..length])),
            }
            let same = answer.as_bytes().starts_with(&heard[..length]);
            assert!(
                same,
                "{:?} came, not {:?}",
                text(&heard[..length]),
                text(answer.as_bytes())
            );
        }
    }

    /// A line, without its end.
    #[track_caller]
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line.strip_suffix("\r\n").unwrap().to_owned()
    }

    /// Sends a request, and hears all of its answer.
    #[track_caller]
    pub fn asks(&mut self, request: &str) -> String {
        self.sends(&format!("{request}mn\r\n"));
        let mut said = String::new();
        loop {
            match self.line() {
                end if end == "MN" => return said,
                line => said += &(line + "\r\n"),
            }
        }
    }

    #[track_caller]
    pub fn unique(&mut self, key: &str) -> u64 {
        let said = self.asks(&format!("gets {key}\r\n"));
        let line = said.lines().next().unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// All that comes until the gateway closes the connection.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
        self.stream.get_ref().shutdown(Shutdown::Both).ok();
        rest
    }
}

/// As much of this as one can read.
fn text(bytes: &[u8]) -> String {
    let end = bytes.len().min(300);
    String::from_utf8_lossy(&bytes[bytes.len() - end..]).into_owned()
}
