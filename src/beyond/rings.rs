//! A ring that grows and shrinks while it runs. During a change both rings are asked: what a majority
//! of the old one knew, a majority of the new one must know before the old one may go. The rings
//! side by side are those of RAMBO (Lynch, Shvartsman, DISC 2002); [`State`] has the steps.
//!
//! Who drives a change keeps nothing. It may be killed at any moment and begin again, on any host.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use crate::client::Client;
use crate::cluster::{Cluster, Node, State, Told};
use crate::entry::Entry;
use crate::error::{Error, Kind};
use crate::join::{Kept, Scan, entries};
use crate::rpc::codec::NIL;
use crate::sabotage::{Bug, planted};
use crate::status::Status;

/// Before something is tried again that a node could not do.
const RETRY: Duration = Duration::from_millis(100);
/// How often a plan looks again where nodes know different states.
const LOOKS: u8 = 5;
/// In how many bytes it is noted, about, which keys of a part are handed over; others are so twice.
const MOST_SEEN: usize = 64 << 20;
/// What the note of a key takes beside the key, about.
const NOTE: usize = 56;
/// How long the nodes are left alone at most, after a batch that took long since one of them is slow.
const MOST_REST: Duration = Duration::from_secs(1);
/// How many keys are handed over at once.
const AT_ONCE: usize = 64;

/// What a change is about to do.
pub struct Plan {
    /// How the ring is now: it may be in the middle of this change.
    pub from: Arc<State>,
    /// The ring that is wanted; `None` where it is there already.
    pub to: Option<Arc<Cluster>>,
    /// How many keys are handed over, about.
    pub keys: usize,
    /// What these keys and their values take, in bytes.
    pub bytes: usize,
}

/// How far a change is.
pub enum Progress {
    /// It waits for this node, which answered with an error or not at all.
    Waits(String, Error),
    /// So many keys have been looked at.
    Keys(usize),
}

/// Changes the ring to that of a file.
pub struct Driver<'a, P: Fn(Progress)> {
    /// Reads and writes as any other client, in both rings.
    pub client: &'a Client,
    /// The file that has the new ring, and the nodes that leave.
    pub file: &'a Arc<Cluster>,
    /// Whether to change into a ring of the same names, too. What was deleted stays behind with the
    /// old one, and the counters of stamps begin anew.
    pub again: bool,
    /// How many times as long as it has just worked it leaves the nodes to their guests alone.
    pub rest: u32,
    /// Is told how far it is.
    pub progress: P,
}

