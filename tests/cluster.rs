//! Stories of a real cluster: five processes, their sockets, and what befalls them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::wire::Wire;
use common::{Cluster, FIVE, Hiccups, Node, Said, block_on};
use futures::future::join_all;
use kv54::cluster::{Limits, State, Told};
use kv54::entry::{Packed, Stamp, loaded};
use kv54::error::{Error, Kind};
use kv54::rpc::codec::{Encoded, decode, encode};
use kv54::rpc::{self, Answer, Peer, Service, tcp};
use msgpack_rpc::Value;
use tokio_util::sync::CancellationToken;

#[test]
fn what_is_set_at_one_node_is_got_at_every_other() {
    let cluster = Cluster::five();
    for via in FIVE {
        let value = format!("set at {via}");
        cluster.kv54(["set", "tea", &value, "--via", via]).exits(0);
        for node in FIVE {
            let got = cluster.kv54(["get", "tea", "--via", node]).exits(0);
            assert_eq!(got.text(), format!("{value}\n"), "at {node}");
        }
        assert_eq!(
            cluster.kv54(["get", "tea"]).exits(0).text(),
            format!("{value}\n")
        );
    }
    cluster.kv54(["delete", "tea", "--via", "bob"]).exits(0);
    for node in FIVE {
        cluster.kv54(["get", "tea", "--via", node]).exits(1);
    }
}

#[test]
fn any_bytes_are_a_value_and_a_megabyte_is_fine() {
    let cluster = Cluster::five();
    let binary: Vec<u8> = (0..=255).cycle().take(5_000).collect();
    let megabyte: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    let text = "grün ".repeat(100_000).into_bytes();
    for (key, value) in [
        ("empty", &vec![]),
        ("binary", &binary),
        ("megabyte", &megabyte),
        ("text", &text),
    ] {
        cluster.kv54_with(["set", key, "-"], value).exits(0);
        for via in FIVE {
            let got = cluster.kv54(["get", key, "--raw", "--via", via]).exits(0);
            assert!(got.out == *value, "{key} differs at {via}");
        }
        assert!(
            cluster.kv54(["get", key, "--raw"]).exits(0).out == *value,
            "{key} differs"
        );
    }
    let said = cluster
        .kv54_with(["set", "toolarge"], &vec![0xff; (1 << 20) + 1])
        .exits(2);
    said.says(&["too-large: standard input has over 1048576 bytes"]);
    cluster.kv54(["get", "toolarge"]).exits(1);
}

#[test]
fn every_key_lands_where_the_arithmetic_says_and_nowhere_else() {
    let cluster = Cluster::five();
    let client = cluster.client();
    for (place, owner) in FIVE.iter().enumerate() {
        let holders: Vec<&str> = (0..3).map(|next| FIVE[(place + next) % 5]).collect();
        let owned = |key: &String| crc32fast::hash(key.as_bytes()) as usize % 5 == place;
        let keys: Vec<String> = (0..)
            .map(|n| format!("{owner}{n}"))
            .filter(owned)
            .take(5)
            .collect();
        for key in keys {
            cluster.kv54(["set", &key, "here"]).exits(0);
            block_on(async {
                for (place, node) in FIVE.iter().enumerate() {
                    match client
                        .replicas
                        .ask(place, "load", &[&encode(&key.as_str().into())])
                        .await
                    {
                        Ok(entry) => {
                            let stamp = loaded(&entry).unwrap().stamp;
                            assert!(holders.contains(node), "{key} is on {node}");
                            assert_eq!(stamp.counter, 1, "{key} on {node}");
                        }
                        Err(error) => {
                            assert!(!holders.contains(node), "{key} is not on {node}: {error}");
                            assert_eq!(error.kind, Kind::WrongRing);
                        }
                    }
                }
            });
            let told = cluster.kv54(["where", &key, "--json"]).exits(0).json();
            let names: Vec<_> = told["replicas"]
                .as_array()
                .unwrap()
                .iter()
                .map(|r| &r["name"])
                .collect();
            assert_eq!(names, holders);
        }
    }
}

