//! Log collection: `… | logs push` on many hosts, `logs show` anywhere; `docs/programs.md` has more.
//!
//! The lines that came while others were on their way are a batch. It gets the next number of all batches, and is
//! written under this number until it is there: once, also where the outcome of a write was unknown. A number without
//! a batch, whose pusher has died, is left out. The numbers go round, since a key whose value has expired stays.

use futures::{StreamExt as _, future::try_join_all, stream};
use kv54::beyond::programs::{Failed, again, client, host, say, words};
use kv54::{client::Client, commands::shown, entry::Packed, error::Error};
use msgpack_rpc::Value;
use std::io::{BufRead, BufReader, Read as _, stdin};
use std::{mem::take, time::Duration};

/// So many batches are kept. A batch, or a long line, is cut at so many bytes.
const BATCHES: i64 = 1_000_000;
const BYTES: u64 = 64 << 10;

/// Sends the lines of standard input, which last so long.
async fn push(client: &Client, ttl: Duration) -> Result<(), Failed> {
    let (mut input, mut lines) = (BufReader::new(stdin()), Vec::new());
    while input.by_ref().take(BYTES).read_until(b'\n', &mut lines)? > 0 {
        let more = input.buffer().iter().rposition(|byte| *byte == b'\n');
        let more = more.map_or(0, |last| last as u64 + 1);
        input.by_ref().take(more).read_to_end(&mut lines)?;
        let number = i64::try_from(again(async || client.incr(b"logs", 1).await).await?)?;
        let batch = [number.into(), host().into(), Value::from(take(&mut lines))];
        let batch = client.lasting(&Packed::of(batch.to_vec()), ttl)?;
        again(async || client.set(&key(number), &batch).await).await?;
        client.replicas.settle().await; // nothing else happens while this waits for a line
    }
    Ok(())
}

/// Prints the lines of one host, or those of all with the host before them.
async fn show(client: &Client, host: Option<&str>) -> Result<(), Failed> {
    let last = client.get(b"logs").await?.value()?.as_i64().unwrap_or(0);
    let mut numbers = stream::iter(1.max(last.saturating_sub(BATCHES - 1))..=last).chunks(64);
    let get = async |number| Ok::<_, Error>((number, client.get(&key(number)).await?.value()?));
    while let Some(some) = numbers.next().await {
        // None is on its way while this waits for who reads them, or it would seem late.
        for (number, batch) in try_join_all(some.into_iter().map(get)).await? {
            let from = batch[1].as_str().unwrap_or_default();
            let lines = batch[2].as_slice().unwrap_or_default();
            if batch[0] == number.into() && host.is_none_or(|host| host == from) {
                let head = host.map_or(format!("{from}: "), |_| String::new());
                for line in BufRead::split(lines, b'\n') {
                    say(shown([head.as_bytes(), &line?, b"\n"].concat()))?;
                }
            }
        }
    }
    Ok(())
}

fn key(number: i64) -> Vec<u8> {
    format!("logs:{}", number.rem_euclid(BATCHES)).into()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failed> {
    let (client, words) = (client()?, words());
    match &words.iter().map(|word| &**word).collect::<Vec<_>>()[..] {
        ["push"] => push(&client, Duration::from_secs(7 * 86_400)).await,
        ["push", ttl] => push(&client, humantime::parse_duration(ttl)?).await,
        ["show"] => show(&client, None).await,
        ["show", host] => show(&client, Some(host)).await,
        _ => Err("logs push [TIME], or logs show [HOST]".into()),
    }
}
