//! The promise in the name, and the placement that nodes built years apart must agree on.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use kv54::cluster::Cluster;

fn five() -> Cluster {
    let text = include_str!("../cluster.toml");
    Cluster::parse("cluster.toml".as_ref(), text).unwrap()
}

/// Lines of code as people count them: blank lines and comments are none, `use` lines are.
fn lines_of_code(source: &str) -> usize {
    let code = |line: &&str| !line.trim().is_empty() && !line.trim().starts_with("//");
    source.lines().filter(code).count()
}

#[test]
fn the_store_is_54_lines() {
    let server = lines_of_code(include_str!("../src/server.rs"));
    let client = lines_of_code(include_str!("../src/client.rs"));
    let lines = server + client;
    assert!(
        lines <= 54,
        "server.rs has {server} lines of code, client.rs {client}: {lines}"
    );
}

#[test]
fn the_first_step_is_twenty_lines_and_the_examples_are_54() {
    let all = [
        (include_str!("../examples/one_node.rs"), 20),
        (include_str!("../examples/essay.rs"), 54),
        (include_str!("../examples/logs.rs"), 54),
        (include_str!("../examples/deploy.rs"), 54),
        (include_str!("../examples/queue.rs"), 54),
    ];
    for (source, most) in all {
        assert!(lines_of_code(source) <= most, "{source}");
    }
}

#[test]
fn a_key_lives_where_zlib_says() {
    // python3 -c 'import zlib; print(zlib.crc32(b"tea"), zlib.crc32(b"tea") % 5)'
    let known: [(&[u8], u32, usize); 6] = [
        (b"", 0, 0),
        (b"tea", 2_391_201_714, 4),
        (b"coffee", 1_401_235_891, 1),
        (b"key1", 744_252_496, 1),
        (b"\x00\xff", 1_826_356_594, 4),
        ("grün".as_bytes(), 1_570_091_429, 4),
    ];
    let cluster = five();
    for (key, hash, owner) in known {
        assert_eq!(
            (crc32fast::hash(key), cluster.owner(key)),
            (hash, owner),
            "{key:?}"
        );
    }
}

#[test]
fn the_copies_are_on_the_next_two_names() {
    let cluster = five();
    let names = |part| {
        cluster
            .replicas(part)
            .map(|place| &*cluster.nodes()[place].name)
            .collect()
    };
    let around: Vec<Vec<&str>> = (0..5).map(names).collect();
    assert_eq!(
        around,
        [
            ["alice", "bob", "carol"],
            ["bob", "carol", "dave"],
            ["carol", "dave", "erin"],
            ["dave", "erin", "alice"],
            ["erin", "alice", "bob"],
        ]
    );
}

#[test]
fn the_fingerprint_of_a_ring_never_changes() {
    // python3 -c 'import zlib; print(zlib.crc32(b"alice\nbob\ncarol\ndave\nerin\n1000\n1024\n1048576\n3\nalice"))'
    assert_eq!(five().fingerprint("alice"), 594_212_058);
}