#[test]
fn killing_any_node_costs_a_writer_no_error_and_no_wait() {
    let mut cluster = Cluster::five();
    let hiccups = Hiccups::watch();
    for victim in FIVE {
        let client = cluster.client();
        let (killed, done) = (AtomicBool::new(false), AtomicUsize::new(0));
        // Several writers at once, so that some are waiting for the victim when it dies.
        let writers = (0..8).map(|writer| {
            let (client, killed, done, cluster) = (&client, &killed, &done, &cluster);
            async move {
                let mut slowest = [Duration::ZERO; 2];
                for n in 0..100 {
                    let key = format!("{victim}{writer}-{n}");
                    let (gone, start) = (killed.load(Relaxed), Instant::now());
                    client.set(key.as_bytes(), &Packed::of(n)).await.unwrap();
                    assert_eq!(client.get(key.as_bytes()).await.unwrap(), Packed::of(n));
                    let slowest = &mut slowest[usize::from(gone)];
                    *slowest = start.elapsed().max(*slowest);
                    if done.fetch_add(1, Relaxed) == 400 {
                        cluster.signal(victim, "KILL");
                        killed.store(true, Relaxed);
                    }
                }
                slowest
            }
        });
        let slowest = block_on(join_all(writers));
        let [before, after] =
            [0, 1].map(|gone| slowest.iter().map(|both| both[gone]).max().unwrap());
        // What the machine does to threads that only sleep is not the store's doing, and an
        // operation waits for three processes.
        let allowed = before + Duration::from_millis(100) + 3 * hiccups.longest();
        assert!(
            after <= allowed,
            "{victim} killed: {before:?} before, {after:?} after"
        );
        cluster.restart(victim);
    }
}

#[test]
fn five_processes_any_one_killed_every_key_still_reads_and_writes() {
    let mut cluster = Cluster::five();
    let keys: Vec<String> = (0..20).map(|n| format!("key{n}")).collect();
    for key in &keys {
        cluster.kv54(["set", key, "before"]).exits(0);
    }
    cluster.kill("carol");
    for key in &keys {
        assert_eq!(cluster.kv54(["get", key]).exits(0).text(), "before\n");
        cluster.kv54(["set", key, "after"]).exits(0);
        for via in ["alice", "bob", "dave", "erin"] {
            assert_eq!(
                cluster.kv54(["get", key, "--via", via]).exits(0).text(),
                "after\n"
            );
        }
    }
    let status = cluster.kv54(["status", "--json"]).exits(3).json();
    assert_eq!(status["nodes"][2]["state"], "down");
    assert_eq!(status["nodes"][0]["state"], "ready");
}

#[test]
fn two_of_three_gone_is_refused_and_other_keys_go_on() {
    let mut cluster = Cluster::five();
    let hurt = cluster.key_on(&["bob", "carol", "dave"]);
    let sound = cluster.key_on(&["dave", "erin", "alice"]);
    cluster.kv54(["set", &hurt, "kept"]).exits(0);
    cluster.kv54(["set", &sound, "kept"]).exits(0);
    cluster.kill("bob");
    cluster.signal("carol", "STOP"); // one is dead, one silent
    let start = Instant::now();
    let get = cluster.kv54(["get", &hurt, "--timeout", "1500ms"]).exits(3);
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "it waited for {:?}",
        start.elapsed()
    );
    get.says(&[
        "unavailable:",
        &hurt,
        "of 3",
        "bob: ",
        "connection refused",
        "carol: ",
        "no answer",
    ]);
    let set = cluster
        .kv54(["set", &hurt, "new", "--timeout", "1500ms"])
        .exits(3);
    set.says(&["set failed", "unavailable:", &hurt]);
    let set = cluster
        .kv54(["set", &hurt, "new", "--via", "erin"])
        .exits(3);
    set.says(&["set failed", "unavailable:", "erin: "]);
    assert_eq!(cluster.kv54(["get", &sound]).exits(0).text(), "kept\n");
    cluster.kv54(["set", &sound, "new"]).exits(0);
    cluster.signal("carol", "CONT");
    assert_eq!(cluster.kv54(["get", &hurt]).exits(0).text(), "kept\n");
}

