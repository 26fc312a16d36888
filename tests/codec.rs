//! Bytes to messages and back: however the network cuts them, up to the limits and not beyond.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use bytes::BytesMut;
use kv54::entry::Packed;
use kv54::error::{Error, Kind};
use kv54::rpc::codec::{
    self, Bounds, Codec, MESSAGE, Malformed, check, decode, encode, write_request, write_response,
};
use kv54::status::Status;
use msgpack_rpc::Value;
use msgpack_rpc::message::{Message, Notification, Request, Response};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_survive_any_cut_of_the_stream(messages in vec(message(), 1..8), cuts in vec(any::<Index>(), 0..20)) {
        let (stream, ends) = laid_end_to_end(&messages);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
        cuts.push(stream.len());
        cuts.sort_unstable();
        arrives_in_pieces(&messages, &stream, &ends, cuts);
    }

    #[test]
    fn messages_survive_byte_by_byte(messages in vec(message(), 1..4)) {
        let (stream, ends) = laid_end_to_end(&messages);
        arrives_in_pieces(&messages, &stream, &ends, 1..=stream.len());
    }

    #[test]
    fn random_bytes_do_no_harm(noise in vec(any::<u8>(), 0..2000)) {
        read_all(&noise, noise.len());
    }

    #[test]
    fn bytes_that_begin_like_a_message_do_no_harm(noise in vec(any::<u8>(), 0..500), kind in 0..4_u8) {
        let mut bytes = vec![0x94, kind];
        bytes.extend(noise);
        read_all(&bytes, bytes.len());
    }

    #[test]
    fn a_damaged_stream_is_judged_alike_however_it_is_cut(
        messages in vec(message(), 1..4),
        damage in vec((any::<Index>(), any::<u8>()), 1..6),
    ) {
        let (mut stream, _) = laid_end_to_end(&messages);
        for (place, byte) in damage {
            let place = place.index(stream.len());
            stream[place] = byte;
        }
        let at_once = read_all(&stream, stream.len());
        prop_assert_eq!(&at_once, &read_all(&stream, 1));
        prop_assert_eq!(&at_once, &read_all(&stream, 7));
    }

    #[test]
    fn any_value_passes_its_own_bounds_and_no_tighter_ones(value in value()) {
        let bytes = encode(&value);
        let exact = measured(&value);
        prop_assert!(check(&bytes, exact).is_ok());
        let tighter = [
            (exact.bytes > 0).then(|| Bounds { bytes: exact.bytes - 1, ..exact }),
            (exact.values > 0).then(|| Bounds { values: exact.values - 1, ..exact }),
            (exact.depth > 0).then(|| Bounds { depth: exact.depth - 1, ..exact }),
        ];
        for bounds in tighter.into_iter().flatten() {
            let refused = check(&bytes, bounds).unwrap_err();
            prop_assert_eq!(refused.kind, Kind::TooLarge, "{:?}", bounds);
        }
    }

    #[test]
    fn what_is_written_is_read_by_others(
        id in any::<u32>(),
        method in ".{0,40}",
        params in vec(value(), 0..=15),
        result in value(),
    ) {
        let encoded: Vec<Vec<u8>> = params.iter().map(encode).collect();
        let encoded: Vec<&[u8]> = encoded.iter().map(Vec::as_slice).collect();
        let mut written = Vec::new();
        write_request(&mut written, id, &method, u8::try_from(encoded.len()).unwrap(), &encoded);
        let request = Request { id, method, params };
        reads_back(&written, &Message::Request(request));

        written.clear();
        write_response(&mut written, id, &Ok(Packed::of(result.clone()).into()));
        reads_back(&written, &Message::Response(Response { id, result: Ok(result) }));

        written.clear();
        write_response(&mut written, id, &Err(Error::new(Kind::Full, "no room")));
        let told = Value::from("full: no room");
        reads_back(&written, &Message::Response(Response { id, result: Err(told) }));
    }
}

