//! Stories of real hosts: network namespaces, each with a name, an address and a hosts file of
//! its own, plugged into one switch whose cables can be pulled and cut.
//!
//! A story runs in namespaces that nobody but its own processes holds. When they end, however
//! they end, the kernel takes down every cable, mount and process: nothing is left to clean up,
//! nothing outside has a new name, and two runs cannot meet.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use common::{FIVE, Node, Said, block_on, wait_until_equal};
use futures::future::join_all;
use kv54::client::Client;
use kv54::entry::Packed;
use kv54::replicas::Replicas;
use kv54::rpc::tcp;

/// Long enough for TCP to send again only after many seconds, if it were left alone.
const LONG: Duration = Duration::from_secs(15);
/// Long enough for every connection to be given up.
const SHORT: Duration = Duration::from_secs(3);

#[test]
#[ignore = "needs root and network namespaces"]
fn a_host_that_is_cut_off_is_missed_by_nobody_and_made_equal_when_it_is_back() {
    let Some(mut network) = Network::of_five() else {
        return;
    };
    network.start("alice", &["serve"]); // by the host's own name
    for name in &FIVE[1..] {
        network.start(name, &["serve", name]);
    }
    network.wait_until_ready_on(&FIVE);
    network.write_and_read_on(&FIVE, "before");

    pull_out("alice");
    network.write_and_read_for(SHORT, &FIVE[1..]);
    network.is_refused("alice", &keys());
    network.write_and_read_on(&FIVE[1..], "without alice");
    plug_in("alice");
    println!("alice is equal after {:.1?}", network.wait_until_equal());
    network.read_on(&FIVE, "without alice");

    // Only with the help of alice can her neighbours do without one of themselves.
    let others = ["alice", "carol", "dave", "erin"];
    cut(&["bob"], &others);
    cut(&others, &["bob"]);
    network.write_and_read_for(LONG, &others);
    network.is_refused("bob", &keys());
    network.write_and_read_on(&others, "without bob");
    heal();
    println!("bob is equal after {:.1?}", network.wait_until_equal());
    network.read_on(&FIVE, "without bob");
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_host_that_only_hears_or_only_speaks_is_missed_by_nobody_either() {
    let Some(mut network) = Network::of_five() else {
        return;
    };
    network.start_all();
    let (carol, others) = (["carol"].as_slice(), ["alice", "bob", "dave", "erin"]);
    for (from, to, how) in [
        (carol, others.as_slice(), "cannot be heard"),
        (&others, carol, "hears nothing"),
    ] {
        cut(from, to);
        network.write_and_read_for(SHORT, &others);
        network.is_refused("carol", &keys());
        network.write_and_read_on(&others, how);
        heal();
        let waited = network.wait_until_equal();
        println!("carol, who {how}, is equal after {waited:.1?}");
        network.read_on(&FIVE, how);
    }
}

#[test]
#[ignore = "needs root and network namespaces"]
fn of_a_network_in_two_halves_each_serves_the_keys_of_which_it_has_a_majority() {
    let Some(mut network) = Network::of_five() else {
        return;
    };
    network.start_all();
    network.write_and_read_on(&FIVE, "before");
    for (three, two) in [
        (["alice", "bob", "carol"], ["dave", "erin"]),
        (["alice", "carol", "erin"], ["bob", "dave"]),
    ] {
        cut(&three, &two);
        cut(&two, &three);
        let mut written = BTreeMap::new();
        for half in [&three[..], &two] {
            let majority = |key: &String| replicas(key).filter(|on| half.contains(on)).count() > 1;
            let (served, refused): (Vec<_>, Vec<_>) = keys().into_iter().partition(majority);
            println!("{half:?} serve {served:?} and refuse {refused:?}");
            for host in half {
                network.is_refused(host, &refused);
            }
            for key in served {
                for writer in half {
                    let value = format!("written by {writer} of {half:?}");
                    network.kv54(writer, &["set", &key, &value]).exits(0);
                    network.all_get(half, &key, &value);
                    written.insert(key.clone(), value);
                }
            }
        }
        assert_eq!(
            written.len(),
            keys().len(),
            "each key has its majority somewhere"
        );
        heal();
        println!("equal after {:.1?}", network.wait_until_equal());
        for (key, value) in written {
            network.all_get(&FIVE, &key, &value);
        }
    }
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_dead_host_is_replaced_by_a_new_one_without_a_lost_key() {
    let Some(mut network) = Network::of_five() else {
        return;
    };
    network.start_all();
    let many: Vec<String> = (0..50).map(|n| format!("many{n}")).collect();
    for (key, host) in many.iter().zip(FIVE.iter().cycle()) {
        network.kv54(host, &["set", key, key]).exits(0);
    }

    // Another machine with another name gets the place of erin: an edited file, and nobody restarts.
    network.destroy("erin");
    network.add_host("faye", 16);
    network.edit_file("erin = \"erin:5401\"", "erin = \"faye:5401\"");
    network.start("faye", &["serve", "erin"]);
    network.wait_until_ready_on(&["faye"]);
    for name in ["alice", "bob", "carol", "dave"] {
        network.node(name).signal("HUP");
        network
            .node(name)
            .wait_for("read again: erin is at faye:5401");
    }
    network.wait_until_ready_on(&["alice", "bob", "carol", "dave", "faye"]);
    for key in &many {
        network.all_get(&["alice"], key, key);
    }

    // Another machine with the old name: only what resolves names is told, and nobody restarts.
    network.destroy("dave");
    network.add_host("dave", 17);
    network.start("dave", &["serve"]);
    network.wait_until_ready_on(&["alice", "bob", "carol", "dave", "faye"]);
    network.wait_until_equal();

    // Of some keys, these two have all that is left.
    network.destroy("carol");
    for key in &many {
        network.all_get(&["alice", "bob", "dave"], key, key);
    }
}

#[test]
#[ignore = "needs root and network namespaces"]
fn five_hosts_become_seven_while_one_is_cut_off_and_nobody_notices() {
    let Some(mut network) = Network::of_five() else {
        return;
    };
    network.start_all();
    sh("ip address add 10.54.0.1/24 dev switch");
    let hosts = directory("alice").join("hosts"); // the client below hears of names that are new
    sh(&format!("mount --bind {} /etc/hosts", hosts.display()));
    let lines = (0..2_000).map(|n| format!("{{\"key\":\"many{n}\",\"value\":{n}}}\n"));
    let dump = directory("alice").join("many.jsonl");
    std::fs::write(&dump, lines.collect::<String>()).unwrap();
    let mut import = network.command("alice", &["import"]);
    let imported = import.stdin(std::fs::File::open(&dump).unwrap()).output();
    assert!(imported.unwrap().status.success());

    let (client, done) = (network.client(), AtomicBool::new(false)); // of the five
    let longest = thread::scope(|scope| {
        let asking = scope.spawn(|| longest_operation(&client, &done));
        network.add_host("frank", 16);
        network.add_host("grace", 17);
        let (erin, new) = ("erin = \"erin:5401\"\n", ["frank", "grace"]);
        let lines = new.map(|name| format!("{name} = \"{name}:5401\"\n"));
        network.edit_file(erin, &format!("{erin}{}", lines.concat()));
        for name in new {
            network.start(name, &["serve"]);
        }
        for name in new {
            network.node(name).wait_for("waiting: not yet in the ring");
        }

        let mut resize = network.command("dave", &["resize"]);
        let mut driver = Node::spawn(&mut resize);
        let alice = network.node("alice");
        alice.wait_for("the ring changes from alice bob carol dave erin to");
        sever("bob");
        driver.wait_for("waiting for bob");
        thread::sleep(SHORT); // a disturbance lasts, it is no event to wait for
        heal();
        assert_eq!(driver.wait(), 0, "{:?}", driver.log());
        done.store(true, Relaxed);
        asking.join().unwrap()
    });
    println!("the longest operation took {longest:.0?}");
    assert!(longest < Duration::from_millis(700), "{longest:?}");

    let seven = [&FIVE[..], &["frank", "grace"]].concat();
    network.wait_until_ready_on(&seven);
    network.wait_until_equal();
    network.write_and_read_on(&seven, "of seven");
    let export = network.kv54("grace", &["export"]).exits(0);
    let many = export.text().lines().filter(|line| line.contains("many"));
    assert_eq!(many.count(), 2_000);
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_name_server_that_never_answers_delays_neither_a_start_nor_an_end() {
    let Some(mut network) = Network::of_five() else {
        return;
    };
    network.lose_name_server("alice");
    let soon = Duration::from_secs(2); // an answer is waited for longer
    for own in ["127.0.0.1", "alice.example"] {
        let unknown = FIVE[1..]
            .iter()
            .map(|name| format!("{name} = \"{name}.example:5401\"\n"));
        let others: String = unknown.collect();
        network.file = format!("[nodes]\nalice = \"{own}:5401\"\n{others}");
        network.tell_everybody();
        let start = Instant::now();
        let mut node = Node::spawn(&mut network.command("alice", &["serve"]));
        if own == "127.0.0.1" {
            node.wait_for("listening on 127.0.0.1:5401");
            assert!(start.elapsed() < soon, "after {:?}", start.elapsed());
        }
        network.wait_for_lookup_on("alice");
        let start = Instant::now();
        node.signal("TERM");
        assert_eq!(node.wait(), 0, "{own}: {:?}", node.log());
        assert!(
            start.elapsed() < soon,
            "{own}: {:?}: {:?}",
            start.elapsed(),
            node.log()
        );
    }
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_node_on_loopback_ends_when_a_name_turns_out_to_be_elsewhere() {
    let Some(mut network) = Network::of_five() else {
        return;
    };
    network.file = network.file.replace("\"alice:", "\"127.0.0.1:");
    network.tell_everybody();
    let said = network.kv54("alice", &["serve"]).exits(2);
    let last = said.err.lines().last().unwrap();
    let why = "kv54: alice: 127.0.0.1:5401 is loopback on this machine, where ";
    assert!(
        last.starts_with(why) && last.contains("--listen"),
        "{said:?}"
    );
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_host_that_is_reachable_again_is_asked_before_a_window_is_over() {
    one_after_the_other_is_cut_off_for_a_while("1s");
}

#[test]
#[ignore = "needs root and network namespaces"]
fn so_it_is_where_a_window_is_far_longer_than_a_cut() {
    one_after_the_other_is_cut_off_for_a_while("3s");
}

/// No operation waits for the host that is cut off, nor for the one that was, 300 ms after.
fn one_after_the_other_is_cut_off_for_a_while(window: &str) {
    let Some(mut network) = Network::of_five() else {
        return;
    };
    network.edit_file(
        "[nodes]",
        &format!("[limits]\nwindow = \"{window}\"\n[nodes]"),
    );
    network.start_all();
    sh("ip address add 10.54.0.1/24 dev switch");
    // What one client asks of all parts, by a set and a get at a time.
    let done = AtomicBool::new(false);
    let longest = thread::scope(|scope| {
        let asking = scope.spawn(|| longest_operation(&network.client(), &done));
        for (n, host) in FIVE.iter().cycle().take(17).enumerate() {
            sever(host);
            let cut = [1_300, 550, 1_700, 650][n % 4] + 10 * n as u64;
            let [cut, calm] = [cut, 300].map(Duration::from_millis);
            thread::sleep(cut); // a disturbance lasts, it is no event to wait for
            heal();
            thread::sleep(calm);
        }
        done.store(true, Relaxed);
        asking.join().unwrap()
    });
    println!("the longest operation took {longest:.0?}");
    assert!(longest < Duration::from_millis(700), "{longest:?}");
}

/// Sets and gets a key of every part until it is done; how long the longest of all took.
fn longest_operation(client: &Client, done: &AtomicBool) -> Duration {
    block_on(async {
        let asked = keys().into_iter().map(async |key| {
            let (key, mut longest) = (key.as_bytes(), Duration::ZERO);
            while !done.load(Relaxed) {
                let asked = Instant::now();
                client.set(key, &Packed::of("green")).await.unwrap();
                longest = longest.max(asked.elapsed());
                let asked = Instant::now();
                assert!(!client.get(key).await.unwrap().is_nil());
                longest = longest.max(asked.elapsed());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            longest
        });
        join_all(asked).await.into_iter().max().unwrap()
    })
}

/// A switch, the hosts on it, and what all of them are told.
struct Network {
    hosts: Vec<Host>,
    addresses: BTreeMap<String, u8>,
    file: String,
}

/// A machine: a process that holds its namespaces and does nothing, and the node that runs there.
struct Host {
    name: String,
    keeper: Node,
    node: Option<Node>,
}

impl Network {
    /// Five hosts; no node is running yet. Nothing in the process that cargo has started: there,
    /// the test of this thread's name has been run in namespaces of its own, and has passed.
    fn of_five() -> Option<Network> {
        if std::env::var_os("KV54_ON_ITS_OWN").is_none() {
            // What kills one of these processes kills those after it.
            let run = "--pdeathsig KILL unshare --kill-child --fork --net --pid --mount \
                       --mount-proc timeout --kill-after=5 300";
            let story = thread::current().name().unwrap().to_owned();
            let told = Command::new("setpriv")
                .args(run.split_whitespace())
                .arg(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "--nocapture", &story])
                .env("KV54_ON_ITS_OWN", "yes")
                .status();
            assert!(told.unwrap().success(), "{story}, in namespaces of its own");
            return None;
        }
        sh(&format!(
            "mount -t tmpfs tmpfs {}",
            env!("CARGO_TARGET_TMPDIR")
        ));
        sh("ip link set lo up; ip link add switch type bridge; ip link set switch up");
        let lines = FIVE.map(|name| format!("{name} = \"{name}:5401\"\n"));
        let mut network = Network {
            hosts: Vec::new(),
            addresses: BTreeMap::new(),
            file: format!("[nodes]\n{}", lines.concat()),
        };
        for (name, number) in FIVE.iter().zip(11..) {
            network.add_host(name, number);
        }
        Some(network)
    }

    /// Plugs in a new machine with the address `10.54.0.number`.
    fn add_host(&mut self, name: &str, number: u8) {
        std::fs::create_dir_all(directory(name)).unwrap();
        std::fs::write(directory(name).join("hosts"), "").unwrap();
        let boot = format!(
            "hostname {name}; mount --bind hosts /etc/hosts; echo up >&2; exec sleep infinity"
        );
        let mut machine = Command::new("unshare");
        machine.args(["--net", "--uts", "--mount", "sh", "-ec", &boot]);
        let keeper = Node::spawn(machine.current_dir(directory(name)));
        keeper.wait_for("up");
        let pid = keeper.pid();
        sh(&format!(
            "ip link add {name} type veth peer name eth0 netns {pid}
             ip link set {name} master switch up
             inside='nsenter --target {pid} --net ip'
             $inside link set lo up
             $inside link set eth0 up
             $inside address add 10.54.0.{number}/24 dev eth0"
        ));
        self.addresses.insert(name.to_owned(), number);
        self.hosts.push(Host {
            name: name.to_owned(),
            keeper,
            node: None,
        });
        self.tell_everybody();
    }

    /// Takes a machine away without a last word to anybody: its cable goes first.
    fn destroy(&mut self, name: &str) {
        sh(&format!("ip link delete {name}"));
        self.hosts.retain(|host| host.name != name);
    }

    /// Changes a line of everybody's `cluster.toml`.
    fn edit_file(&mut self, old: &str, new: &str) {
        assert!(self.file.contains(old));
        self.file = self.file.replace(old, new);
        self.tell_everybody();
    }

    /// Writes what every machine has: the same names and addresses, and the same `cluster.toml`.
    fn tell_everybody(&self) {
        let line = |(name, number)| format!("10.54.0.{number} {name}\n");
        let known: String = self.addresses.iter().map(line).collect();
        for host in &self.hosts {
            let directory = directory(&host.name);
            // In place: this very file is mounted over /etc/hosts.
            std::fs::write(directory.join("hosts"), &known).unwrap();
            std::fs::write(directory.join("cluster.toml"), &self.file).unwrap();
        }
    }

    /// A client beside the hosts, with the file as it is now.
    fn client(&self) -> Client {
        let mut file = self.file.clone();
        for (name, number) in &self.addresses {
            file = file.replace(&format!("{name}:"), &format!("10.54.0.{number}:"));
        }
        let ring = kv54::cluster::Cluster::parse("cluster.toml".as_ref(), &file).unwrap();
        let replicas = Replicas::new(ring.into(), Duration::from_secs(5), &tcp());
        Client { replicas }
    }

    /// A command of kv54 on a host, in the directory with its `cluster.toml`.
    fn command(&self, host: &str, args: &[&str]) -> Command {
        let pid = self.host(host).keeper.pid().to_string();
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &pid, "--net", "--uts", "--mount", "--wd"])
            .arg(env!("CARGO_BIN_EXE_kv54"))
            .args(args)
            .env_remove("KV54_CONFIG")
            .env_remove("KV54_LOG");
        command
    }

    /// Runs a command of kv54 on a host to its end.
    fn kv54(&self, host: &str, args: &[&str]) -> Said {
        let output = self.command(host, args).output().unwrap();
        Said {
            code: output.status.code().unwrap_or(-1),
            out: output.stdout,
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Starts a host's node and waits until it listens on the network.
    fn start(&mut self, host: &str, args: &[&str]) {
        let node = Node::spawn(&mut self.command(host, args));
        node.wait_for("listening on 10.54.0.");
        self.host_mut(host).node = Some(node);
    }

    /// Starts the node of every host and waits until all are ready.
    fn start_all(&mut self) {
        for host in FIVE {
            self.start(host, &["serve"]);
        }
        self.wait_until_ready_on(&FIVE);
    }

    /// From now on this host asks a name server that never answers.
    fn lose_name_server(&self, host: &str) {
        let (directory, pid) = (directory(host), self.host(host).keeper.pid());
        std::fs::write(directory.join("resolv"), "nameserver 10.54.0.99\n").unwrap();
        // The switch takes what is sent to this machine, which is not there.
        sh(&format!(
            "nsenter --target {pid} --net --mount --wd sh -ec '
                 ip neighbour add 10.54.0.99 lladdr 02:00:00:00:00:63 dev eth0
                 mount --bind resolv /etc/resolv.conf'"
        ));
    }

    /// Waits until a question to a name server is on its way from this host.
    fn wait_for_lookup_on(&self, host: &str) {
        let sockets = format!("/proc/{}/net/udp", self.host(host).keeper.pid());
        let start = Instant::now();
        while !std::fs::read_to_string(&sockets)
            .unwrap()
            .contains(":0035 ")
        {
            assert!(start.elapsed() < LONG, "{host} looks up no name");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn node(&self, host: &str) -> &Node {
        self.host(host).node.as_ref().unwrap()
    }

    /// Waits until every node is ready in the eyes of each of these hosts.
    #[track_caller]
    fn wait_until_ready_on(&self, hosts: &[&str]) {
        for host in hosts {
            let said = self.kv54(host, &["status", "--wait", "--timeout", "30s"]);
            said.exits(0);
        }
    }

    /// Waits until all copies are equal; how long it was.
    #[track_caller]
    fn wait_until_equal(&self) -> Duration {
        let host = &self.hosts[0].name;
        wait_until_equal(|| self.kv54(host, &["status", "--json"]).json())
    }

    /// These hosts write a key of every part, by a command and through a node, and all read it.
    #[track_caller]
    fn write_and_read_on(&self, hosts: &[&str], value: &str) {
        let pairs = hosts.iter().zip(hosts.iter().cycle().skip(1));
        for (key, (host, next)) in keys().iter().zip(pairs.cycle()) {
            self.kv54(host, &["set", key, "overwritten"]).exits(0);
            self.kv54(host, &["set", key, value, "--via", next])
                .exits(0);
        }
        self.read_on(hosts, value);
    }

    /// Goes on like that for so long.
    #[track_caller]
    fn write_and_read_for(&self, time: Duration, hosts: &[&str]) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.write_and_read_on(hosts, &format!("after {:?}", start.elapsed()));
        }
    }

    /// Each of these hosts reads a key of every part.
    #[track_caller]
    fn read_on(&self, hosts: &[&str], value: &str) {
        for key in keys() {
            self.all_get(hosts, &key, value);
        }
    }

    /// A command on each of these hosts reads this value, and so does its node.
    #[track_caller]
    fn all_get(&self, hosts: &[&str], key: &str, value: &str) {
        for host in hosts {
            for args in [&["get", key][..], &["get", key, "--via", host]] {
                let got = self.kv54(host, args).exits(0);
                assert_eq!(got.text(), format!("{value}\n"), "{args:?} on {host}");
            }
        }
    }

    /// A command on this host can neither read nor write these keys, nor can its node, and each says why.
    #[track_caller]
    fn is_refused(&self, host: &str, keys: &[String]) {
        let parts = ["unavailable: ", " of 3 replicas answered, 2 needed ("];
        thread::scope(|scope| {
            for key in keys {
                for args in [vec!["get", key], vec!["set", key, "refused"]] {
                    for via in [vec![], vec!["--via", host]] {
                        let args = [args.clone(), via].concat();
                        scope.spawn(move || {
                            self.kv54(host, &args).exits(3).says(&[key]).says(&parts)
                        });
                    }
                }
            }
        });
    }

    fn host(&self, name: &str) -> &Host {
        self.hosts.iter().find(|host| host.name == name).unwrap()
    }

    fn host_mut(&mut self, name: &str) -> &mut Host {
        let mut hosts = self.hosts.iter_mut();
        hosts.find(|host| host.name == name).unwrap()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in self.hosts.iter().filter(|_| thread::panicking()) {
            let log = host.node.as_ref().map(Node::log).unwrap_or_default();
            eprintln!("-- the log on {}:\n{}", host.name, log.join("\n"));
        }
    }
}

/// Pulls the cable of a host out of the switch.
fn pull_out(host: &str) {
    sh(&format!("ip link set {host} down"));
}

fn plug_in(host: &str) {
    sh(&format!("ip link set {host} up"));
}

/// What these hosts send to those is lost from now on, without a word to anybody.
fn cut(from: &[&str], to: &[&str]) {
    let (from, to) = (from.join(", "), to.join(", "));
    sh(&format!(
        "nft 'add table bridge cuts
              add chain bridge cuts forward {{ type filter hook forward priority 0; }}
              add rule bridge cuts forward iifname {{ {from} }} oifname {{ {to} }} drop'"
    ));
}

/// What this host and all others send each other is lost, also what this process sends.
fn sever(host: &str) {
    let chain = |hook: &str, way: &str| {
        format!(
            "add chain bridge cuts {hook} {{ type filter hook {hook} priority 0; }}
             add rule bridge cuts {hook} {way} {host} drop\n"
        )
    };
    let [hears, says] = ["oifname", "iifname"];
    let chains = [
        ("forward", hears),
        ("forward", says),
        ("output", hears),
        ("input", says),
    ];
    let chains = chains.map(|(hook, way)| chain(hook, way)).concat();
    sh(&format!("nft 'add table bridge cuts\n{chains}'"));
}

fn heal() {
    sh("nft delete table bridge cuts");
}

/// What is this host's own on the disk.
fn directory(host: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(host)
}

/// Runs a script to its end, and is content with nothing but success.
#[track_caller]
fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {said}");
}

/// A key of every part.
fn keys() -> Vec<String> {
    let owned = |name| {
        let mut keys = (0..).map(|n| format!("key{n}"));
        keys.find(|key| replicas(key).next() == Some(name)).unwrap()
    };
    FIVE.map(owned).to_vec()
}

/// The replicas of a key, the owner first.
fn replicas(key: &str) -> impl Iterator<Item = &'static str> + use<> {
    let owner = crc32fast::hash(key.as_bytes()) as usize % FIVE.len();
    (0..3).map(move |next| FIVE[(owner + next) % FIVE.len()])
}