#[test]
fn a_silent_node_is_not_waited_for() {
    let cluster = Cluster::five();
    let key = cluster.key_on(&["bob", "carol", "dave"]);
    let hiccups = Hiccups::watch();
    block_on(async {
        let client = cluster.client();
        client
            .set(key.as_bytes(), &Packed::of("warm"))
            .await
            .unwrap();
        cluster.signal(&cluster.replicas(&key)[0], "STOP");
        let mut late = Vec::new(); // a few: a node may not run while the watcher does
        for n in 0..50 {
            let start = Instant::now();
            client.set(key.as_bytes(), &Packed::of(n)).await.unwrap();
            assert_eq!(client.get(key.as_bytes()).await.unwrap(), Packed::of(n));
            let took = start.elapsed();
            if took > Duration::from_millis(200) + 3 * hiccups.longest() {
                late.push((n, took));
            }
        }
        assert!(late.len() < 5, "{late:?}");
    });
}

#[test]
fn a_get_repairs_the_old_copy_that_it_meets() {
    let cluster = Cluster::five();
    let key = cluster.key_on(&["bob", "carol", "dave"]);
    let replicas = cluster.replicas(&key);
    cluster.kv54(["set", &key, "old"]).exits(0);
    block_on(async {
        // A newer entry that reached two of three, as when a writer dies half-way.
        let entry =
            |counter: u64, value: &str| Value::Array(vec![counter.into(), 9.into(), value.into()]);
        for node in &replicas[..2] {
            let new = Some(entry(9, "new"));
            told(&cluster, node, "store", &key, new).await.unwrap();
        }
        let stale = told(&cluster, &replicas[2], "load", &key, None)
            .await
            .unwrap();
        assert_eq!(stale[2].as_str(), Some("old"));
        let got = cluster.kv54(["get", &key, "--via", &replicas[2]]).exits(0);
        assert_eq!(got.text(), "new\n");
        let repaired = told(&cluster, &replicas[2], "load", &key, None)
            .await
            .unwrap();
        assert_eq!(repaired, entry(9, "new"));
        // One that reached a single replica: who has seen it makes sure that the next one will.
        let newer = Some(entry(10, "newer"));
        told(&cluster, &replicas[0], "store", &key, newer)
            .await
            .unwrap();
        assert_eq!(
            cluster
                .kv54(["get", &key, "--via", &replicas[0]])
                .exits(0)
                .text(),
            "newer\n"
        );
        for via in FIVE {
            assert_eq!(
                cluster.kv54(["get", &key, "--via", via]).exits(0).text(),
                "newer\n",
                "at {via}"
            );
        }
    });
}

#[test]
fn a_client_whose_file_names_another_ring_follows_the_running_one() {
    let cluster = Cluster::five();
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    let six = file.replace("[nodes]", "[nodes]\nfrank = \"127.0.0.1:1\"");
    cluster.file("six.toml", &six);
    let without = |name: &str| {
        let lines = file.lines().filter(|line| !line.starts_with(name));
        lines.map(|line| line.to_owned() + "\n").collect::<String>()
    };
    cluster.file("four.toml", &without("erin"));
    for (file, value) in [("six.toml", "green"), ("four.toml", "black")] {
        let keys = (0..10).map(|n| format!("{value}{n}"));
        for key in keys {
            cluster
                .kv54(["set", &key, value, "--config", file])
                .exits(0);
            let got = cluster.kv54(["get", &key, "--config", file]).exits(0);
            assert_eq!(got.text(), format!("{value}\n"));
            let got = cluster.kv54(["get", &key]).exits(0);
            assert_eq!(
                got.text(),
                format!("{value}\n"),
                "by the running ring's file"
            );
        }
    }
    // A node that the file names is missed, and one that it does not name is shown.
    let status = cluster.kv54(["status", "--json", "--config", "six.toml"]);
    assert_eq!(states(&status.exits(3)).pop().unwrap(), "frank down");
    let status = cluster.kv54(["status", "--json", "--config", "four.toml"]);
    assert_eq!(
        states(&status.exits(0)),
        FIVE.map(|name| format!("{name} ready"))
    );
}

