//! What a node counts, and who looks at it: `status`, `top` and Prometheus.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::float_cmp, // what Prometheus reads are whole numbers, written as floats
)]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::wire::{PATIENCE, Wire, request};
use common::{Cluster, Said, block_on, kill};
use futures::stream;
use kv54::cluster::Limits;
use kv54::error::Error;
use kv54::rpc::codec::encode;
use kv54::rpc::{self, Answer, Meter, Service, connected, serve_counted};
use kv54::status::Status;
use serde_json::Value as Json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

const THREE: [&str; 3] = ["alice", "bob", "carol"];
/// The screen that `top` paints on begins with the first, and ends with the second.
const SCREEN: [&str; 2] = ["\x1b[?1049h", "\x1b[?1049l"];

#[test]
fn every_answer_is_counted_once_at_the_node_that_gave_it() {
    let cluster = Cluster::running(&THREE);
    let mut alice = Wire::to(&cluster, "alice");
    let others = || ["bob", "carol"].map(|name| status(&mut Wire::to(&cluster, name)));
    let loads = |nodes: &[Status; 2]| nodes.iter().map(|node| node.answered["load"]).sum::<u64>();
    let (before, asked) = (status(&mut alice), loads(&others()));
    for n in 0..70 {
        alice.does("set", [format!("key{n}").into(), n.into()]);
    }
    alice.does("delete", ["key1".into()]);
    alice.does("cas", ["tea".into(), common::wire::NIL, "green".into()]);
    alice.does("cas", ["tea".into(), "white".into(), "black".into()]);
    alice.does("incr", ["cups".into()]);
    let gets = (0..1000).map(|n| request(n, "get", [format!("key{}", n % 70).into()]));
    alice.send(&gets.collect::<Vec<_>>().concat());
    assert_eq!(alice.answers(1000).len(), 1000);
    alice.refuses("get", [], &["bad-request: "]);
    alice.refuses("incr", ["tea".into()], &["bad-request: "]);
    alice.refuses("steep", ["tea".into()], &["no-such-method: "]);
    let after = status(&mut alice);
    let grown = |method: &str| after.answered[method] - before.answered[method];
    for (method, count) in [
        ("get", 1001),
        ("set", 70),
        ("delete", 1),
        ("cas", 2),
        ("incr", 2),
        ("status", 1),
    ] {
        assert_eq!(grown(method), count, "{method}: {after:?}");
    }
    assert_eq!(after.failed - before.failed, 2, "steep is no method");
    let waited = |status: &Status| status.waited.values().sum::<u64>();
    assert_eq!(waited(&after) - waited(&before), 1076, "{after:?}");
    assert!(after.waited_us > before.waited_us);
    assert!(after.uptime_us > before.uptime_us && after.busy_us > before.busy_us);
    assert!(after.busy_us <= after.uptime_us, "it has one thread");

    // The others were asked as replicas, and had no guests.
    let others = others();
    for node in &others {
        assert_eq!((node.answered["get"], node.failed), (0, 0), "{node:?}");
        assert!(node.waited.is_empty(), "{node:?}");
    }
    assert!(loads(&others) > asked + 100, "{others:?}");
}

