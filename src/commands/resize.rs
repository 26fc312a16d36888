//! `resize`: changes the running ring to that of the file.

use std::cell::RefCell;
use std::collections::HashSet;
use std::process::ExitCode;

use bytesize::ByteSize;
use clap::Args;
use serde_json::json;

use super::{Failure, Options, Outcome, bar, print, remark, text};
use crate::beyond::rings::{Driver, Plan, Progress};
use crate::cluster::Cluster;
use crate::error::{Error, Kind};

/// Change the running ring to that of the file, while reads and writes go on.
///
/// `[nodes]` has the names of the new ring, and `[leaving]` those that go. Copy the file to all hosts,
/// and start the new nodes: they wait. Then run this once, anywhere. If it is killed, run it again. There
/// is no cancel: to go back, let it end, and change back.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 resize --dry-run
  kv54 resize")]
pub(super) struct Resize {
    /// Say what is to be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Change into a new ring also where the names stay the same: what was deleted is then forgotten
    #[arg(long)]
    again: bool,
}

impl Resize {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let file = options.cluster()?;
        let client = options.client_of(file.clone())?;
        let (bar, said) = (bar(BAR, Some(0)), RefCell::new(HashSet::new()));
        let say = |line: String| {
            if said.borrow_mut().insert(line.clone()) {
                bar.suspend(|| remark(line));
            }
        };
        let driver = Driver {
            client: &client,
            file: &file,
            again: self.again,
            rest: 1,
            progress: |progress| match progress {
                Progress::Keys(keys) => bar.set_position(keys as u64),
                Progress::Waits(name, error) => say(format!("waiting for {name}: {}", error.why)),
            },
        };
        let mut told = String::new();
        let plan = loop {
            let plan = driver.plan().await.map_err(refused)?;
            let words = in_words(&plan);
            if !options.json && words != told {
                print(&words)?;
            }
            told = words;
            if self.dry_run {
                break plan;
            }
            bar.set_length(plan.keys as u64);
            match driver.carry_out(&plan).await {
                // A round came first, or another resize.
                Err(error) if error.kind == Kind::Busy => say(error.why),
                ended => break ended.map(|()| plan).map_err(failed)?,
            }
        };
        bar.finish_and_clear();
        self.report(options, &plan)
    }

    /// Says what was done.
    fn report(&self, options: &Options, plan: &Plan) -> Outcome {
        let from = &plan.from.ring;
        let (to, done) = (
            plan.to.as_ref().unwrap_or(from),
            !self.dry_run || plan.to.is_none(),
        );
        let report = json!({
            "from": from.names(), "to": to.names(), "moved_percent": moved(plan),
            "keys": plan.keys, "bytes": plan.bytes, "done": done,
        });
        match (options.json, self.dry_run || plan.to.is_none()) {
            (true, _) => options.print(&report, ""),
            (_, true) => Ok(ExitCode::SUCCESS),
            _ => print(format!("done: the ring is {}\n", to.names().join(" "))),
        }
    }
}

const BAR: &str = "{wide_bar} {percent} %  {per_sec}, {eta} left";

/// A change that cannot begin.
fn refused(error: Error) -> Failure {
    Failure::usage(error.why).with("nothing is changed")
}

/// A change that stops in the middle: how the nodes are need not be said again.
fn failed(error: Error) -> Failure {
    Failure {
        why: error.why.clone(),
        ..error.into()
    }
}

/// What is to be done, in words.
fn in_words(plan: &Plan) -> String {
    let from = &plan.from.ring;
    let Some(to) = &plan.to else {
        return format!(
            "the ring is {}: nothing is to be done\n",
            from.names().join(" ")
        );
    };
    let only_in = |one: &Cluster, other: &Cluster, verb: &str| {
        let names = one.names().into_iter();
        let names: Vec<&str> = names.filter(|name| other.place(name).is_none()).collect();
        let s = if names.len() == 1 { "s" } else { "" };
        (!names.is_empty()).then(|| format!("{} {verb}{s}", text::and(&names)))
    };
    let changes = [only_in(to, from, "come"), only_in(from, to, "leave")];
    let changes: Vec<String> = changes.into_iter().flatten().collect();
    let changes = match changes[..] {
        [] => "the same names, without what was deleted".to_owned(),
        _ => changes.join(", "),
    };
    let begun = plan
        .from
        .next
        .as_ref()
        .map_or("", |_| "it has begun already; ");
    let (before, after) = (from.nodes().len(), to.nodes().len());
    let size = ByteSize(plan.bytes as u64).display().si();
    format!(
        "{before} → {after} nodes: {begun}{changes}; {} % of the keys move; about {}, {size:.0}\n\
         there is no cancel: to go back, let it end, and change back\n",
        moved(plan),
        text::about(plan.keys, "key"),
    )
}

/// How many of a hundred keys get another owner.
fn moved(plan: &Plan) -> usize {
    let (from, to) = (&plan.from.ring, plan.to.as_ref().unwrap_or(&plan.from.ring));
    let (before, after) = (from.nodes().len(), to.nodes().len());
    let stay = |hash: &usize| from.name(hash % before) == to.name(hash % after);
    let hashes = before * after;
    let moved = hashes - (0..hashes).filter(stay).count();
    (100 * moved + hashes / 2) / hashes
}