/// What `status --json` says of each node.
fn states(status: &Said) -> Vec<String> {
    let status = status.json();
    let nodes = status["nodes"].as_array().unwrap().iter();
    let word = |node: &serde_json::Value, field| node[field].as_str().unwrap().to_owned();
    nodes
        .map(|node| word(node, "name") + " " + &word(node, "state"))
        .collect()
}

#[test]
fn a_client_with_another_window_or_with_addresses_mixed_up_is_refused_and_writes_nothing() {
    let cluster = Cluster::five();
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    cluster.file(
        "slow.toml",
        &file.replace("[limits]", "[limits]\nwindow = \"2s\""),
    );
    // Two names that have changed their addresses: each answers in the other's place.
    let (alice, bob) = (cluster.address("alice"), cluster.address("bob"));
    let swapped = file
        .replace(&alice, "?")
        .replace(&bob, &alice)
        .replace('?', &bob);
    cluster.file("swapped.toml", &swapped);
    for other in ["slow.toml", "swapped.toml"] {
        let key = cluster.key_on(&["erin", "alice", "bob"]);
        let set = cluster
            .kv54(["set", &key, "lost", "--config", other])
            .exits(2);
        set.says(&[
            "set failed",
            "wrong-ring:",
            "alice bob carol dave erin",
            "cluster.toml",
        ]);
        cluster
            .kv54(["get", &key, "--config", other])
            .exits(2)
            .says(&["wrong-ring:"]);
        let status = cluster
            .kv54(["status", "--json", "--config", other])
            .exits(3)
            .json();
        let nodes = status["nodes"].as_array().unwrap();
        assert!(
            nodes.iter().any(|node| node["state"] == "wrong-ring"),
            "{status}"
        );
        cluster.kv54(["get", &key]).exits(1);
    }
    let keys = cluster.kv54(["status", "--json"]).exits(0).json();
    for node in keys["nodes"].as_array().unwrap() {
        assert_eq!(
            (&node["keys"], &node["tombstones"]),
            (&0.into(), &0.into()),
            "{node}"
        );
    }
}

#[test]
fn a_set_that_no_majority_has_confirmed_is_unknown_not_failed() {
    let said = set_at_pretenders(|_| None);
    assert!(said.contains(": 0 of 3"), "{said}");
}

#[test]
fn nor_has_it_failed_if_the_ring_changes_when_its_time_is_over() {
    let said = set_at_pretenders(|ring| {
        let state = State::of(ring.clone()).changing_to(ring);
        let name = "carol".to_owned();
        Some(Told {
            name,
            ..Told::of(&state, true)
        })
    });
    assert!(said.contains("no time is left"), "{said}");
}

/// What a set says whose replicas never confirm it, of whom carol may know how the ring is.
fn set_at_pretenders(told: impl Fn(Arc<kv54::cluster::Cluster>) -> Option<Told>) -> String {
    let cluster = Cluster::of(&["alice", "bob", "carol"]);
    block_on(async {
        let stop = CancellationToken::new();
        for name in &cluster.names {
            let listener = tokio::net::TcpListener::bind(cluster.address(name))
                .await
                .unwrap();
            let told = told(cluster.ring()).filter(|told| told.name == *name);
            tokio::spawn(pretend(listener, told, stop.clone()));
        }
        let set = ["set", "tea", "green", "--timeout", "300ms"].map(String::from);
        let command = cluster.command();
        let said = tokio::task::spawn_blocking(move || {
            let mut command = command;
            command.args(set).output().unwrap()
        });
        let said = said.await.unwrap();
        let err = String::from_utf8(said.stderr).unwrap();
        assert_eq!(said.status.code(), Some(3), "{err}");
        assert!(
            err.contains("set has an unknown outcome: key \"tea\": "),
            "{err}"
        );
        stop.cancel();
        err
    })
}

