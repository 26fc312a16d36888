//! Any bytes through the parser of memcached's protocol: however the stream is cut, it finds the same
//! requests, and each is one that may be answered.
#![no_main]

use bytes::BytesMut;
use kv54::beyond::memcached::{Request, Stream, Verb};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|stream: &[u8]| {
    let whole = read(stream.chunks(stream.len().max(1)));
    assert_eq!(whole, read(stream.chunks(1)), "byte by byte");
    assert_eq!(whole, read(cut_by_itself(stream)), "in pieces");
    for request in &whole {
        judge(request);
    }
});

/// All requests that are found in these pieces.
fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Request> {
    let (mut stream, mut input, mut found) = (Stream::default(), BytesMut::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        while let Some(request) = stream.next(&mut input) {
            found.push(request);
        }
    }
    found
}

/// Pieces as long as their first bytes say.
fn cut_by_itself(mut stream: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = usize::from(stream.first()? % 16) + 1;
        let (piece, rest) = stream.split_at(length.min(stream.len()));
        stream = rest;
        Some(piece)
    })
}

fn judge(request: &Request) {
    let Request {
        verb, key, value, ..
    } = request;
    assert!(key.len() <= 2048 && value.len() <= 1 << 20, "{request:?}");
    match verb {
        Verb::Said { line, .. } => assert!(!line.contains('\n'), "{line}"),
        Verb::Flush | Verb::Stats => {}
        _ => {
            assert!((1..=250).contains(&key.len()), "{request:?}");
            let is_plain = !key
                .iter()
                .any(|byte| byte.is_ascii_control() || *byte == b' ');
            let is_base64 = request.meta.as_ref().is_some_and(|flags| {
                flags
                    .split(|byte| *byte == b' ')
                    .any(|flag| flag.starts_with(b"b"))
            });
            assert!(is_plain || is_base64, "{request:?}");
        }
    }
}
