//! What is larger than a value may be lies in pieces beside its key. The key's own value, `[version, id, crc32]`, says
//! which pieces are one whole. It is written last: a reader finds all of the new bytes, or all of the old ones.

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use msgpack_rpc::Value;

use crate::beyond::swap::Swapped;
use crate::client::Client;
use crate::entry::Packed;
use crate::error::{Error, Kind, plain};

/// The bytes of a piece: also a slow network carries one within a window.
const PIECE: usize = 256 << 10;
/// How many pieces travel at once.
const AT_ONCE: usize = 4;

impl Client {
    /// Writes bytes as one whole; their version, which is one above the former. An error says whether the former bytes
    /// are still there, or (`unknown-outcome:`) the new ones may be. Then, if its process ends in the middle, and if the
    /// pieces of a write that fails cannot be deleted, some stay that belong to nothing.
    pub async fn set_large(&self, key: &[u8], bytes: &[u8]) -> Result<u64, Error> {
        let (id, crc32) = (fastrand::u64(..), crc32fast::hash(bytes));
        let set = async |(n, bytes)| self.set(&piece(key, id, n), &Packed::of(bytes)).await;
        let sets = stream::iter((0..).zip(bytes.chunks(PIECE))).map(set);
        let all = sets.buffer_unordered(AT_ONCE).try_collect::<()>().await;
        if let Err(error) = all {
            self.replicas.settle().await;
            for (n, _) in (0..).zip(bytes.chunks(PIECE)) {
                if self.delete(&piece(key, id, n)).await.is_err() {
                    break;
                }
            }
            return Err(error.of_read()); // nobody has heard of these pieces yet
        }
        loop {
            let old = self.get(key).await?;
            let [former, old_id, _] = head(&old).unwrap_or_default();
            let version = former.saturating_add(1);
            let new = [version, id, crc32.into()].map(Value::from).to_vec();
            if let Swapped::Done(_) = self.cas(key, &old, &Packed::of(new)).await? {
                let _ = self.delete_pieces(key, old_id).await; // the new ones are there all the same
                return Ok(version);
            }
        }
    }

    /// The bytes that were written last, and their version; `None` where there are none.
    pub async fn get_large(&self, key: &[u8]) -> Result<Option<(u64, Vec<u8>)>, Error> {
        loop {
            let now = self.get(key).await?;
            let Some([version, id, crc32]) = head(&now) else {
                return Ok(None);
            };
            let mut bytes = Vec::new();
            for n in 0.. {
                let piece = self.get(&piece(key, id, n)).await?.value()?;
                let Some(more) = piece.as_slice() else { break };
                bytes.extend_from_slice(more);
            }
            if u64::from(crc32fast::hash(&bytes)) == crc32 {
                return Ok(Some((version, bytes)));
            }
            if self.get(key).await? == now {
                let why = format!("pieces of key {:?} are missing", plain(key));
                return Err(Error::new(Kind::Unavailable, why));
            }
        }
    }

    async fn delete_pieces(&self, key: &[u8], id: u64) -> Result<(), Error> {
        for n in 0.. {
            let piece = piece(key, id, n);
            if self.get(&piece).await?.is_nil() {
                break;
            }
            self.delete(&piece).await?;
        }
        Ok(())
    }
}

/// Version, id and crc32 of what is there.
fn head(value: &Packed) -> Option<[u64; 3]> {
    let value = value.value().ok()?;
    let numbers = value.as_array()?.iter().map(Value::as_u64);
    numbers.collect::<Option<Vec<u64>>>()?.try_into().ok()
}

fn piece(key: &[u8], id: u64, n: u64) -> Vec<u8> {
    [key, format!(":{id:016x}:{n}").as_bytes()].concat()
}