#[test]
fn a_full_node_refuses_what_grows_and_keeps_what_it_has() {
    let mut cluster = Cluster::with_limits(&["alice"], "memory = \"1MiB\"");
    cluster.start("alice");
    cluster.wait_until_ready();
    let value = vec![b'x'; 300_000];
    for key in ["one", "two", "three"] {
        cluster.kv54_with(["set", key], &value).exits(0);
    }
    let full = cluster.kv54_with(["set", "four"], &value).exits(3);
    full.says(&["set failed", "full:", "four", "alice", "1048576"]);
    assert!(cluster.kv54(["get", "one", "--raw"]).exits(0).out == value);
    cluster.kv54_with(["set", "one"], &value).exits(0);
    cluster.kv54(["delete", "one"]).exits(0);
    cluster.kv54_with(["set", "four"], &value).exits(0);
    cluster.kv54(["get", "one"]).exits(1);
}

#[test]
fn a_ring_of_one_two_or_three_is_a_ring() {
    for names in [&["solo"][..], &["left", "right"], &["a", "b", "c"]] {
        let mut cluster = Cluster::running(names);
        for via in names {
            cluster.kv54(["set", "tea", via, "--via", via]).exits(0);
            assert_eq!(
                cluster.kv54(["get", "tea"]).exits(0).text(),
                format!("{via}\n")
            );
        }
        let told = cluster.kv54(["where", "tea", "--json"]).exits(0).json();
        assert_eq!(told["replicas"].as_array().unwrap().len(), names.len());
        cluster.kill(names[0]);
        let (code, timeout) = if names.len() == 3 {
            (0, "30s")
        } else {
            (3, "200ms")
        };
        cluster
            .kv54(["get", "tea", "--timeout", timeout])
            .exits(code);
    }
}

#[test]
fn a_dead_host_gets_another_address_and_no_node_is_restarted_for_it() {
    let mut cluster = Cluster::five();
    let keys: Vec<String> = (0..20).map(|n| format!("key{n}")).collect();
    for key in &keys {
        cluster.kv54(["set", key, "before"]).exits(0);
    }
    cluster.kill("erin");
    let elsewhere = format!("127.0.0.1:{}", cluster.spare_port(0));
    cluster.edit(&cluster.address("erin"), &elsewhere);
    cluster.reload(&format!(
        "cluster.toml is read again: erin is at {elsewhere}"
    ));
    cluster.start("erin");
    cluster.node("erin").wait_for("ready with");
    cluster.wait_until_ready();
    // Now another one may be missing: erin is one of two that are left of its keys.
    cluster.kill("alice");
    for via in ["bob", "carol", "dave", "erin"] {
        for key in &keys {
            let got = cluster.kv54(["get", key, "--via", via]).exits(0);
            assert_eq!(got.text(), "before\n", "{key} at {via}");
        }
    }
    for key in &keys {
        cluster
            .kv54(["set", key, "after", "--via", "carol"])
            .exits(0);
        assert_eq!(cluster.kv54(["get", key]).exits(0).text(), "after\n");
    }
    cluster.start("alice");
    cluster.node("alice").wait_for("ready with");
}

#[test]
fn traffic_does_not_notice_that_every_node_reads_its_file_again() {
    let mut cluster = Cluster::of(&FIVE);
    for name in FIVE {
        let everywhere = cluster.address(name).replace("127.0.0.1", "0.0.0.0");
        cluster.start_behind(name, "cluster.toml", &everywhere);
    }
    cluster.wait_until_ready();
    let guests: Vec<Peer> = (cluster.ring().nodes().iter())
        .map(|node| Peer::new(node, Duration::from_secs(10), tcp()))
        .collect();
    std::thread::scope(|scope| {
        let reloads = scope.spawn(|| {
            for turn in 1..10 {
                let [old, new] = [turn, turn + 1].map(|host| format!("127.0.0.{host}:"));
                cluster.edit(&old, &new);
                cluster.reload(&format!("is at {new}"));
            }
        });
        let traffic = (0..10).map(|number| {
            let (guest, reloads) = (&guests[number % 5], &reloads);
            async move {
                let key = encode(&format!("key{number}").into());
                let mut count = 0_u64;
                while !reloads.is_finished() {
                    count += 1;
                    let value = encode(&count.into());
                    guest.call("set", &[&key, &value]).await.1.unwrap();
                    let got = guest.call("get", &[&key]).await.1.unwrap();
                    assert_eq!(*got, *value, "key{number}");
                }
                count
            }
        });
        let counts = block_on(join_all(traffic));
        println!("sets and gets while the file was read nine times: {counts:?}");
    });
}

