//! `resize`: changes the running ring to that of the file.

use std::cell::RefCell;
use std::collections::HashSet;
use std::process::ExitCode;
use std::sync::Arc;

use bytesize::ByteSize;
use clap::Args;
use serde_json::json;

use super::{Failure, Options, Outcome, bar, print, remark, text};
use crate::beyond::rings::{Driver, Plan, Progress};
use crate::cluster::Cluster;
use crate::error::Error;

/// Change the running ring to that of the file, while reads and writes go on.
///
/// [nodes] has the names of the new ring, and [leaving] those that go. Copy the file to all hosts,
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
        let (client, file) = (options.client()?, options.cluster()?);
        let (bar, said) = (bar(BAR, Some(0)), RefCell::new(HashSet::new()));
        let driver = Driver {
            client: &client,
            file: &file,
            again: self.again,
            progress: &|progress| match progress {
                Progress::Keys(keys) => bar.set_position(keys as u64),
                Progress::Waits(name, error) => {
                    let line = format!("waiting for {name}: {}", error.why);
                    if said.borrow_mut().insert(line.clone()) {
                        bar.suspend(|| remark(line));
                    }
                }
            },
        };
        let refused = |error: Error| Failure::usage(error.why).with("nothing is changed");
        let plan = driver.plan().await.map_err(refused)?;
        if !options.json {
            print(in_words(&plan))?;
        }
        if !self.dry_run {
            bar.set_length(plan.keys as u64);
            let failed = |error: Error| Failure {
                why: error.why.clone(),
                ..error.into()
            };
            driver.carry_out(&plan).await.map_err(failed)?;
            bar.finish_and_clear();
        }
        let (from, ring) = (
            plan.from.ring.names(),
            plan.to.as_ref().unwrap_or(&plan.from.ring),
        );
        let done = json!({
            "from": from, "to": ring.names(), "moved_percent": moved(&plan),
            "keys": plan.keys, "bytes": plan.bytes, "done": !self.dry_run || plan.to.is_none(),
        });
        match (options.json, self.dry_run || plan.to.is_none()) {
            (true, _) => options.print(&done, ""),
            (_, true) => Ok(ExitCode::SUCCESS),
            _ => print(format!("done: the ring is {}\n", ring.names().join(" "))),
        }
    }
}

const BAR: &str = "{wide_bar} {percent} %  {per_sec}, {eta} left";

/// What is to be done, in words.
fn in_words(plan: &Plan) -> String {
    let from = &plan.from.ring;
    let Some(to) = &plan.to else {
        return format!(
            "the ring is {}: nothing is to be done\n",
            from.names().join(" ")
        );
    };
    let [come, go] = [(to, from), (from, to)].map(|(one, other): (&Arc<Cluster>, _)| {
        let names = one.names().into_iter();
        let names: Vec<&str> = names.filter(|name| other.place(name).is_none()).collect();
        let verb = |verb: &str| {
            format!(
                "{} {verb}{}",
                text::and(&names),
                if names.len() == 1 { "s" } else { "" }
            )
        };
        (!names.is_empty()).then(|| [verb("come"), verb("leave")])
    });
    let changes = [come.map(|[come, _]| come), go.map(|[_, leave]| leave)];
    let mut changes: Vec<String> = changes.into_iter().flatten().collect();
    if changes.is_empty() {
        changes.push("the same names, without what was deleted".to_owned());
    }
    let begun = if plan.from.next.is_some() {
        "it has begun already; "
    } else {
        ""
    };
    let (before, after, size) = (
        from.nodes().len(),
        to.nodes().len(),
        ByteSize(plan.bytes as u64).display().si(),
    );
    format!(
        "{before} → {after} nodes: {begun}{}; {} % of the keys move; about {}, {size:.0}\n\
         there is no cancel: to go back, let it end, and change back\n",
        changes.join(", "),
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