#[test]
fn connections_are_counted_until_they_end() {
    let cluster = Cluster::running(&["alice"]);
    let mut alice = Wire::to(&cluster, "alice");
    let before = status(&mut alice);
    let mut guests: Vec<Wire> = (0..10).map(|_| Wire::to(&cluster, "alice")).collect();
    for guest in &mut guests {
        guest.greets().unwrap().unwrap();
    }
    let during = status(&mut alice);
    assert_eq!(during.connections, before.connections + 10);
    assert_eq!(during.accepted, before.accepted + 10);
    drop(guests);
    let deadline = Instant::now() + PATIENCE;
    while status(&mut alice).connections > before.connections {
        assert!(Instant::now() < deadline, "{:?}", status(&mut alice));
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(status(&mut alice).accepted, during.accepted);
}

/// A service for which time goes by only while somebody waits for it.
struct Sleeper;

impl Service for Sleeper {
    async fn answer(&self, _: &str, params: &[&[u8]]) -> Result<Answer, Error> {
        let ms = kv54::rpc::codec::number(params[0]).unwrap();
        tokio::time::sleep(Duration::from_millis(ms)).await;
        Ok(().into())
    }
}

#[test]
fn each_latency_is_in_its_bucket_and_none_is_wider_than_an_eighth() {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let mut waits: Vec<u64> = (0..60)
        .chain((2..20).flat_map(|n| [(1 << n) - 1, 1 << n]))
        .collect();
    waits.extend([0, 0, 1 << 24]); // four hours and more
    runtime.block_on(async {
        let (mut guest, far) = tokio::io::duplex(1 << 20);
        let incoming = stream::iter([Ok(connected(Box::new(far)))]);
        let (incoming, meter) = (rpc::admit(incoming, Limits::default), Meter::default());
        let stop = CancellationToken::new();
        let ask = async {
            for ms in &waits {
                // Both came together, and the second is answered after the first.
                let one = [
                    request(1, "get", [(*ms).into()]),
                    request(2, "load", [(*ms).into()]),
                ];
                guest.write_all(&one.concat()).await.unwrap();
                guest.read_exact(&mut [0; 2 * 9]).await.unwrap();
            }
        };
        tokio::select! {
            () = serve_counted(incoming, &Sleeper, &meter, stop) => panic!("it serves on"),
            () = ask => {}
        }
        let told: Vec<(u64, u64)> = meter.waited().collect();
        let last = told.last().unwrap().0;
        for ms in &waits {
            let us = ms * 1000;
            let (end, _) = *told.iter().find(|(end, _)| us < *end).unwrap_or(&(last, 0));
            assert!(
                end == last || end - us <= us / 8 + 1,
                "{ms} ms is in the bucket that ends at {end} µs"
            );
        }
        for (end, count) in &told {
            let begin = told
                .iter()
                .map(|(end, _)| *end)
                .filter(|before| before < end)
                .max();
            let here = |ms: &&u64| {
                (begin.unwrap_or(0)..*end).contains(&(*ms * 1000))
                    || *end == last && *ms * 1000 >= last
            };
            assert_eq!(
                *count,
                waits.iter().filter(here).count() as u64,
                "below {end} µs"
            );
        }
        assert_eq!(meter.waited_us(), waits.iter().sum::<u64>() * 1000);
    });
}

/// A node that says of itself what is in the script, and then the last of it again and again.
struct Pretender(Vec<Status>, AtomicUsize);

impl Service for Pretender {
    async fn answer(&self, method: &str, params: &[&[u8]]) -> Result<Answer, Error> {
        match method {
            "status" => {
                let next = self.1.fetch_add(1, Relaxed).min(self.0.len() - 1);
                Ok(self.0[next].clone().into())
            }
            _ => Err(Error::not_a_request(method, params.len())),
        }
    }
}

#[test]
fn rates_are_differences_and_never_below_zero_whatever_a_node_says() {
    let cluster = Cluster::of(&["alice"]);
    let ring = cluster.ring().fingerprint("alice");
    let says = |seconds: u64, answered: &[(&str, u64)], waited: &[(u64, u64)]| Status {
        name: "alice".to_owned(),
        state: "ready".to_owned(),
        ring,
        uptime_us: seconds * 1_000_000,
        busy_us: seconds * 250_000,
        start_id: 1,
        connections: 7,
        memory: 1 << 30,
        answered: answered
            .iter()
            .map(|(method, count)| ((*method).to_owned(), *count))
            .collect(),
        waited: waited.iter().copied().collect(),
        ..Status::default()
    };
    let begun = says(1, &[("get", 100), ("load", 7)], &[(96, 10), (104, 5)]);
    let busy = [
        ("get", 300),
        ("set", 10),
        ("delete", 5),
        ("cas", 3),
        ("incr", 2),
        ("load", 37),
        ("store", 5),
        ("scan", 3),
        ("promise", 1),
        ("swap", 1),
        ("status", 99),
    ];
    let busy = says(3, &busy, &[(96, 10), (104, 55), (208, 49), (4096, 1)]);
    let (fewer, mut another) = (says(4, &[], &[]), says(100, &[("get", 1 << 40)], &[(1, 1)]));
    another.start_id = 2;
    let most = Status {
        uptime_us: u64::MAX,
        busy_us: u64::MAX,
        answered: busy
            .answered
            .keys()
            .map(|method| (method.clone(), u64::MAX))
            .collect(),
        waited: [(1, u64::MAX), (u64::MAX, u64::MAX)].into(),
        ..another.clone()
    };
    let older = Status {
        uptime_us: 0,
        start_id: 0,
        ..says(0, &[], &[])
    };
    let told = top_of(
        &cluster,
        vec![begun, busy, fewer, another, most, older.clone(), older],
    );
    let rates = ["gets_per_s", "sets_per_s", "calls_per_s", "busy"];
    let figures = |at: usize| rates.map(|name| told[at][name].as_f64());
    assert_eq!(
        figures(0),
        [100.0, 10.0, 20.0, 0.25].map(Some),
        "{}",
        told[0]
    );
    assert_eq!([&told[0]["p50_us"], &told[0]["p99_us"]], [104, 208]);
    assert_eq!([&told[0]["connections"], &told[0]["memory"]], [7, 1 << 30]);
    assert_eq!(
        figures(1),
        [0.0, 0.0, 0.0, 0.25].map(Some),
        "it has lost its count: {}",
        told[1]
    );
    assert_eq!(told[1]["p50_us"], Json::Null);
    assert_eq!(figures(2), [None; 4], "it has started anew: {}", told[2]);
    let [gets, sets, calls, share] = figures(3).map(Option::unwrap);
    assert!(
        gets >= 0.0 && sets >= 0.0 && calls >= 0.0 && share >= 0.0,
        "{}",
        told[3]
    );
    assert_eq!(figures(4), [None; 4], "it has started anew: {}", told[4]);
    assert_eq!(figures(5), [None; 4], "it does not count: {}", told[5]);
    assert_eq!(told[5]["state"], "ready");
}

#[test]
fn a_node_that_dies_and_comes_back_shows_why_and_then_counts_anew() {
    let mut cluster = Cluster::running(&THREE);
    let top = cluster
        .command()
        .args(["top", "--json", "--interval", "100ms"])
        .stdout(Stdio::piped())
        .spawn();
    let mut top = Top::new(top.unwrap());
    let mut alice = Wire::to(&cluster, "alice");
    let of = |name: &str, line: &Json| line["name"] == name;
    top.until(|line| {
        alice.does("get", ["tea".into()]);
        of("alice", line) && line["gets_per_s"].as_f64() > Some(0.0)
    });
    let bob = top.until(|line| of("bob", line) && line["gets_per_s"].is_f64());
    assert_eq!(bob["gets_per_s"], 0.0, "{bob}");

    cluster.kill("bob");
    let refuses = |line: &Json| line["remark"].to_string().contains("connection refused");
    let bob = top.until(|line| of("bob", line) && line["state"] == "down" && refuses(line));
    for field in [
        "keys",
        "bytes",
        "connections",
        "gets_per_s",
        "calls_per_s",
        "p50_us",
        "busy",
    ] {
        assert_eq!(bob[field], Json::Null, "{bob}");
    }
    cluster.start("bob");
    let bob = top.until(|line| of("bob", line) && line["state"] != "down");
    assert_eq!(
        bob["gets_per_s"],
        Json::Null,
        "nothing to compare it with: {bob}"
    );
    top.until(|line| of("bob", line) && line["state"] == "ready" && line["calls_per_s"].is_f64());
    for line in &top.seen {
        let rates = ["gets_per_s", "sets_per_s", "calls_per_s", "busy"];
        let rates = rates.map(|name| line[name].as_f64());
        assert!(rates.iter().flatten().all(|rate| *rate >= 0.0), "{line}");
    }
    kill("TERM", top.child.id());
    assert_eq!(top.child.wait().unwrap().code(), Some(0));
}

#[test]
fn without_a_terminal_it_prints_lines() {
    let mut cluster = Cluster::running(&THREE);
    cluster.kill("carol");
    let said = cluster
        .kv54(["top", "--interval", "100ms", "--count", "2"])
        .exits(0);
    let lines: Vec<Vec<&str>> = said
        .text()
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let firsts: Vec<&str> = lines.iter().map(|line| line[1]).collect();
    assert_eq!(
        firsts,
        ["node", "alice", "bob", "carol", "alice", "bob", "carol"],
        "{said:?}"
    );
    for line in &lines[1..] {
        humantime::parse_rfc3339(line[0]).unwrap();
    }
    assert_eq!(lines[1][2..5], ["ready", "0", "0"], "{said:?}");
    assert!(
        lines[3]
            .join(" ")
            .ends_with("down - - - - - - - - - connection refused"),
        "{said:?}"
    );
    assert!(!said.text().contains('\x1b'), "{said:?}");

    // A reader that has read enough ends it.
    let kv54 = env!("CARGO_BIN_EXE_kv54");
    let line = format!("{kv54} top --interval 100ms | head -1; echo ${{PIPESTATUS[0]}}");
    let mut bash = Command::new("timeout");
    bash.current_dir(&cluster.dir)
        .args(["30", "bash", "-c", &line]);
    let said = String::from_utf8(bash.output().unwrap().stdout).unwrap();
    assert!(
        said.starts_with("time ") && said.ends_with("\n0\n"),
        "{said}"
    );

    for (wrong, why) in [
        (&["top", "--interval", "0s"][..], "at least 100ms"),
        (&["top", "--count", "0"], "'0'"),
        (&["status", "--metrics", "--json"], "cannot be used with"),
    ] {
        cluster.kv54(wrong).exits(2).says(&[why]);
    }
}

#[test]
fn on_a_terminal_it_paints_until_q_ctrl_c_or_a_signal_and_leaves_everything_as_it_was() {
    let mut cluster = Cluster::running(&THREE);
    cluster.kill("carol");
    for end in ["q", "\x03", "TERM"] {
        let Some(mut terminal) = Terminal::with(&cluster, "top --interval 100ms") else {
            return; // a machine without `script`
        };
        terminal.until(|shown| shown.matches("\x1b[H").count() > 3);
        match end {
            "TERM" => kill("TERM", Terminal::pid(&cluster)),
            key => terminal.keys.write_all(key.as_bytes()).unwrap(),
        }
        let shown = terminal.until(|shown| shown.contains(" then\r\n"));
        let (before, shown) = shown.split_once(SCREEN[0]).unwrap();
        let (painted, after) = shown.split_once(SCREEN[1]).unwrap();
        let [was, is] =
            [before, after].map(|text| text.lines().find(|line| line.contains(':')).unwrap());
        assert_eq!(was, is, "{end:?}");
        assert!(after.contains("code 0"), "{end:?}: {after}");
        assert_eq!(shown.matches("\x1b[?25h").count(), 1, "a cursor");
        assert!(
            !painted.contains("^C") && !after.contains(SCREEN[0]),
            "{shown:?}"
        );
        for frame in painted.split("\x1b[H").skip(1) {
            let frame = anstream::adapter::strip_str(frame).to_string();
            let lines: Vec<&str> = frame.trim_end().lines().collect();
            assert_eq!(lines.len(), 5, "{frame}");
            let widths: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
            assert!(widths.iter().all(|width| *width <= 40), "{frame}");
            assert_eq!(widths[0], 40, "{frame}");
            assert!(
                lines[1].starts_with("alice  ready") && lines[3].starts_with("carol  down "),
                "{frame}"
            );
            assert!(lines[4].ends_with("q ends"), "{frame}");
        }
    }
}

#[test]
fn prometheus_reads_the_same_counters() {
    let mut cluster = Cluster::running(&THREE);
    let mut alice = Wire::to(&cluster, "alice");
    for n in 0..40 {
        alice.does("set", ["tea".into(), n.into()]);
        alice.does("get", ["tea".into()]);
    }
    alice.refuses("get", [], &["bad-request: "]);
    cluster.kill("carol");
    let page = Metrics::read(cluster.kv54(["status", "--metrics"]).exits(0).text());
    let json = cluster.kv54(["status", "--json"]).exits(3).json();
    for (name, kind) in &page.kinds {
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name} {kind}");
        assert!(
            ["counter", "gauge", "histogram"].contains(&&**kind),
            "{name} {kind}"
        );
        assert!(
            name.starts_with("kv54_") && !page.of(name).is_empty(),
            "{name}"
        );
    }
    assert_eq!(page.number("kv54_up{node=\"alice\"}"), 1.0);
    assert_eq!(page.number("kv54_up{node=\"carol\"}"), 0.0);
    assert_eq!(page.number("kv54_ready{node=\"carol\"}"), 0.0);
    assert_eq!(page.of("kv54_keys").len(), 2, "carol has said nothing");
    let told = &json["nodes"][0];
    for (name, field) in [
        ("kv54_keys", "keys"),
        ("kv54_memory_used_bytes", "bytes"),
        ("kv54_memory_limit_bytes", "memory"),
        ("kv54_errors_total", "failed"),
    ] {
        let number = page.number(&format!("{name}{{node=\"alice\"}}"));
        assert_eq!(Some(number), told[field].as_f64(), "{name}");
    }
    assert_eq!(page.number("kv54_errors_total{node=\"alice\"}"), 1.0);
    assert_eq!(
        page.number("kv54_requests_total{node=\"alice\",method=\"get\"}"),
        41.0
    );
    assert_eq!(
        page.number("kv54_requests_total{node=\"alice\",method=\"set\"}"),
        40.0
    );
    for node in ["alice", "bob"] {
        let family = "kv54_request_duration_seconds";
        let buckets = page.of(&format!("{family}_bucket{{node={node:?},le="));
        let bounds: Vec<f64> = buckets
            .iter()
            .map(|(line, _)| line.split('"').nth(3).unwrap().parse().unwrap())
            .collect();
        let counts: Vec<f64> = buckets.iter().map(|(_, count)| *count).collect();
        assert!(bounds.is_sorted() && counts.is_sorted(), "{buckets:?}");
        assert_eq!(
            (bounds[0], bounds[1], bounds.last()),
            (32e-6, 64e-6, Some(&f64::INFINITY))
        );
        let [count, sum] =
            ["count", "sum"].map(|end| page.number(&format!("{family}_{end}{{node={node:?}}}")));
        assert_eq!(counts.last(), Some(&count));
        let (guests, sum_of) = if node == "alice" {
            (81.0, sum > 0.0)
        } else {
            (0.0, sum == 0.0)
        };
        assert!(count == guests && sum_of, "{node}: {count} in {sum} s");
        let seconds = bounds
            .windows(2)
            .zip(counts.windows(2))
            .map(|(bounds, counts)| bounds[0] * (counts[1] - counts[0]));
        assert!(
            seconds.sum::<f64>() <= sum,
            "{node}: no less than where the buckets begin"
        );
    }
}

