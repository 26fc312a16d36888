//! Forgetting what was deleted: a round, which is a change of the ring into the same names. The new ring begins empty,
//! what lives is handed over to it, and what was deleted goes with the old one: a copying collector
//! (Cheney, "A nonrecursive list compacting algorithm", 1970) without rules of its own. The nodes begin
//! it by themselves.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep};

use crate::beyond::rings::Driver;
use crate::client::Client;
use crate::error::Error;
use crate::server::Node;
use crate::status::Status;

/// Between two looks at what can be forgotten, where that is soon needed; else five times as long.
const LOOK: Duration = Duration::from_millis(100);
/// Of so many looks of a node that is not the first, one is made.
const SELDOM: u32 = 20;
/// How long a round is due before the second node drives it, too; the third one waits twice as long.
const STAND_IN: Duration = Duration::from_secs(60);
/// From the end of a round to the next one, in seconds; not where memory is scarce.
const REST: u64 = 5;
/// The same for what was read during the last one, and may be read again in the next.
const LONG_REST: u64 = 300;

impl Node {
    /// Begins a round when it is due, and ends one that has begun, if this is the first ready node of the ring.
    /// Who drives it keeps nothing: if it stops, the next one goes on. Never ends.
    pub(crate) async fn forget(&self) {
        let (mut looks, mut due) = (0_u32, (u64::MAX, Instant::now()));
        loop {
            let own = self.store.status();
            let is_urgent = is_nearly_full(&own) && own.garbage > own.memory / 20;
            sleep(LOOK * if is_urgent { 1 } else { 5 }).await;
            if self.store.forgets_from() == usize::MAX {
                continue;
            }
            looks = looks.wrapping_add(1);
            let is_first = self.is_first().await;
            if !is_first && looks % SELDOM > 0 || !self.is_due().await {
                continue;
            }
            let epoch = self.store.rings.known().state.epoch();
            if due.0 != epoch {
                due = (epoch, Instant::now());
            }
            // The first one may not reach all others. Several that drive one round do no harm.
            let place = u32::try_from(self.place()).unwrap_or(u32::MAX);
            if is_first || due.1.elapsed() > STAND_IN.saturating_mul(place) {
                self.turn().await;
            }
        }
    }

    /// Its place in the ring as it is now, which another thread may change at any time; one behind its end where
    /// it is not in it.
    fn place(&self) -> usize {
        let ring = self.store.rings.known().state.ring.clone();
        ring.place(self.store.name()).unwrap_or(ring.nodes().len())
    }

    /// Whether no node before this one is ready.
    async fn is_first(&self) -> bool {
        for place in 0..self.place() {
            let status = self.client.replicas.status(place).await;
            if status.is_ok_and(|status| status.state == "ready") {
                return false;
            }
        }
        true
    }

    /// Whether a round has begun, or is worth it while every node is there.
    async fn is_due(&self) -> bool {
        let (state, own) = (self.store.rings.known().state, self.store.status());
        if own.state != "ready" || state.next.is_some() {
            return own.state == "ready" && state.is_round();
        }
        if self.store.is_to_be_resized() {
            return false;
        }
        let (own_place, others) = (self.place(), 0..state.ring.nodes().len());
        let others = others.filter(|place| *place != own_place);
        let asked = others.map(|place| self.client.replicas.status(place));
        let nodes: Result<Vec<Status>, Error> = join_all(asked).await.into_iter().collect();
        nodes.is_ok_and(|mut nodes| {
            nodes.push(own);
            let is_able = |node: &Status| node.state == "ready" && node.disk_full != Some(true);
            nodes.iter().all(is_able) && is_worth_it(&nodes, self.store.forgets_from())
        })
    }

    /// Drives one round, as `kv54 resize` does: this node's own state changes when it is told. What is in the
    /// way, the next look sees as well. Another file may have other addresses: then it ends, too.
    async fn turn(&self) {
        let (known, begun) = (self.store.rings.known(), Instant::now());
        let ring = known.ring();
        // Where memory is scarce, sets are refused until it ends.
        let rest = if is_nearly_full(&self.store.status()) {
            1
        } else {
            4
        };
        let driver = Driver {
            client: &Client {
                replicas: self.client.replicas.of_a_client(ring.clone()),
            },
            file: &ring,
            again: true,
            rest,
            progress: |_| (),
        };
        let round = async { driver.carry_out(&driver.plan().await?).await };
        let other_file = async {
            while Arc::ptr_eq(&known.file, &self.store.rings.known().file) {
                sleep(LOOK).await;
            }
        };
        tokio::select! {
            ended = round => match ended {
                Ok(()) => log::info!("forgot what was deleted, in {:.1?}", begun.elapsed()),
                Err(error) => log::debug!("cannot forget what was deleted: {error}"),
            },
            () = other_file => {}
        }
    }
}

fn is_nearly_full(node: &Status) -> bool {
    node.bytes > node.memory / 4 * 3
}

/// Whether nodes that keep this can forget more than a tenth of it, and `least` bytes each, or a tenth of the memory of one
/// that is nearly full.
pub fn is_worth_it(nodes: &[Status], least: usize) -> bool {
    let rests = |node: &Status, rest| node.forgot_s.is_some_and(|since| since < rest);
    let garbage = |node: &Status| match rests(node, LONG_REST) {
        true => node.garbage.saturating_sub(node.carried),
        false => node.garbage,
    };
    let is_scarce = |node: &Status| is_nearly_full(node) && garbage(node) > node.memory / 10;
    let sum = |count: &dyn Fn(&Status) -> usize| {
        let counts = nodes.iter().map(count);
        counts.fold(0, usize::saturating_add) // a stranger's word may be anything
    };
    let (all, kept) = (sum(&garbage), sum(&|node| node.bytes));
    let is_much = all > kept / 10 && all / nodes.len().max(1) >= least;
    nodes.iter().any(is_scarce) || is_much && !nodes.iter().any(|node| rests(node, REST))
}