impl<P: Fn(Progress)> Driver<'_, P> {
    /// What is to be done. An error names what is in the way; nothing has been changed. A round of forgetting
    /// is waited for, unless one is wanted.
    pub async fn plan(&self) -> Result<Plan, Error> {
        let replicas = &self.client.replicas;
        if !self.again {
            replicas.resize();
        }
        let (told, from) = self.look().await;
        if let Some(error) = told.iter().find_map(|(node, told)| strange(node, told)) {
            return Err(error);
        }
        somebody_serves(&told, &from)?;
        let to = self.wanted(&from)?;
        let is_needed = |name: &str| from.has(name) || self.file.place(name).is_some();
        let mut needed = told.iter().filter(|(node, _)| is_needed(&node.name));
        let mut refusal = || needed.find_map(|(node, told)| refusal(node, told, &from));
        // A change that has begun waits for who is missing.
        if to.is_some() && from.next.is_none() {
            refusal().map_or(Ok(()), |why| Err(Error::bad_request(why)))?;
        }
        if let (Some(to), None) = (&to, &from.next) {
            self.have_room(to).await?;
        }
        if let Some(to) = &to {
            knows_both(&told, &from, to)?;
        }
        let statuses = self.statuses(&from.ring).await;
        let sum = |count: fn(&Status) -> usize| {
            let counts = statuses.iter().map(count);
            counts.fold(0, usize::saturating_add) / from.ring.copies() // a stranger's word may be anything
        };
        let (keys, bytes) = (sum(|status| status.keys), sum(|status| status.bytes));
        Ok(Plan {
            from,
            to,
            keys,
            bytes,
        })
    }

    /// How all nodes say that the ring is, and how it is. A round that is not wanted is waited for.
    async fn look(&self) -> (Vec<(Node, Result<Told, Error>)>, Arc<State>) {
        let replicas = &self.client.replicas;
        replicas.exchange_all().await; // a node may know of others
        let mut looks = 0..LOOKS;
        loop {
            let (told, from) = (replicas.exchange_all().await, replicas.state());
            if from.is_round() && !(self.again && from.ring.names() == self.file.names()) {
                let why = Error::new(Kind::Unavailable, "it forgets what was deleted");
                (self.progress)(Progress::Waits("the ring".to_owned(), why));
            } else {
                let mut steps = told.iter().flat_map(|(_, told)| told).map(|told| told.step);
                if steps.all(|step| step == from.step) || looks.next().is_none() {
                    return (told, from); // else a round begins or ends at this moment
                }
            }
            sleep(RETRY).await;
        }
    }

    /// Refuses a ring of which a disk is full: its nodes write all keys anew, and would end no change.
    async fn have_room(&self, ring: &Cluster) -> Result<(), Error> {
        let statuses = ring.names().into_iter().map(async |name| {
            let status = self.client.replicas.ask_node(name, "status").await;
            status.and_then(|status| Status::read(&status)).ok()
        });
        let statuses = join_all(statuses).await;
        match statuses
            .iter()
            .flatten()
            .find(|status| status.disk_full == Some(true))
        {
            Some(full) => Err(Error::new(
                Kind::Full,
                format!("the disk of {} is full", full.name),
            )),
            None => Ok(()),
        }
    }

    /// What the nodes of a ring say of themselves, as far as they answer.
    async fn statuses(&self, ring: &Cluster) -> Vec<Status> {
        let places = 0..ring.nodes().len();
        let statuses = join_all(places.map(|place| self.client.replicas.status(place))).await;
        statuses.into_iter().flatten().collect()
    }

    /// The ring that is wanted, unless it is there already.
    fn wanted(&self, from: &State) -> Result<Option<Arc<Cluster>>, Error> {
        let wanted = self.file.names();
        if let Some(next) = &from.next {
            if next.names() == wanted {
                return Ok(Some(next.clone()));
            }
            let why = format!(
                "the ring is changing already, from {} to {}: end that first, with its file",
                from.ring.names().join(" "),
                next.names().join(" "),
            );
            return Err(Error::bad_request(why));
        }
        if from.ring.names() == wanted && !self.again {
            return Ok(None);
        }
        let mut names = from.ring.names().into_iter();
        match names.find(|name| self.file.node(name).is_none()) {
            None => Ok(Some(self.file.clone())),
            Some(name) => Err(Error::bad_request(format!(
                "{name} is in the running ring, and neither in [nodes] nor in [leaving]: name it in one of them"
            ))),
        }
    }

    /// Carries a plan out. It ends once the new ring is alone; an error leaves the change where it is. `busy:`
    /// if another change has begun since the plan was made: another plan is needed.
    pub async fn carry_out(&self, plan: &Plan) -> Result<(), Error> {
        let Some(to) = &plan.to else {
            return Ok(());
        };
        let changing = match plan.from.next {
            Some(_) => (*plan.from).clone(),
            None => plan.from.changing_to(to.clone()),
        };
        if plan.from.next.is_none() {
            self.wait_until_ready(&changing, &plan.from).await?;
            self.propose(&changing, &plan.from).await?;
        }
        if planted(Bug::HandOverBeforeAllKnow) {
            self.hand_over(&changing).await?;
        }
        while self.client.replicas.state().is(&changing) {
            let begun = Instant::now();
            let ids = self.begin(&changing).await?;
            self.hand_over(&changing).await?;
            // An operation that began before has ended within a window, or heard of the change.
            sleep((begun + to.limits.window).saturating_duration_since(Instant::now())).await;
            // The new ring may be one node, which may have forgotten all since.
            if self.begin(&changing).await? == ids {
                break;
            }
        }
        self.end(&changing).await
    }

    /// Waits until no node is joining: in the new ring, its word counts at once then.
    async fn wait_until_ready(&self, changing: &State, from: &State) -> Result<(), Error> {
        let joining = |told: &Told| {
            told.joining
                .then(|| Error::new(Kind::Joining, "it is joining"))
        };
        for name in names(changing) {
            while let Some(error) = match self.client.replicas.exchange(name).await {
                Ok(told) => joining(&told),
                Err(error) => Some(error),
            } {
                (self.progress)(Progress::Waits(name.to_owned(), error));
                self.still_begins(from, changing).await?;
                sleep(RETRY).await;
            }
        }
        Ok(())
    }

    /// Fails if the ring has changed in another way: who is waited for may have left it since.
    async fn still_begins(&self, from: &State, changing: &State) -> Result<(), Error> {
        self.client.replicas.exchange_all().await;
        let now = self.client.replicas.state();
        match now.is(from) || now.is(changing) {
            true => Ok(()),
            false => Err(changed_meanwhile()),
        }
    }

    /// Tells the first node of the old ring alone: of two changes that begin at once it takes one. Nobody else
    /// must hear of a change that it has not taken.
    async fn propose(&self, changing: &State, from: &State) -> Result<(), Error> {
        let names = changing.ring.names();
        let first = names.first().copied().unwrap_or_default();
        loop {
            let error = match self.client.replicas.propose(first, changing).await {
                Ok(told) if told.state(self.file)?.is(changing) => return self.hear(changing),
                Ok(told) if told.certain => return Err(changed_meanwhile()),
                Ok(_) => Error::new(Kind::Joining, "it does not know yet how the ring is"),
                Err(error) if error.kind == Kind::WrongRing => {
                    return Err(Error::new(Kind::Busy, another(first, &error.why).why));
                }
                Err(error) if error.kind.is_refusal() => return Err(error),
                Err(error) => error,
            };
            (self.progress)(Progress::Waits(first.to_owned(), error));
            self.still_begins(from, changing).await?;
            if self.client.replicas.state().is(changing) {
                return Ok(()); // it has taken it, and its answer came too late
            }
            sleep(RETRY).await;
        }
    }

    /// Has all nodes of both rings move on, until there was a moment when all of them had: who answers
    /// twice with one start id has not forgotten it between.
    async fn begin(&self, changing: &State) -> Result<Vec<u64>, Error> {
        loop {
            let first = self.tell_all(changing).await?;
            let second = self.tell_all(changing).await?;
            if first == second || !self.client.replicas.state().is(changing) {
                return Ok(first);
            }
        }
    }

    /// Tells all nodes of both rings, and waits until each has moved on; the start id of each.
    async fn tell_all(&self, changing: &State) -> Result<Vec<u64>, Error> {
        let names = names(changing);
        let told = join_all(names.iter().map(|name| self.tell(name, changing))).await;
        told.into_iter().collect()
    }

    /// Tells one node, and waits until it has moved on; its start id.
    async fn tell(&self, name: &str, changing: &State) -> Result<u64, Error> {
        loop {
            let why = match self.client.replicas.exchange(name).await {
                Ok(told) if told.step >= changing.step => return Ok(told.start_id),
                Ok(_) => Error::new(Kind::Joining, "it does not know yet how the ring is"),
                Err(error) if error.kind.is_refusal() => return Err(another(name, &error.why)),
                Err(_) if self.client.replicas.state().step > changing.step => return Ok(0), // it has ended
                Err(error) => {
                    self.client.replicas.exchange_all().await; // it may have left: another driver has ended it
                    error
                }
            };
            (self.progress)(Progress::Waits(name.to_owned(), why));
            if planted(Bug::EndsBeforeAllKnow) {
                return Ok(0);
            }
            sleep(RETRY).await;
        }
    }

    /// Moves this client itself to a state.
    fn hear(&self, state: &State) -> Result<(), Error> {
        let replicas = &self.client.replicas;
        replicas.hear(&Told::of(state, true)).map(drop)
    }

    /// Reads every key that lives in the old ring, which takes it to a majority of the new one.
    async fn hand_over(&self, changing: &State) -> Result<(), Error> {
        let (ring, mut seen) = (&changing.ring, Seen::default());
        if planted(Bug::HandOverSkipped) {
            return Ok(());
        }
        for part in 0..ring.nodes().len() {
            let needed = ring.copies().min(2); // of three, any two have every write
            let mut listed = HashSet::new();
            (seen.keys, seen.bytes) = (HashSet::new(), 0);
            while listed.len() < needed && self.client.replicas.state().is(changing) {
                let places = ring.replicas(part).filter(|place| !listed.contains(place));
                for place in places.collect::<Vec<_>>() {
                    match self.hand_over_list(part, place, &mut seen).await {
                        Ok(()) => drop(listed.insert(place)),
                        Err(error) => {
                            let name = ring.name(place);
                            (self.progress)(Progress::Waits(name.to_owned(), error));
                            let _ = self.client.replicas.exchange(name).await; // it may be behind
                            sleep(RETRY).await;
                        }
                    }
                    if listed.len() == needed {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Hands over what one replica of a part lists and what was not seen before.
    async fn hand_over_list(
        &self,
        part: usize,
        place: usize,
        seen: &mut Seen,
    ) -> Result<(), Error> {
        let replicas = &self.client.replicas;
        let mut scan = Scan::of_a_ready_node(replicas, place, part).await?;
        let epoch = replicas.state().epoch();
        while let Some(page) = scan.page().await? {
            let is_new = |(key, entry, _): &Kept| {
                let is_left = stays_behind(*entry, epoch); // a newer write is in the other list
                !is_left && !seen.keys.contains(*key)
            };
            let new = entries(&page)?.into_iter().filter(is_new);
            let new: Vec<&[u8]> = new.map(|(key, ..)| key).collect();
            for keys in new.chunks(AT_ONCE) {
                let asked = Instant::now();
                for handed in join_all(keys.iter().map(|key| self.hand_over_key(key))).await {
                    handed?;
                }
                seen.add(keys);
                (self.progress)(Progress::Keys(seen.done));
                sleep((asked.elapsed() * self.rest).min(MOST_REST)).await;
            }
        }
        Ok(())
    }

    async fn hand_over_key(&self, key: &[u8]) -> Result<(), Error> {
        let operation = self.client.replicas.of(key)?;
        let newest = operation.load().await?;
        let entry = newest.entry.borrow();
        if stays_behind(entry, self.client.replicas.state().epoch())
            || planted(Bug::LiveValuesNotHandedOver)
        {
            return Ok(());
        }
        operation.repair(newest).await.map(drop)
    }

    /// Has all nodes move on to the new ring. Who cannot be reached hears of it from the others.
    async fn end(&self, changing: &State) -> Result<(), Error> {
        let ended = changing.changed();
        self.hear(&ended)?;
        let told = names(changing).into_iter().map(async |name| {
            let told = timeout(2 * changing.ring.limits.window, self.tell(name, &ended)).await;
            told.unwrap_or(Ok(0))
        });
        join_all(told)
            .await
            .into_iter()
            .try_for_each(|told| told.map(drop))
    }
}

/// What is handed over.
#[derive(Default)]
struct Seen {
    keys: HashSet<Box<[u8]>>, // of this part
    bytes: usize,             // that they take, about
    done: usize,              // of all parts
}

impl Seen {
    fn add(&mut self, keys: &[&[u8]]) {
        self.done += keys.len();
        self.bytes += keys.iter().map(|key| key.len() + NOTE).sum::<usize>();
        if self.bytes < MOST_SEEN {
            self.keys.extend(keys.iter().map(|key| Box::from(*key)));
        }
    }
}

/// What was deleted before a change stays behind with the old ring. A delete of now goes on in the new one, and
/// hides what is made there of nothing.
fn stays_behind(entry: Entry<&[u8]>, epoch: u64) -> bool {
    let is_old = entry.stamp.epoch() < epoch;
    entry.value == NIL && (is_old || planted(Bug::NewTombstoneStaysBehind))
}

/// The names of the nodes of both rings, those of the old one first.
fn names(state: &State) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for name in state.rings().flat_map(|ring| ring.names()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Why a node can have no part in a change: it is another one, or of another ring.
fn strange(node: &Node, told: &Result<Told, Error>) -> Option<Error> {
    let error = told.as_ref().err()?;
    let why = match &*error.why {
        _ if error.kind != Kind::WrongRing => return None,
        why if why.starts_with("of two rings") => {
            format!("{why}: name the nodes of one, or restart those of the other with this file")
        }
        why if why.starts_with("a window of") => {
            format!("{why}: a ring keeps its window, so [limits] must have the same")
        }
        why => format!(
            "{}: {why}: correct its address, or restart it with this file",
            node.name
        ),
    };
    Some(Error::new(error.kind, why))
}

/// A node is in the middle of another change.
fn another(name: &str, why: &str) -> Error {
    let why = format!("{name}: {why}: another change has begun, end that first, with its file");
    Error::bad_request(why)
}

/// Another driver was quicker.
fn changed_meanwhile() -> Error {
    Error::new(Kind::Busy, "the ring has changed meanwhile")
}

/// Refuses where no node is certain of its ring.
fn somebody_serves(told: &[(Node, Result<Told, Error>)], from: &State) -> Result<(), Error> {
    let mut serving = told.iter().flat_map(|(_, told)| told);
    if serving.any(|told| told.certain) {
        return Ok(());
    }
    let said = told
        .iter()
        .filter_map(|(node, told)| refusal(node, told, from));
    let said = said.collect::<Vec<_>>().join("; ");
    let why = format!("no node of a running ring answers ({said}): name one that does");
    Err(Error::new(Kind::Unavailable, why))
}

/// Why a node is in the way of a change; `None` if it is where the ring is.
fn refusal(node: &Node, told: &Result<Told, Error>, from: &State) -> Option<String> {
    let Node { name, address } = node;
    let why = match told {
        Err(error) if error.kind == Kind::NoSuchMethod => {
            format!(
                "{address} runs a version of kv54 that cannot change its ring: restart it as this one"
            )
        }
        Err(error) => format!(
            "{address} does not answer ({}): start it with this file",
            error.why.replace(&format!("{address}: "), "")
        ),
        Ok(told) => match told.state(&from.ring) {
            Ok(state) if state.is(from) => return None,
            Ok(state) => format!("{}: restart it with this file", state.told()),
            Err(error) => error.why,
        },
    };
    Some(format!("{name}: {why}"))
}

/// A node that was alone in its ring has nobody who could tell it of the change after a restart: its
/// file must.
fn knows_both(
    told: &[(Node, Result<Told, Error>)],
    from: &State,
    to: &Cluster,
) -> Result<(), Error> {
    let [alone] = from.ring.names()[..] else {
        return Ok(());
    };
    let told = told.iter().find(|(node, _)| node.name == alone);
    let file = told
        .and_then(|(_, told)| told.as_ref().ok())
        .map(|told| &told.file);
    match to
        .names()
        .iter()
        .all(|name| file.is_some_and(|file| file.iter().any(|known| known == name)))
    {
        true => Ok(()),
        false => Err(Error::bad_request(format!(
            "{alone} has not read the new cluster.toml yet: give it this file, then kill -HUP its process"
        ))),
    }
}
