//! Any text as a `cluster.toml`: it is a ring, or an error in one line that names the file.
#![no_main]

use std::collections::BTreeSet;
use std::time::Duration;

use kv54::cluster::Cluster;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Cluster::parse("cluster.toml".as_ref(), text) {
        Ok(cluster) => is_a_ring(&cluster),
        Err(error) => is_one_line(text, &error.to_string()),
    }
});

fn is_one_line(text: &str, error: &str) {
    let place = error
        .strip_prefix("cluster.toml:")
        .and_then(|rest| rest.split_once(": "));
    let (line, why) = place.unwrap_or_else(|| panic!("no file and line: {error:?}"));
    let line: usize = line.parse().expect("the line is a number");
    let lines = text.matches('\n').count() + 1;
    assert!((1..=lines).contains(&line), "line {line} of {lines}");
    assert!(!why.is_empty());
    assert!(
        !error.contains(char::is_control),
        "a terminal obeys it: {error:?}"
    );
}

fn is_a_ring(cluster: &Cluster) {
    let (names, nodes) = (cluster.names(), cluster.nodes().len());
    assert!(nodes > 0 && names.is_sorted());
    let leaving = cluster.leaving();
    assert!(leaving.is_sorted_by(|one, next| one.name < next.name));
    for (behind, node) in leaving.iter().enumerate() {
        assert_eq!(
            (cluster.place(&node.name), cluster.node(&node.name)),
            (None, Some(node))
        );
        assert_eq!(cluster.name(nodes + behind), node.name);
        let addresses = cluster.nodes().iter().map(|node| &node.address);
        assert!(
            addresses
                .into_iter()
                .all(|address| *address != node.address)
        );
    }
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), nodes);
    for (place, name) in names.iter().enumerate() {
        let sound = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        assert!(
            (1..=64).contains(&name.len()) && name.chars().all(sound),
            "{name:?}"
        );
        assert_eq!(
            (cluster.place(name), cluster.name(place)),
            (Some(place), *name)
        );
        let replicas: Vec<usize> = cluster.replicas(place).collect();
        assert_eq!((replicas[0], replicas.len()), (place, nodes.min(3)));
        assert!(replicas.iter().all(|replica| *replica < nodes));
        assert_eq!(
            replicas.iter().collect::<BTreeSet<_>>().len(),
            replicas.len()
        );
        assert!(cluster.owner(name.as_bytes()) < nodes);
        cluster.fingerprint(name);
    }
    assert_eq!(cluster.copies(), nodes.min(3));
    assert!(2 * cluster.majority() > cluster.copies() && cluster.majority() <= cluster.copies());
    assert!((Duration::from_millis(50)..=Duration::from_secs(60)).contains(&cluster.limits.window));
    assert!(
        cluster.limits.memory >= 1 << 20 && (1..=1_000_000).contains(&cluster.limits.connections)
    );
    is_read_as_it_is_written(cluster);
}

/// The same ring in other words: a node is what its two words say, nothing around them.
fn is_read_as_it_is_written(cluster: &Cluster) {
    let lines = cluster
        .nodes()
        .iter()
        .map(|node| format!("'{}' = '{}'\n", node.name, node.address));
    let leaving = cluster
        .leaving()
        .iter()
        .map(|node| format!("'{}' = '{}'\n", node.name, node.address));
    let window = format!(
        "[limits]\nwindow = '{}ns'\n",
        cluster.limits.window.as_nanos()
    );
    let file: String = ["[nodes]\n".to_owned()]
        .into_iter()
        .chain(lines)
        .chain(["[leaving]\n".to_owned()])
        .chain(leaving)
        .chain([window])
        .collect();
    let again = Cluster::parse("again.toml".as_ref(), &file).expect("it was taken before");
    let facts = |cluster: &Cluster| {
        let prints: Vec<u32> = cluster
            .names()
            .iter()
            .map(|name| cluster.fingerprint(name))
            .collect();
        let nodes = cluster
            .nodes()
            .iter()
            .map(|node| (node.name.clone(), node.address.clone()));
        let leaving = cluster.leaving().to_vec();
        let limits = (cluster.limits.window, cluster.limits.nodes);
        (nodes.collect::<Vec<_>>(), leaving, prints, limits)
    };
    assert_eq!(facts(cluster), facts(&again));
}
