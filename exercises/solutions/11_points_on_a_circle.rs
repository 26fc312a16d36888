//! A point of a node lies where the hash of its name and the point's number puts it. A key behind the
//! last point belongs to the first one: it is a circle. With one point each, the arcs differ much, and so
//! do the shares; a hundred arcs of each node even that out. They cost a table that is searched in
//! log2(N × points) steps, where `% N` is one division.

use super::at;

pub fn circle(names: &[&str], points: usize) -> Vec<(u64, usize)> {
    let owners = names.iter().enumerate();
    let of_each = |(owner, name)| (0..points).map(move |n| (at(&format!("{name}{n}")), owner));
    let mut circle: Vec<_> = owners.flat_map(of_each).collect();
    circle.sort_unstable();
    circle
}

pub fn owner(circle: &[(u64, usize)], key: &str) -> usize {
    let next = circle.partition_point(|(point, _)| *point < at(key));
    circle[next % circle.len()].1
}