#[test]
fn a_str_that_is_not_utf8_survives_as_bytes() {
    let old_raw = [0x94, 0, 7, 0xa3, b'g', b'e', b't', 0x91, 0xa2, 0xff, 0xfe];
    let Message::Request(request) = whole(&old_raw).unwrap() else {
        panic!("no request");
    };
    assert_eq!(request.params[0].as_slice(), Some(&[0xff, 0xfe][..]));
}

#[test]
fn a_long_header_says_the_same_as_a_short_one() {
    let short = [0x94, 0, 7, 0xa3, b'g', b'e', b't', 0x91, 0xa1, b'k'];
    let long: &[&[u8]] = &[
        &[0xdd, 0, 0, 0, 4],
        &[0xcf, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0xd3, 0, 0, 0, 0, 0, 0, 0, 7],
        &[0xdb, 0, 0, 0, 3, b'g', b'e', b't'],
        &[0xdc, 0, 1],
        &[0xda, 0, 1, b'k'],
    ];
    assert_eq!(whole(&long.concat()).unwrap(), whole(&short).unwrap());
}

#[test]
fn a_method_may_be_sent_as_bin() {
    let bytes = [0x94, 0, 7, 0xc4, 3, b'g', b'e', b't', 0x90];
    let request = Request {
        id: 7,
        method: "get".into(),
        params: Vec::new(),
    };
    assert_eq!(whole(&bytes).unwrap(), Message::Request(request));
}

#[test]
fn a_msgid_may_be_anything_that_fits() {
    for id in [0, 127, 128, 255, 256, 65_535, 65_536, u32::MAX] {
        let message = items([0.into(), id.into(), "get".into(), items([])]);
        let request = whole(&encode(&message)).unwrap();
        assert!(matches!(request, Message::Request(Request { id: read, .. }) if read == id));
    }
}

#[test]
fn a_message_of_4_mib_passes_and_one_byte_more_does_not() {
    let set = |length: usize| {
        let value = Value::Binary(vec![b'x'; length]);
        encode(&request(vec!["k".into(), value]))
    };
    let header = set(1 << 20).len() - (1 << 20);
    let largest = set(MESSAGE.bytes - header);
    assert_eq!(largest.len(), 4 << 20);
    whole(&largest).unwrap();
    // The header is enough: not one of the bytes that it announces has to come.
    refused_at_its_last_byte(&set(MESSAGE.bytes - header + 1)[..header], Some(7));
}

#[test]
fn a_message_of_many_parts_is_measured_as_a_whole() {
    let part = Value::Binary(vec![b'x'; 1 << 20]);
    let bytes = encode(&request(vec![part; 4]));
    let last_header = bytes.len() - (1 << 20);
    refused_at_its_last_byte(&bytes[..last_header], Some(7));
}

#[test]
fn a_message_of_65536_values_passes_and_one_more_does_not() {
    // Beside the parameters there are four: type, msgid, method and their array.
    let call = |params: usize| encode(&request(vec![Value::Nil; params]));
    whole(&call(65_532)).unwrap();
    refused_somewhere(&call(65_533), Some(7));
    // In a map the keys count too; the map is one more.
    let pairs = |count: u32| {
        let pairs = (0..count).map(|n| (n.into(), Value::Nil)).collect();
        encode(&request(vec![Value::Map(pairs), Value::Nil]))
    };
    whole(&pairs(32_765)).unwrap();
    refused_somewhere(&pairs(32_766), Some(7));
}

#[test]
fn a_message_16_levels_deep_passes_and_one_more_does_not() {
    let nested = |levels: usize, around: fn(Value) -> Value| {
        // The message and its parameters are two levels themselves.
        encode(&request(vec![
            (2..levels).fold(Value::Nil, |inner, _| around(inner)),
        ]))
    };
    for around in [
        |inner| items([inner]),
        |inner| Value::Map(vec![(Value::Nil, inner)]),
        |inner| Value::Map(vec![(inner, Value::Nil)]),
    ] {
        whole(&nested(16, around)).unwrap();
        refused_somewhere(&nested(17, around), Some(7));
    }
    // Levels that have ended do not count: side by side is not deep.
    whole(&encode(&request(vec![items([items([])]); 100]))).unwrap();
}