#[test]
fn a_node_that_has_moved_is_asked_at_its_new_address_though_the_old_one_answers() {
    struct Host(&'static str);

    impl Service for Host {
        async fn answer(&self, _: &str, _: &[&[u8]]) -> Result<Answer, Error> {
            Ok(Packed::of(self.0).into())
        }
    }

    let cluster = Cluster::of(&["alice", "bob"]);
    let (old, new) = (cluster.address("alice"), cluster.address("bob"));
    let ring = cluster.ring();
    let who = async |peer: &Peer| {
        peer.call("who", &[])
            .await
            .1
            .map(|name| decode(&name).unwrap())
    };
    block_on(async {
        let asked = async {
            let peer = Peer::new(&ring.nodes()[0], Duration::from_secs(5), tcp());
            while who(&peer).await.is_err() {} // they may not listen yet
            assert_eq!(who(&peer).await.unwrap(), "old".into());
            peer.move_to(&old);
            assert_eq!(who(&peer).await.unwrap(), "old".into(), "it has not moved");
            peer.move_to(&new);
            assert_eq!(who(&peer).await.unwrap(), "new".into());
        };
        tokio::select! {
            () = asked => {}
            end = rpc::listen(&old, &Host("old")) => panic!("{end:?}"),
            end = rpc::listen(&new, &Host("new")) => panic!("{end:?}"),
        }
    });
}

#[test]
fn a_node_ends_with_its_terminal() {
    let cluster = Cluster::of(&["alice"]);
    let mut terminal = Command::new("script");
    let serve = format!("exec {} serve alice 2> log", env!("CARGO_BIN_EXE_kv54"));
    terminal
        .current_dir(&cluster.dir)
        .args(["--quiet", "--command", &serve, "/dev/null"]);
    let terminal = Node::spawn(&mut terminal);
    let log = || std::fs::read_to_string(cluster.dir.join("log")).unwrap_or_default();
    let wait_for = |text| {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !log().contains(text) {
            assert!(
                Instant::now() < deadline,
                "no {text:?} in the log: {}",
                log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    wait_for("ready with");
    drop(terminal);
    wait_for("stopped");
}

#[test]
fn limits_are_raised_while_a_node_runs_and_keeps_its_memory() {
    let limits = "memory = \"1MiB\"\nconnections = 2";
    let mut cluster = Cluster::with_limits(&["alice"], limits);
    cluster.start("alice");
    cluster.wait_until_ready();
    let value = vec![b'x'; 300_000];
    for key in ["one", "two", "three"] {
        cluster.kv54_with(["set", key], &value).exits(0);
    }
    let full = cluster.kv54_with(["set", "four"], &value).exits(3);
    full.says(&["full:"]);
    cluster.edit("1MiB", "2MiB");
    cluster.reload("cluster.toml is read again: memory is 2.0 MiB");
    cluster.kv54_with(["set", "four"], &value).exits(0);
    assert!(cluster.kv54(["get", "one", "--raw"]).exits(0).out == value);

    let mut two = [(); 2].map(|()| Wire::to(&cluster, "alice"));
    assert!(two.each_mut().map(Wire::greets).iter().all(Option::is_some));
    Wire::to(&cluster, "alice").is_closed();
    cluster.edit("connections = 2", "connections = 3");
    cluster.reload("cluster.toml is read again: connections are 3");
    Wire::to(&cluster, "alice").does("get", ["tea".into()]);
    assert!(two.each_mut().map(Wire::greets).iter().all(Option::is_some));
    cluster.reload("cluster.toml is read again: nothing has changed");
}

#[test]
fn a_file_that_a_running_node_cannot_take_changes_nothing() {
    let mut cluster = Cluster::running(&["alice", "bob"]);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    let good = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    let slow = good.replace("[limits]", "[limits]\nwindow = \"2s\"");
    let broken = good.replace("[limits]", "memory\n[limits]");
    for (file, says) in [
        (
            slow,
            "another ring (alice bob, window 2s) than the running one (alice bob, window 1s)",
        ),
        (broken, "cluster.toml:5: "),
        (String::new(), "cluster.toml:1: missing field `nodes`"),
    ] {
        cluster.file("cluster.toml", &file);
        cluster.reload(says);
        for (name, node) in cluster.running_nodes() {
            let line = node.wait_for(says);
            assert!(
                line.starts_with("kv54: error: cluster.toml:"),
                "{name}: {line}"
            );
            assert!(line.ends_with("; nothing is changed"), "{name}: {line}");
        }
    }
    std::fs::remove_file(cluster.dir.join("cluster.toml")).unwrap();
    cluster.reload("cluster.toml: No such file or directory");
    cluster.file("cluster.toml", &good);
    assert_eq!(
        cluster.kv54(["get", "tea", "--via", "bob"]).exits(0).text(),
        "green\n"
    );
    // A node cannot leave the port that it listens on.
    let elsewhere = format!("127.0.0.1:{}", cluster.spare_port(0));
    let old = cluster.address("alice");
    cluster.edit(&old, &elsewhere);
    cluster.reload("cluster.toml is read again: ");
    let says = format!("alice is at {elsewhere}");
    cluster.node("bob").wait_for(&says);
    assert!(
        cluster
            .node("alice")
            .log()
            .iter()
            .all(|line| !line.contains(&says))
    );
    let says = "alice: warning: its own address, [tls] and [disk] are taken at its next start";
    cluster.node("alice").wait_for(says);
    cluster.restart("alice");
    assert_eq!(
        cluster
            .kv54(["get", "tea", "--via", "alice"])
            .exits(0)
            .text(),
        "green\n"
    );
}

#[test]
fn a_file_that_names_another_ring_changes_nothing_before_a_resize() {
    let mut cluster = Cluster::running(&["alice", "bob"]);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    let port = cluster.spare_port(0);
    cluster.edit("[nodes]", &format!("[nodes]\ncarol = \"127.0.0.1:{port}\""));
    cluster.reload(
        "kv54: cluster.toml: another ring (alice bob carol, window 1s); \
         kv54 resize changes the running one to it",
    );
    cluster.reload(&format!(
        "cluster.toml is read again: carol is at 127.0.0.1:{port}"
    ));
    let got = cluster.kv54(["get", "tea", "--via", "bob"]).exits(0);
    assert_eq!(got.text(), "green\n");
    // Two are the ring, although this node's file names three, and the third one is not there.
    cluster.restart("alice");
    let status = cluster.kv54(["status", "--json"]).exits(3);
    let two_and_one = ["alice ready", "bob ready", "carol down"];
    assert_eq!(states(&status), two_and_one);
}

#[test]
fn all_nodes_of_one_process_read_the_file_again() {
    let cluster = Cluster::with_limits(&["alice", "bob"], "memory = \"1MiB\"");
    let all = cluster.spawn(["serve", "--all"]);
    cluster.wait_until_ready();
    let value = vec![b'x'; 1_000_000];
    cluster.kv54_with(["set", "one"], &value).exits(0);
    cluster.kv54_with(["set", "two"], &value).exits(3);
    cluster.edit("1MiB", "3MiB");
    all.signal("HUP");
    for name in ["alice", "bob"] {
        all.wait_for(&format!(
            "{name}: cluster.toml is read again: memory is 3.0 MiB"
        ));
    }
    cluster.kv54_with(["set", "two"], &value).exits(0);
}

#[test]
fn idle_clients_beyond_the_open_files_keep_no_node_out() {
    let mut cluster = Cluster::of(&FIVE);
    cluster.start_under("-n 64", "alice");
    let says = "64 open files are allowed: a node takes 10 connections, not 1024; \
                ulimit -n 1078 is enough for all";
    cluster
        .node("alice")
        .wait_for(&format!("kv54: warning: {says}"));
    let idle: Vec<TcpStream> = (0..100)
        .map(|_| TcpStream::connect(cluster.address("alice")).unwrap())
        .collect();
    cluster
        .node("alice")
        .wait_for("connections are refused: at most 10 may be open");
    // However many are refused, the log says so every second.
    let refusals = || {
        let lines = cluster.node("alice").log();
        let refusals = lines.iter().filter(|line| line.contains("are refused"));
        refusals.count()
    };
    let (begun, said) = (Instant::now(), refusals());
    while refusals() < said + 2 && begun.elapsed() < Duration::from_secs(30) {
        drop(TcpStream::connect(cluster.address("alice")));
    }
    let (lines, took) = (refusals() - said, begun.elapsed());
    let most = usize::try_from(took.as_secs()).unwrap() + 2;
    assert!((2..=most).contains(&lines), "{lines} in {took:?}");
    for name in &FIVE[1..] {
        cluster.start(name);
    }
    for name in FIVE {
        cluster.node(name).wait_for("ready with");
    }
    // Alice is one of two that are left of some keys.
    cluster.kill("erin");
    for n in 0..20 {
        let key = format!("key{n}");
        cluster
            .kv54(["set", &key, "green", "--via", "bob"])
            .exits(0);
        let got = cluster.kv54(["get", &key, "--via", "carol"]).exits(0);
        assert_eq!(got.text(), "green\n", "{key}");
    }
    // A client is told why it is not let in, and a node that restarts is let in.
    let why = "all connections for clients are taken";
    cluster
        .kv54(["get", "key1", "--via", "alice"])
        .exits(3)
        .says(&["unavailable: ", why]);
    cluster.start("erin");
    cluster.node("erin").wait_for("ready with");
    let lines = cluster.node("alice").log();
    assert!(
        !lines
            .iter()
            .any(|line| line.contains("could not be accepted")),
        "{lines:?}"
    );
    drop(idle);
    cluster.kv54(["get", "key1", "--via", "alice"]).exits(0);
}

#[test]
fn a_soft_limit_on_open_files_is_raised_in_silence() {
    let mut cluster = Cluster::of(&["alice"]);
    cluster.start_under("-S -n 64", "alice");
    let guests: Vec<Wire> = (0..100).map(|_| Wire::to(&cluster, "alice")).collect();
    for mut guest in guests {
        assert!(guest.greets().is_some());
    }
    let warned = cluster.node("alice").log();
    assert!(
        !warned.iter().any(|line| line.contains("warning")),
        "{warned:?}"
    );
}

/// Asks one node as another node would.
async fn told(
    cluster: &Cluster,
    node: &str,
    method: &str,
    key: &str,
    last: Option<Value>,
) -> Result<Value, Error> {
    let ring = cluster.ring();
    let place = ring.place(node).unwrap();
    let peer = Peer::new(&ring.nodes()[place], Duration::from_secs(5), tcp());
    let ring = encode(&ring.fingerprint(node).into());
    let (key, last) = (encode(&key.into()), last.map(|last| encode(&last)));
    let params: Vec<&[u8]> = [&*ring, &key].into_iter().chain(last.as_deref()).collect();
    decode(&peer.call(method, &params).await.1?)
}

/// Says what it has and then never confirms a write. Or it knows a later state of the ring, which it tells.
struct Pretender(Option<Told>);

impl Service for Pretender {
    async fn answer(&self, method: &str, _: &[&[u8]]) -> Result<Answer, Error> {
        match (method, &self.0) {
            ("load", _) => Ok(Stamp::default().begin(2).into()),
            ("store", Some(_)) => Err(Error::new(Kind::WrongRing, "another one")),
            ("ring", Some(told)) => Ok(Encoded::from(told.packed()).into()),
            _ => std::future::pending().await,
        }
    }
}

async fn pretend(listener: tokio::net::TcpListener, told: Option<Told>, stop: CancellationToken) {
    let incoming = rpc::incoming(&listener, |stream, _| rpc::connected(stream));
    rpc::serve(incoming, &Pretender(told), Limits::default, stop).await;
}
