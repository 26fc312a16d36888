//! The highest bid wins. A newcomer outbids some winners, and changes nothing between the others.
//! To know the winner one must compute all N bids, where `% N` is one division.

use super::bid;

pub fn owner(key: &[u8], names: &[&str]) -> usize {
    let bids = names.iter().map(|name| bid(name, key));
    let highest = bids.enumerate().max_by_key(|(_, bid)| *bid);
    highest.unwrap().0
}
