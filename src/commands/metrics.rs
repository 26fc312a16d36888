//! `status --metrics`: what the nodes have counted, as text that Prometheus reads.

use std::fmt::Write as _;

use serde_json::{Value as Json, json};

use super::status::Heard;
use crate::status::Status;

/// The families of one number for each node: name, type, the field of its status, help.
const FAMILIES: &str = "\
keys gauge keys Keys with a value, counted at each node that has a copy.
tombstones gauge tombstones Keys that were deleted.
memory_used_bytes gauge bytes What keys, values and overhead take.
memory_limit_bytes gauge memory What they may take before sets are refused.
full gauge full 1 while sets are refused for lack of memory.
doubts gauge doubts Parts whose writes may be lost, until they are acknowledged.
connections gauge connections Connections that are open.
connections_accepted_total counter accepted Connections that were accepted.
errors_total counter failed Requests of clients that were answered by an error.
busy_seconds_total counter busy_us Time that the threads of the node were at work, all together.
uptime_seconds gauge uptime_us Time since the start of the node.
";

/// A line of a family: what stands behind the family's name, labels behind the node's, a number.
type Sample = (&'static str, String, String);

/// What these nodes have said.
pub(super) fn text(nodes: &[Heard]) -> String {
    let text = String::new();
    let mut page = Page { nodes, text };
    page.family("up gauge 1 if the node has answered.", |heard| {
        flag(heard.status.is_some())
    });
    page.family("ready gauge 1 if the node is ready.", |heard| {
        flag(heard.state == "ready")
    });
    for family in FAMILIES.lines() {
        let [name, kind, field, help] = words(family);
        page.of_status(&format!("{name} {kind} {help}"), |status| {
            let value = json!(status).get(field).map(|value| number(field, value));
            value.into_iter().map(plain).collect()
        });
    }
    page.of_status("build_info gauge The version that runs.", |status| {
        vec![("", label("version", &status.version), "1".to_owned())]
    });
    let requests = "requests_total counter Answered requests of clients and other nodes.";
    page.of_status(requests, |status| {
        let methods = status.answered.iter();
        let line =
            |(method, count): (&String, &u64)| ("", label("method", method), count.to_string());
        methods.map(line).collect()
    });
    let took = "request_duration_seconds histogram How long requests of clients took in the node.";
    page.of_status(took, histogram);
    page.text
}

struct Page<'a> {
    nodes: &'a [Heard],
    text: String,
}

impl Page<'_> {
    /// Appends a family of this name, type and help.
    fn family(&mut self, of: &str, lines: impl Fn(&Heard) -> Vec<Sample>) {
        let [name, kind, help] = words(of);
        let _ = writeln!(
            self.text,
            "# HELP kv54_{name} {help}\n# TYPE kv54_{name} {kind}"
        );
        for heard in self.nodes {
            for (end, labels, number) in lines(heard) {
                let node = &heard.node.name; // letters, digits, '.', '-' and '_'
                let _ = writeln!(
                    self.text,
                    "kv54_{name}{end}{{node=\"{node}\"{labels}}} {number}"
                );
            }
        }
    }

    /// The same of the nodes that have answered.
    fn of_status(&mut self, of: &str, lines: impl Fn(&Status) -> Vec<Sample>) {
        self.family(of, |heard| {
            heard.status.as_ref().map(&lines).unwrap_or_default()
        });
    }
}

/// Its buckets end at powers of two of a microsecond, from 32 µs to 8.4 s: those of a node end there too.
fn histogram(status: &Status) -> Vec<Sample> {
    let below = |end: u64| {
        let counts = status.waited.range(..=end).map(|(_, count)| *count);
        counts.fold(0, u64::saturating_add).to_string() // a stranger's word may be anything
    };
    let bucket = |end: u64| ("_bucket", label("le", &seconds(end)), below(end));
    let buckets = (5..=23).map(|power| bucket(1 << power));
    let all = below(u64::MAX);
    let ends = [
        ("_bucket", label("le", "+Inf"), all.clone()),
        ("_sum", String::new(), seconds(status.waited_us)),
        ("_count", String::new(), all),
    ];
    buckets.chain(ends).collect()
}

fn plain(number: String) -> Sample {
    ("", String::new(), number)
}

fn flag(truth: bool) -> Vec<Sample> {
    vec![plain(u8::from(truth).to_string())]
}

/// A field of a status as a number.
fn number(field: &str, value: &Json) -> String {
    match value {
        Json::Bool(truth) => u8::from(*truth).to_string(),
        Json::Array(items) => items.len().to_string(),
        us if field.ends_with("_us") => seconds(us.as_u64().unwrap_or_default()),
        number => number.to_string(),
    }
}

/// One more label. JSON writes a plain line of text as Prometheus does.
fn label(name: &str, value: &str) -> String {
    format!(",{name}={}", json!(value))
}

fn seconds(us: u64) -> String {
    format!("{}.{:06}", us / 1_000_000, us % 1_000_000)
}

/// The first words of a line, and then all others.
fn words<const N: usize>(line: &str) -> [&str; N] {
    let mut words = line.splitn(N, ' ');
    [(); N].map(|()| words.next().unwrap_or_default())
}
