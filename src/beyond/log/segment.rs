//! A segment of the log, as bytes: a file of zeros into which frames are written, one behind the other. A
//! frame fills whole sectors, and each sector is written once and has a checksum of its own. So a
//! reader can tell the last frame, of which a power cut left some sectors unwritten, from damage:
//! there, what is not verified is not zero, or is not the end. `docs/disk.md` has it byte by byte.

/// What a disk writes whole or not at all.
pub const SECTOR: usize = 512;
/// Of a sector, what stands before its piece of the body: checksum, place in the frame, sectors of
/// the frame behind it, length of the piece.
const HEAD: usize = 10;
const PIECE: usize = SECTOR - HEAD;

/// The first bytes of each header.
const MAGIC: &[u8; 8] = b"kv54 log";
/// The version of this format.
pub const VERSION: u8 = 1;

/// What a frame is for: the first byte of its body.
const HEADER: u8 = 0;
const RECORDS: u8 = 1;
const CLOSING: u8 = 2;

/// What stands in a frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// The first one of each segment: whose it is.
    Header(Header),
    /// What was committed together, as a MessagePack array.
    Records(Vec<u8>),
    /// The last one, once another segment goes on: the number of that.
    Closing(u64),
}

/// Whose segment it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Of the format.
    pub version: u8,
    /// Of the file, in bytes.
    pub size: u32,
    /// A number that was drawn when the log began: two logs of one node have different ones.
    pub log: u64,
    /// The name of the node.
    pub node: String,
}

/// Whether all that was ever written to a segment is there.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It is.
    Whole,
    /// The last frame is not whole, so nothing was answered that depends on it.
    TornLast,
    /// Something else is missing or wrong: why.
    Damaged(String),
}

/// A segment that was read.
#[derive(Debug, PartialEq)]
pub struct Segment {
    /// What stands in its whole frames, up to the first that is not.
    pub bodies: Vec<Body>,
    /// The sector behind them.
    pub end: usize,
    /// What is there behind them.
    pub verdict: Verdict,
}

/// A sector that is verified: where its frame begins and ends, and its piece of the body.
struct Sector<'a> {
    first: usize,
    last: usize,
    piece: &'a [u8],
}

impl Body {
    /// As it is written.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Body::Records(records) => [&[RECORDS], &**records].concat(),
            Body::Closing(next) => [&[CLOSING], &next.to_le_bytes()[..]].concat(),
            Body::Header(Header {
                version,
                size,
                log,
                node,
            }) => [
                &[HEADER],
                &MAGIC[..],
                &[*version],
                &size.to_le_bytes(),
                &log.to_le_bytes(),
                node.as_bytes(),
            ]
            .concat(),
        }
    }

    /// Reads it; else why it cannot be read.
    fn read(bytes: &[u8]) -> Result<Body, String> {
        let odd = || "a frame of no known kind".to_owned();
        match bytes.split_first().ok_or_else(odd)? {
            (&RECORDS, records) => Ok(Body::Records(records.to_owned())),
            (&CLOSING, next) => match next.try_into() {
                Ok(next) => Ok(Body::Closing(u64::from_le_bytes(next))),
                Err(_) => Err(odd()),
            },
            (&HEADER, header) => Header::read(header).ok_or_else(odd).map(Body::Header),
            _ => Err(odd()),
        }
    }
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.strip_prefix(MAGIC)?.split_first()?;
        let (size, rest) = rest.split_first_chunk()?;
        let (log, node) = rest.split_first_chunk()?;
        Some(Header {
            version: *version,
            size: u32::from_le_bytes(*size),
            log: u64::from_le_bytes(*log),
            node: String::from_utf8(node.to_owned()).ok()?,
        })
    }
}

/// How many sectors the frame of such a body takes.
pub fn sectors(body: usize) -> usize {
    body.div_ceil(PIECE)
}