/// What the timer of `deploy/` runs, in a directory of this test.
#[test]
fn the_timer_replaces_the_file_as_a_whole() {
    let cluster = Cluster::running(&["alice"]);
    let unit = std::fs::read_to_string("deploy/kv54-metrics.service").unwrap();
    let line = |name: &str| {
        unit.lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap()
    };
    let shell = line("ExecStart=/bin/sh -c '").trim_end_matches('\'');
    let shell = shell.replace("/usr/local/bin/kv54", env!("CARGO_BIN_EXE_kv54"));
    let run = |config: &str| {
        let line = shell.replace("/etc/kv54/cluster.toml", config);
        Command::new("sh")
            .args(["-c", &line])
            .current_dir(&cluster.dir)
            .output()
            .unwrap()
    };
    let files = || {
        let names = std::fs::read_dir(&cluster.dir).unwrap();
        let names = names.map(|file| file.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| name.contains(".prom"))
            .collect::<Vec<_>>()
    };
    assert!(run("cluster.toml").status.success());
    assert_eq!(files(), ["kv54.prom"]);
    let text = std::fs::read_to_string(cluster.dir.join("kv54.prom")).unwrap();
    assert_eq!(
        Metrics::read(&text).number("kv54_ready{node=\"alice\"}"),
        1.0
    );
    // A failure leaves the file as it is.
    assert!(!run("none.toml").status.success());
    assert_eq!(
        std::fs::read_to_string(cluster.dir.join("kv54.prom")).unwrap(),
        text
    );
}