#[test]
fn a_header_of_4_gib_is_refused_as_soon_as_it_is_there() {
    let before: [(&[u8], Option<u32>); 8] = [
        (&[0x94, 0, 7], Some(7)), // where the method should be
        (&[0x94, 0, 7, 0xa3, b's', b'e', b't'], Some(7)), // the parameters
        (&[0x94, 0, 7, 0xa3, b's', b'e', b't', 0x91], Some(7)), // a parameter
        (&[0x94, 0, 0xce, 0xff, 0xff, 0xff, 0xff], Some(u32::MAX)),
        (&[0x94, 0], None),                               // the msgid
        (&[0x94], None),                                  // the type
        (&[0x94, 1, 7, 0xc0], None),                      // an answer is not answered
        (&[0x93, 2, 0xa3, b's', b'e', b't', 0x92], None), // nor is a notification
    ];
    // ext, bin, str, array, map
    for header in [0xc9, 0xc6, 0xdb, 0xdd, 0xdf] {
        for (before, id) in before {
            let bytes = [before, &[header, 0xff, 0xff, 0xff, 0xff]].concat();
            refused_at_its_last_byte(&bytes, id);
        }
    }
    refused_at_its_last_byte(&[0xdd, 0xff, 0xff, 0xff, 0xff], None);
}

#[test]
fn what_is_refused_at_its_first_header_is_nobodys_however_much_has_arrived() {
    let bytes = [0xdd, 0, 1, 0, 1, 0, 7];
    for seen in 5..=bytes.len() {
        let refused = whole(&bytes[..seen]).unwrap_err();
        assert_eq!(verdict(&refused), (Kind::TooLarge, None, false));
    }
}

#[test]
fn the_byte_that_messagepack_never_uses_is_refused() {
    let bytes = [0x94, 0, 7, 0xa3, b's', b'e', b't', 0x92, 0xa1, b'k', 0xc1];
    let (last, before) = bytes.split_last().unwrap();
    let (mut codec, mut input) = (Codec::default(), BytesMut::from(before));
    assert!(next(&mut codec, &mut input).unwrap().is_none());
    input.extend([*last]);
    let refused = next(&mut codec, &mut input).unwrap_err();
    assert_eq!(verdict(&refused), (Kind::BadRequest, Some(7), false));
}

#[test]
fn what_was_refused_is_refused_again() {
    let mut codec = Codec::default();
    for _ in 0..2 {
        let refused = codec.next(b"\x94\x00\x07\xa3get\xdd\xff\xff\xff\xff");
        assert_eq!(refused.unwrap_err().error.kind, Kind::TooLarge);
    }
}

#[test]
fn what_is_not_one_whole_array_has_no_items() {
    let whole = [0x92, 0x01, 0xa1, b'k'];
    assert_eq!(
        codec::items(&whole).unwrap()[..],
        [&whole[1..2], &whole[2..]]
    );
    let odd: [&[u8]; 5] = [
        &whole[..3],
        &[0x92, 0x01],
        &[0x91, 0xc1],
        &[0x91, 1, 2],
        &[0xa1, b'k'],
    ];
    for bytes in odd {
        assert_eq!(codec::items(bytes), None, "{bytes:?}");
    }
    assert!(codec::items(&[0x90]).unwrap().is_empty());
}

#[test]
fn no_text_of_another_node_commands_a_terminal() {
    let status = |state: &str| {
        let names = vec![Value::from("bob")];
        let fields = [("state", state.into()), ("waiting_for", Value::from(names))];
        let fields = fields.map(|(name, value)| (Value::from(name), value));
        Status::read(&encode(&Value::Map(fields.into())))
    };
    assert_eq!(status("joining").unwrap().waiting_for, ["bob"]);
    let state = status("\x1b[2J\u{9b}\nready").unwrap().state;
    assert_eq!(state, "\\u{1b}[2J\\u{9b}\\nready");
    let error = Error::parse("full: \x1b[2J\nready");
    assert_eq!(error.to_string(), "full: \\u{1b}[2J\\nready");
}

#[test]
fn a_status_of_an_older_version_is_no_reason_for_a_doubt() {
    let fields = vec![(Value::from("state"), Value::from("joining"))];
    let status = Status::read(&encode(&Value::Map(fields))).unwrap();
    assert!(status.is_ready_for("alice") && status.doubts.is_empty());
}