/// A frame that begins at this sector of the segment with this number. Its body has at most 65,535 sectors.
pub fn frame(segment: u64, at: usize, body: &[u8]) -> Vec<u8> {
    let count = sectors(body.len());
    let mut frame = Vec::with_capacity(count * SECTOR);
    for (nth, piece) in body.chunks(PIECE).enumerate() {
        let start = frame.len();
        frame.extend_from_slice(&[0; 4]);
        for number in [nth, count - 1 - nth, piece.len()] {
            frame.extend_from_slice(&u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes());
        }
        frame.extend_from_slice(piece);
        frame.resize(start + SECTOR, 0);
        if let Some((sum, rest)) = frame
            .get_mut(start..)
            .and_then(<[u8]>::split_first_chunk_mut)
        {
            *sum = checksum(segment, at + nth, rest).to_le_bytes();
        }
    }
    frame
}

/// Of a sector, by where it stands: what was meant for another place is wrong here.
fn checksum(segment: u64, at: usize, rest: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&segment.to_le_bytes());
    sum.update(&(at as u64).to_le_bytes());
    sum.update(rest);
    sum.finalize()
}

impl<'a> Sector<'a> {
    /// Reads it; `None` if it is not as it was written.
    fn read(segment: u64, at: usize, bytes: &'a [u8]) -> Option<Self> {
        let (sum, rest) = bytes.split_first_chunk()?;
        if u32::from_le_bytes(*sum) != checksum(segment, at, rest) {
            return None;
        }
        let (head, piece) = rest.split_first_chunk::<{ HEAD - 4 }>()?;
        let [nth, left, length] = [[head[0], head[1]], [head[2], head[3]], [head[4], head[5]]]
            .map(|number| usize::from(u16::from_le_bytes(number)));
        Some(Sector {
            first: at.checked_sub(nth)?,
            last: at + left,
            piece: piece.get(..length).filter(|piece| !piece.is_empty())?,
        })
    }
}

/// Reads the segment with this number.
pub fn read(segment: u64, bytes: &[u8]) -> Segment {
    let sectors: Vec<&[u8]> = bytes.chunks(SECTOR).collect();
    let (mut bodies, mut end) = (Vec::new(), 0);
    let verdict = loop {
        let Some((body, next)) = body(segment, &sectors, end) else {
            break rest(segment, &sectors, end);
        };
        match Body::read(&body) {
            Ok(body) => bodies.push(body),
            Err(why) => break Verdict::Damaged(format!("{why} at byte {}", end * SECTOR)),
        }
        end = next;
    };
    let is_long = |header: &Header| header.size as usize == bytes.len();
    let begins = matches!(bodies.first(), Some(Body::Header(header)) if is_long(header));
    let verdict = match verdict {
        damaged @ Verdict::Damaged(_) => damaged,
        _ if !begins => Verdict::Damaged(format!("{} bytes that do not begin well", bytes.len())),
        verdict => verdict,
    };
    Segment {
        bodies,
        end,
        verdict,
    }
}

/// The body of the frame that begins at this sector, and where the next one begins; `None` if it is not whole.
fn body(segment: u64, sectors: &[&[u8]], at: usize) -> Option<(Vec<u8>, usize)> {
    let last = Sector::read(segment, at, sectors.get(at)?)?.last;
    let mut body = Vec::new();
    for place in at..=last {
        let sector = Sector::read(segment, place, sectors.get(place)?)?;
        if (sector.first, sector.last) != (at, last) {
            return None;
        }
        body.extend_from_slice(sector.piece);
    }
    Some((body, last + 1))
}

/// What is there from the first sector on that begins no whole frame: nothing, some sectors of one frame,
/// or something else.
fn rest(segment: u64, sectors: &[&[u8]], end: usize) -> Verdict {
    let (mut verdict, mut frame) = (Verdict::Whole, None);
    for (at, bytes) in sectors.iter().enumerate().skip(end) {
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        let seen = Sector::read(segment, at, bytes).map(|sector| (sector.first, sector.last));
        if seen.is_none_or(|(first, _)| first != end) || *frame.get_or_insert(seen) != seen {
            return Verdict::Damaged(format!("byte {} is not as it was written", at * SECTOR));
        }
        verdict = Verdict::TornLast;
    }
    verdict
}