fn status(wire: &mut Wire) -> Status {
    Status::read(&encode(&wire.does("status", []))).unwrap()
}

/// What `top` prints of a node that says this, one after the other.
fn top_of(cluster: &Cluster, script: Vec<Status>) -> Vec<Json> {
    let count = (script.len() - 1).to_string();
    let top = ["top", "--json", "--interval", "100ms", "--count", &count];
    let said = told_of(cluster, script, &top).exits(0);
    let lines = said.text().lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// What a command says of a node that says this, one after the other.
fn told_of(cluster: &Cluster, script: Vec<Status>, command: &[&str]) -> Said {
    let stop = CancellationToken::new();
    let (ends, address) = (stop.clone(), cluster.address("alice"));
    let (ready, is_ready) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            block_on(async {
                let listener = tokio::net::TcpListener::bind(address).await.unwrap();
                let incoming = rpc::incoming(&listener, |stream, _| connected(stream));
                ready.send(()).unwrap();
                let node = Pretender(script, AtomicUsize::new(0));
                rpc::serve(incoming, &node, Limits::default, ends).await;
            });
        });
        is_ready.recv_timeout(PATIENCE).unwrap();
        let said = cluster.kv54(command);
        stop.cancel();
        said
    })
}

#[test]
fn a_ring_that_moves_on_while_it_is_asked_is_no_other_ring() {
    let cluster = Cluster::of(&["alice"]);
    let of_ring = |ring| Status {
        name: "alice".to_owned(),
        state: "ready".to_owned(),
        ring,
        ..Status::default()
    };
    let own = cluster.ring().fingerprint("alice");
    told_of(&cluster, vec![of_ring(1), of_ring(own)], &["status"]).exits(0);
    let said = told_of(&cluster, vec![of_ring(1)], &["status"]).exits(3);
    assert!(said.text().contains("wrong-ring"), "{said:?}");
}