#[test]
fn who_speaks_something_else_is_refused_at_the_first_byte() {
    let strangers: [&[u8]; 7] = [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00", // TLS
        b"SSH-2.0-",
        b"*1\r\n$4\r\nPING\r\n", // redis
        b"\0\0\0\x17",           // a length first
        b"\x84\xa6method",       // a map
        b"\xc1",
    ];
    for stranger in strangers {
        for seen in 1..=stranger.len() {
            let refused = whole(&stranger[..seen]).unwrap_err();
            assert_eq!(
                verdict(&refused),
                (Kind::BadRequest, None, false),
                "{stranger:?}"
            );
        }
    }
}

#[test]
fn a_request_of_the_wrong_shape_can_be_answered_and_the_next_one_read() {
    let (id, get) = (Value::from(7), Value::from("get"));
    let shapes = [
        vec![0.into(), id.clone()],
        vec![0.into(), id.clone(), get.clone()],
        vec![0.into(), id.clone(), items([])],
        vec![0.into(), id.clone(), get.clone(), items([]), Value::Nil],
        vec![0.into(), id.clone(), 5.into(), items([])],
        vec![0.into(), id.clone(), Value::Nil, items([])],
        vec![
            0.into(),
            id.clone(),
            Value::Binary(vec![0xff, 0xfe]),
            items([]),
        ],
        vec![0.into(), id.clone(), get.clone(), Value::Map(Vec::new())],
        vec![0.into(), id.clone(), get.clone(), Value::Nil],
        vec![0.into(), id.clone(), get.clone(), "k".into()],
    ];
    for shape in shapes {
        let bytes = encode(&Value::Array(shape));
        let after = encode(&request(vec!["k".into()]));
        let (mut codec, mut input) = (Codec::default(), BytesMut::from(&*[bytes, after].concat()));
        let refused = next(&mut codec, &mut input).unwrap_err();
        assert_eq!(
            verdict(&refused),
            (Kind::BadRequest, Some(7), true),
            "{refused:?}"
        );
        assert!(matches!(
            next(&mut codec, &mut input).unwrap(),
            Some(Message::Request(_))
        ));
        assert!(input.is_empty());
    }
}

#[test]
fn what_nobody_can_be_answered_for_ends_the_stream() {
    let (id, get) = (Value::from(7), Value::from("get"));
    let shapes = [
        vec![],
        vec![0.into()],
        vec![0.into(), (-1).into(), get.clone(), items([])],
        vec![0.into(), (1_u64 << 32).into(), get.clone(), items([])],
        vec![0.into(), 7.0.into(), get.clone(), items([])],
        vec![0.into(), "7".into(), get.clone(), items([])],
        vec![0.into(), Value::Nil, get.clone(), items([])],
        vec![1.into(), id.clone(), Value::Nil],
        vec![1.into(), id.clone(), Value::Nil, Value::Nil, Value::Nil],
        vec![1.into(), (-1).into(), Value::Nil, Value::Nil],
        vec![2.into(), get.clone()],
        vec![2.into(), get.clone(), "k".into()],
        vec![2.into(), 5.into(), items([])],
        vec![3.into(), id.clone(), get.clone(), items([])],
        vec![(-1).into(), id.clone(), get.clone(), items([])],
        vec![Value::Nil, id.clone(), get.clone(), items([])],
        vec![false.into(), id.clone(), get.clone(), items([])],
    ];
    for shape in shapes {
        let refused = whole(&encode(&Value::Array(shape))).unwrap_err();
        assert_eq!(
            verdict(&refused),
            (Kind::BadRequest, None, false),
            "{refused:?}"
        );
    }
}

fn items<const N: usize>(items: [Value; N]) -> Value {
    Value::Array(items.into())
}

/// A `set` with the msgid 7.
fn request(params: Vec<Value>) -> Value {
    items([0.into(), 7.into(), "set".into(), Value::Array(params)])
}

