//! The same load through kv54's own client, in this process: connections × depth operations at once.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::task::JoinSet;

use super::{Answer, Load, Op, Phase, Report, Source, Tally, Values, key, watch};
use crate::client::Client;
use crate::entry::Packed;
use crate::rpc::codec::string;
use crate::rpc::lock;

/// kv54's own client, to be loaded.
pub struct Own {
    load: Load,
    client: Arc<Client>,
    values: Arc<Values>,
    tally: Arc<Mutex<Tally>>,
}

impl Own {
    /// Loads this client.
    pub fn new(load: &Load, client: Client) -> Result<Self, String> {
        Ok(Own {
            load: load.clone(),
            client: Arc::new(client),
            values: Arc::new(Values::new(load.value_size)),
            tally: Arc::new(Mutex::new(Tally::new()?)),
        })
    }

    /// Runs one phase, as [`Bench::run`](super::Bench::run) does.
    pub async fn run(&mut self, phase: Phase, tick: impl FnMut(u64)) -> Report {
        let at_once = usize::from(self.load.connections) * usize::from(self.load.depth);
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for place in 0..at_once {
            let source = Source::new(&self.load, phase, start, place, at_once);
            let (client, values) = (self.client.clone(), self.values.clone());
            tasks.spawn(ask(client, values, self.tally.clone(), source));
        }
        watch(tasks, &self.tally, tick, |()| ()).await
    }
}

/// One operation after the other.
async fn ask(
    client: Arc<Client>,
    values: Arc<Values>,
    tally: Arc<Mutex<Tally>>,
    mut source: Source,
) -> Option<()> {
    let mut now = Instant::now();
    while let Some((op, number)) = source.next(now) {
        let asked = (op, number, now);
        let key = key(number);
        let answer = match op {
            Op::Get => client.get(&key).await,
            Op::Set => {
                let mut value = Vec::with_capacity(values.len());
                values.write(&mut value, number);
                let value = std::str::from_utf8(&value).unwrap_or_default();
                let set = client.set(&key, &Packed::of(value)).await;
                set.map(|()| Packed::default())
            }
        };
        now = Instant::now();
        let answer = match &answer {
            Ok(value) if value.is_nil() => Answer::Nil,
            Ok(value) => Answer::Value(string(value).unwrap_or_default()),
            Err(error) => Answer::Error(error.to_string()),
        };
        lock(&tally).count(asked, now, &answer, &values);
    }
    Some(())
}