/// A running `top --json`, and every line that was read from it.
struct Top {
    child: Child,
    lines: mpsc::Receiver<String>,
    seen: Vec<Json>,
}

impl Top {
    fn new(mut child: Child) -> Top {
        let (send, lines) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            out.lines()
                .map_while(Result::ok)
                .all(|line| send.send(line).is_ok())
        });
        Top {
            child,
            lines,
            seen: Vec::new(),
        }
    }

    /// Reads on to a line like this.
    fn until(&mut self, mut wanted: impl FnMut(&Json) -> bool) -> Json {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "{:#?}", self.seen.last());
            let line = self.lines.recv_timeout(PATIENCE).unwrap();
            let line: Json = serde_json::from_str(&line).unwrap();
            self.seen.push(line.clone());
            if wanted(&line) {
                return line;
            }
        }
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command on a terminal of 40 columns and 6 rows, between two looks at its settings.
struct Terminal {
    script: Child,
    keys: std::process::ChildStdin,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn with(cluster: &Cluster, command: &str) -> Option<Terminal> {
        let kv54 = env!("CARGO_BIN_EXE_kv54");
        let line = format!(
            "stty rows 6 cols 40; stty -g; sh -c 'echo $$ > pid; exec {kv54} {command}'; echo code $?; stty -g; echo and then"
        );
        let mut script = Command::new("script");
        script
            .current_dir(&cluster.dir)
            .env("SHELL", "/bin/bash")
            .env("TERM", "xterm");
        script
            .args(["-qec", &line, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut script = script.spawn().ok()?;
        let (keys, mut out) = (script.stdin.take()?, script.stdout.take()?);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let growing = shown.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut bytes) {
                growing.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Some(Terminal {
            script,
            keys,
            shown,
        })
    }

    /// Waits until what was shown is like this, and gives it back.
    fn until(&self, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned();
            if wanted(&shown) {
                return shown;
            }
            assert!(Instant::now() < deadline, "{shown:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn pid(cluster: &Cluster) -> u32 {
        let pid = std::fs::read_to_string(cluster.dir.join("pid")).unwrap();
        pid.trim().parse().unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

/// A page for Prometheus, as far as a program must understand it that reads it.
struct Metrics {
    kinds: BTreeMap<String, String>,
    samples: Vec<(String, f64)>,
}

impl Metrics {
    fn read(text: &str) -> Metrics {
        assert!(text.ends_with('\n'));
        let (mut kinds, mut samples, mut last) = (BTreeMap::new(), Vec::new(), String::new());
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["#", "HELP", name, _, ..] => name.clone_into(&mut last),
                ["#", "TYPE", name, kind] => {
                    assert_eq!(name, last, "behind its HELP");
                    assert_eq!(kinds.insert(name.to_owned(), kind.to_owned()), None, "once");
                }
                [sample, number] => {
                    let (name, labels) = sample.strip_suffix('}').unwrap().split_once('{').unwrap();
                    let end = name.strip_prefix(&*last).unwrap();
                    let ends: &[&str] = match &*kinds[&last] {
                        "histogram" => &["_bucket", "_sum", "_count"],
                        _ => &[""],
                    };
                    assert!(ends.contains(&end), "{line}");
                    assert!(
                        labels.split(',').all(|label| label.split('"').count() == 3),
                        "{line}"
                    );
                    assert!(
                        samples.iter().all(|(known, _)| known != sample),
                        "{line}: twice"
                    );
                    samples.push((sample.to_owned(), number.parse().unwrap()));
                }
                _ => panic!("{line}"),
            }
        }
        Metrics { kinds, samples }
    }

    fn of(&self, begin: &str) -> Vec<(String, f64)> {
        let found = self
            .samples
            .iter()
            .filter(|(sample, _)| sample.starts_with(begin));
        found.cloned().collect()
    }

    #[track_caller]
    fn number(&self, sample: &str) -> f64 {
        let found = self.samples.iter().find(|(known, _)| known == sample);
        found
            .unwrap_or_else(|| panic!("no {sample}: {:?}", self.samples))
            .1
    }
}