/// The next message, taken off the front, as one who answers or else one who asked reads it.
fn next(codec: &mut Codec, input: &mut BytesMut) -> Result<Option<Message>, Malformed> {
    let Some(end) = codec.next(input)? else {
        return Ok(None);
    };
    let message = input.split_to(end);
    if let Ok(codec::Response { id, result }) = codec::Response::read(&message) {
        let result = result.map(|value| decode(value).unwrap());
        let result = result.map_err(|value| decode(value).unwrap());
        return Ok(Some(Message::Response(Response { id, result })));
    }
    let codec::Request { id, method, params } = codec::Request::read(&message)?;
    let method = method.to_owned();
    let params = params.iter().map(|value| decode(value).unwrap()).collect();
    Ok(Some(match id {
        Some(id) => Message::Request(Request { id, method, params }),
        None => Message::Notification(Notification { method, params }),
    }))
}

/// The one message that these bytes are.
#[track_caller]
fn whole(bytes: &[u8]) -> Result<Message, Malformed> {
    let mut input = BytesMut::from(bytes);
    let message = next(&mut Codec::default(), &mut input)?;
    assert!(input.is_empty(), "{} bytes are left", input.len());
    Ok(message.unwrap())
}

/// What a caller hears, and whether it may go on.
fn verdict(refused: &Malformed) -> (Kind, Option<u32>, bool) {
    (refused.error.kind, refused.id, refused.recoverable)
}

/// All but the last of these bytes could be the beginning of a message; the last one is too much.
#[track_caller]
fn refused_at_its_last_byte(bytes: &[u8], id: Option<u32>) {
    let (mut codec, mut input) = (Codec::default(), BytesMut::new());
    let (last, before) = bytes.split_last().unwrap();
    for byte in before {
        input.extend([*byte]);
        let message = next(&mut codec, &mut input).unwrap();
        assert!(message.is_none(), "{message:?}");
    }
    input.extend([*last]);
    let refused = next(&mut codec, &mut input).unwrap_err();
    assert_eq!(
        verdict(&refused),
        (Kind::TooLarge, id, false),
        "{refused:?}"
    );
}

#[track_caller]
fn refused_somewhere(bytes: &[u8], id: Option<u32>) {
    let refused = next(&mut Codec::default(), &mut bytes.into()).unwrap_err();
    assert_eq!(
        verdict(&refused),
        (Kind::TooLarge, id, false),
        "{refused:?}"
    );
}

/// The messages as rmpv writes them, and where in the stream each of them ends.
fn laid_end_to_end(messages: &[Message]) -> (Vec<u8>, Vec<usize>) {
    let mut stream = Vec::new();
    let ends = messages.iter().map(|message| {
        rmpv::encode::write_value(&mut stream, &message.as_value()).unwrap();
        stream.len()
    });
    let ends = ends.collect();
    (stream, ends)
}

/// Each message is given out at its own last byte: not before, and no byte of the next is taken.
fn arrives_in_pieces(
    messages: &[Message],
    stream: &[u8],
    ends: &[usize],
    cuts: impl IntoIterator<Item = usize>,
) {
    let (mut codec, mut input) = (Codec::default(), BytesMut::new());
    let (mut from, mut read) = (0, Vec::new());
    for cut in cuts {
        input.extend(&stream[from..cut]);
        from = cut;
        read.extend(std::iter::from_fn(|| next(&mut codec, &mut input).unwrap()));
        let ended = ends.iter().filter(|end| **end <= cut);
        assert_eq!(read.len(), ended.clone().count(), "after {cut} bytes");
        assert_eq!(input.len(), cut - ended.max().unwrap_or(&0));
    }
    // As bytes: NaN is not equal to itself.
    let packed = |messages: &[Message]| -> Vec<Vec<u8>> { messages.iter().map(packed).collect() };
    assert_eq!(packed(&read), packed(messages));
}

fn packed(message: &Message) -> Vec<u8> {
    message.pack().unwrap()
}

/// What the codec makes of these bytes, `step` at a time, until it cannot go on.
fn read_all(bytes: &[u8], step: usize) -> Vec<Result<Vec<u8>, (Kind, bool)>> {
    let (mut codec, mut input, mut made) = (Codec::default(), BytesMut::new(), Vec::new());
    for chunk in bytes.chunks(step.max(1)) {
        input.extend(chunk);
        loop {
            let before = input.len();
            match next(&mut codec, &mut input) {
                Ok(None) => break,
                Ok(Some(message)) => made.push(Ok(packed(&message))),
                Err(refused) => {
                    made.push(Err((refused.error.kind, refused.recoverable)));
                    if !refused.recoverable {
                        return made;
                    }
                }
            }
            assert!(input.len() < before, "no step forward");
        }
    }
    made
}

/// Both rmpv and the crate `msgpack-rpc` read this message, and nothing is left over.
fn reads_back(written: &[u8], message: &Message) {
    let mut rest = written;
    let value = rmpv::decode::read_value(&mut rest).unwrap();
    assert_eq!(
        (encode(&value), rest),
        (encode(&message.as_value()), &[][..])
    );
    let mut rest = written;
    let decoded = Message::decode(&mut rest).unwrap();
    assert_eq!((packed(&decoded), rest), (packed(message), &[][..]));
}

/// How much a value is: its bytes, the values inside it, its levels.
fn measured(value: &Value) -> Bounds {
    fn inside(value: &Value) -> (usize, usize) {
        let children: Vec<&Value> = match value {
            Value::Array(items) => items.iter().collect(),
            Value::Map(pairs) => pairs.iter().flat_map(|(key, value)| [key, value]).collect(),
            _ => return (0, 0),
        };
        let inner = children.iter().map(|child| inside(child));
        inner.fold((children.len(), 1), |(values, depth), (more, below)| {
            (values + more, depth.max(below + 1))
        })
    }
    let (values, depth) = inside(value);
    Bounds {
        bytes: encode(value).len(),
        values,
        depth,
    }
}

fn message() -> impl Strategy<Value = Message> {
    let params = || vec(value(), 0..5);
    let error = value().prop_filter("nil is no error", |error| !error.is_nil());
    let result = prop_oneof![value().prop_map(Ok), error.prop_map(Err)];
    prop_oneof![
        (any::<u32>(), ".{0,40}", params())
            .prop_map(|(id, method, params)| { Message::Request(Request { id, method, params }) }),
        (any::<u32>(), result).prop_map(|(id, result)| Message::Response(Response { id, result })),
        (".{0,40}", params()).prop_map(|(method, params)| {
            Message::Notification(Notification { method, params })
        }),
    ]
}

/// Any MessagePack value, small and large, ten levels deep at most.
fn value() -> impl Strategy<Value = Value> {
    let bytes = || prop_oneof![4 => vec(any::<u8>(), 0..40), 1 => vec(any::<u8>(), 250..260)];
    let long = (0..3_usize, 65_530..65_540_usize).prop_map(|(kind, length)| match kind {
        0 => Value::from("x".repeat(length)),
        1 => Value::Binary(vec![0xc1; length]),
        _ => Value::Ext(-1, vec![0xc1; length]),
    });
    let leaf = prop_oneof![
        20 => Just(Value::Nil),
        20 => any::<bool>().prop_map(Value::from),
        20 => any::<u64>().prop_map(Value::from),
        20 => any::<i64>().prop_map(Value::from),
        20 => (-200..70_000_i64).prop_map(Value::from),
        20 => any::<u32>().prop_map(|bits| Value::F32(f32::from_bits(bits))),
        20 => any::<u64>().prop_map(|bits| Value::F64(f64::from_bits(bits))),
        20 => ".{0,40}".prop_map(Value::from),
        20 => bytes().prop_map(Value::Binary),
        20 => (any::<i8>(), bytes()).prop_map(|(kind, bytes)| Value::Ext(kind, bytes)),
        20 => (any::<i8>(), 0..5_u32, any::<u8>())
            .prop_map(|(kind, power, byte)| Value::Ext(kind, vec![byte; 1 << power])),
        1 => long,
    ];
    leaf.prop_recursive(10, 64, 20, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..20).prop_map(Value::Array),
            vec((inner.clone(), inner), 0..20).prop_map(Value::Map),
        ]
    })
}
