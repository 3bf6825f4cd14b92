//! The client against servers that say exactly what a test wants them to say, good ones and bad ones.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;
use crate::error::{Error, ErrorKind};
use crate::proto::{
    BlockDescriptor, BlockSizes, ClientFlags, CommandFlags, Cookie, Errno, ExportEntry, ExportNameReply,
    Greeting, HandshakeFlags, InfoItem, OptionCode, OptionHeader, OptionReplyType, REPLY_FLAG_DONE, Request,
    STATE_HOLE, STATE_ZERO, TransmissionFlags, append_block_status_chunk, append_option_reply, chunk_header,
    data_chunk_header, error_offset_chunk, extended_none_chunk, hole_chunk, none_chunk, simple_reply,
};

/// The server's end: what a test has it say.
struct Server(UnixStream);

impl Server {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn greet(&mut self, flags: HandshakeFlags) -> ClientFlags {
        self.say(&Greeting { flags }.encode());
        ClientFlags(u32::from_be_bytes(self.take()))
    }

    /// Takes an option, which must be `expected`, and gives its payload.
    fn option(&mut self, expected: OptionCode) -> Vec<u8> {
        let header = OptionHeader::parse(&self.take()).unwrap();
        assert_eq!(header.option, expected);
        let mut payload = vec![0; usize::try_from(header.length).unwrap()];
        self.0.read_exact(&mut payload).unwrap();
        payload
    }

    fn answer(&mut self, option: OptionCode, replies: &[(OptionReplyType, Vec<u8>)]) {
        let mut out = Vec::new();
        for (reply, payload) in replies {
            append_option_reply(&mut out, option, *reply, payload);
        }
        self.say(&out);
    }

    /// The usual beginning.
    fn begin(&mut self, structured: bool) {
        let flags = self.greet(HandshakeFlags::FIXED_NEWSTYLE.union(HandshakeFlags::NO_ZEROES));
        assert!(flags.contains(ClientFlags::FIXED_NEWSTYLE.union(ClientFlags::NO_ZEROES)));
        self.option(OptionCode::StructuredReply);
        let reply = if structured { OptionReplyType::Ack } else { OptionReplyType::ErrUnsup };
        self.answer(OptionCode::StructuredReply, &[(reply, vec![])]);
    }

    /// The usual way into an export of 1 MiB.
    fn go(&mut self) {
        self.option(OptionCode::Go);
        let flags = TransmissionFlags::HAS_FLAGS.union(TransmissionFlags::SEND_FLUSH);
        let sizes = BlockSizes { minimum: 1, preferred: 4096, maximum: 8192 };
        self.answer(
            OptionCode::Go,
            &[
                (OptionReplyType::Info, InfoItem::Export { size: 1 << 20, flags }.encode()),
                (OptionReplyType::Info, InfoItem::BlockSize(sizes).encode()),
                (OptionReplyType::Ack, vec![]),
            ],
        );
    }

    fn request(&mut self) -> Request {
        Request::parse(&self.take()).unwrap()
    }
}

/// A connection to a server that plays `script`.
fn server(script: impl FnOnce(Server) + Send + 'static) -> (UnixStream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    for stream in [&ours, &theirs] {
        stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
    }
    (ours, thread::spawn(|| script(Server(theirs))))
}

/// A client of an export of a server that plays `script` from there on.
fn client(structured: bool, script: impl FnOnce(Server) + Send + 'static) -> (Client, JoinHandle<()>) {
    let (stream, thread) = server(move |mut server| {
        server.begin(structured);
        server.go();
        script(server);
    });
    (Haggling::over(stream).unwrap().go("x").unwrap(), thread)
}

#[test]
fn exports_are_listed_and_described() {
    let (stream, thread) = server(|mut server| {
        server.begin(true);
        server.option(OptionCode::List);
        let entry = |name, description| (OptionReplyType::Server, ExportEntry { name, description }.encode());
        server.answer(
            OptionCode::List,
            &[entry("a", ""), entry("b", "the second"), (OptionReplyType::Ack, vec![])],
        );
        server.option(OptionCode::Info);
        server.answer(
            OptionCode::Info,
            &[
                (OptionReplyType::Info, InfoItem::Other(99, b"?").encode()),
                (OptionReplyType::Info, InfoItem::Name("canonical").encode()),
                (
                    OptionReplyType::Info,
                    InfoItem::Export { size: 7, flags: TransmissionFlags::READ_ONLY }.encode(),
                ),
                (OptionReplyType::Ack, vec![]),
            ],
        );
        server.option(OptionCode::Info);
        server.answer(OptionCode::Info, &[(OptionReplyType::ErrUnknown, b"no\x07 such".to_vec())]);
        server.option(OptionCode::Abort);
        server.answer(OptionCode::Abort, &[(OptionReplyType::Ack, vec![])]);
    });
    let mut haggling = Haggling::over(stream).unwrap();
    assert!(haggling.structured_replies());
    let listed = haggling.list().unwrap();
    assert_eq!(listed[1], ListedExport { name: "b".into(), description: "the second".into() });
    assert_eq!(listed.len(), 2);
    let export = haggling.info("a").unwrap();
    assert_eq!((export.name.as_str(), export.size, export.block_sizes), ("canonical", 7, None));
    let error = haggling.info("b").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("there is no such export ('no  such')"), "{error}");
    haggling.abort().unwrap();
    thread.join().unwrap();
}

#[test]
fn a_server_without_go_is_asked_by_export_name() {
    for zeroes in [false, true] {
        let (stream, thread) = server(move |mut server| {
            let no_zeroes = if zeroes { HandshakeFlags::NONE } else { HandshakeFlags::NO_ZEROES };
            server.greet(HandshakeFlags::FIXED_NEWSTYLE.union(no_zeroes));
            server.option(OptionCode::StructuredReply);
            server.answer(OptionCode::StructuredReply, &[(OptionReplyType::ErrUnsup, vec![])]);
            server.option(OptionCode::Go);
            server.answer(OptionCode::Go, &[(OptionReplyType::ErrUnsup, vec![])]);
            assert_eq!(server.option(OptionCode::ExportName), b"old");
            let mut out = Vec::new();
            ExportNameReply { size: 4096, flags: TransmissionFlags::HAS_FLAGS }.append_to(&mut out, zeroes);
            server.say(&out);
            let request = server.request();
            server.say(&simple_reply(None, request.cookie));
            server.say(b"data");
        });
        let mut client = Haggling::over(stream).unwrap().go("old").unwrap();
        assert_eq!(client.size(), 4096);
        let mut buffer = [0; 4];
        client.read(0, &mut buffer).unwrap();
        assert_eq!(&buffer, b"data");
        thread.join().unwrap();
    }
}

#[test]
fn reads_are_put_together_from_chunks_in_any_order() {
    let (mut client, thread) = client(true, |mut server| {
        let request = server.request();
        assert_eq!((request.offset, request.length), (100, 10));
        server.say(&hole_chunk(0, request.cookie, 106, 4));
        server.say(&data_chunk_header(0, request.cookie, 100, 6));
        server.say(b"abcdef");
        server.say(&none_chunk(request.cookie));
    });
    let mut buffer = [9; 10];
    client.read(100, &mut buffer).unwrap();
    assert_eq!(&buffer, b"abcdef\0\0\0\0");
    thread.join().unwrap();
}

/// The client once only added up the lengths of the chunks of a reply: a server that sent one half twice was believed to
/// have sent both, and whoever asked was given what the buffer held before for the other half. Found by the fuzz target
/// `client`, which asks twice with different bytes in its buffers (seed `read-chunks-overlap`).
#[test]
fn a_half_that_is_sent_twice_is_not_the_whole() {
    for second_is_a_hole in [false, true] {
        let (mut client, thread) = client(true, move |mut server| {
            let request = server.request();
            server.say(&data_chunk_header(0, request.cookie, 4, 4));
            server.say(b"half");
            if second_is_a_hole {
                server.say(&hole_chunk(REPLY_FLAG_DONE, request.cookie, 3, 4));
            } else {
                // At once: the client may hang up when it has seen the header.
                server
                    .say(&[&data_chunk_header(REPLY_FLAG_DONE, request.cookie, 4, 4)[..], b"half"].concat());
            }
            let _ = server.0.read_to_end(&mut Vec::new());
        });
        let error = client.read(0, &mut [9; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains("or twice"), "{error}");
        drop(client);
        thread.join().unwrap();
    }
}

#[test]
fn long_reads_and_writes_are_split_at_the_servers_maximum() {
    let (mut client, thread) = client(true, |mut server| {
        for (offset, length) in [(5, 8192_u16), (8197, 8192), (16389, 1)] {
            let request = server.request();
            assert_eq!((request.offset, request.length), (offset, u32::from(length)));
            server.0.read_exact(&mut vec![0; usize::from(length)]).unwrap();
            server.say(&none_chunk(request.cookie));
        }
        for length in [8192_u16, 1] {
            let request = server.request();
            server.say(&data_chunk_header(
                REPLY_FLAG_DONE,
                request.cookie,
                request.offset,
                u32::from(length),
            ));
            server.say(&vec![7; usize::from(length)]);
        }
    });
    client.write(5, &[1; 16385], CommandFlags::NONE).unwrap();
    let mut buffer = [0; 8193];
    client.read(0, &mut buffer).unwrap();
    assert_eq!(buffer, [7; 8193]);
    thread.join().unwrap();
}

#[test]
fn errors_say_what_failed_where_and_the_connection_goes_on() {
    let (mut client, thread) = client(true, |mut server| {
        let request = server.request();
        server.say(&error_offset_chunk(0, request.cookie, Errno::Io, "bad sector", 12));
        server.say(&data_chunk_header(REPLY_FLAG_DONE, request.cookie, 10, 2));
        server.say(b"ab");
        let request = server.request();
        server.say(&simple_reply(Some(Errno::NoSpc), request.cookie));
        let request = server.request();
        server.say(&simple_reply(None, request.cookie));
    });
    let error = client.read(10, &mut [0; 4]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(error.to_string(), "The server failed a Read at 12: input/output error ('bad sector')");
    assert_eq!(client.write_zeroes(0, 4096, CommandFlags::NONE).unwrap_err().kind(), ErrorKind::OutOfSpace);
    client.flush().unwrap();
    thread.join().unwrap();
}

#[test]
fn block_status_tells_the_extents_of_the_selected_contexts() {
    let (stream, thread) = server(|mut server| {
        server.begin(true);
        server.option(OptionCode::SetMetaContext);
        let context = crate::proto::MetaContext { id: 5, name: "base:allocation" }.encode();
        server.answer(
            OptionCode::SetMetaContext,
            &[(OptionReplyType::MetaContext, context), (OptionReplyType::Ack, vec![])],
        );
        server.go();
        let request = server.request();
        let extents = [
            BlockDescriptor { length: 4096, flags: 0 },
            BlockDescriptor { length: 1 << 20, flags: STATE_HOLE | STATE_ZERO },
        ];
        let mut out = Vec::new();
        append_block_status_chunk(&mut out, REPLY_FLAG_DONE, request.cookie, 5, &extents);
        server.say(&out);
    });
    let mut haggling = Haggling::over(stream).unwrap();
    haggling.set_meta_contexts("x", &["base:allocation"]).unwrap();
    let mut client = haggling.go("x").unwrap();
    assert_eq!(client.contexts(), [MetaContext { id: 5, name: "base:allocation".into() }]);
    let extents = client.block_status(512, 8192, CommandFlags::NONE).unwrap();
    assert_eq!(
        extents,
        [
            Extent { context: 5, offset: 512, length: 4096, flags: 0 },
            Extent { context: 5, offset: 4608, length: 1 << 20, flags: 3 }
        ]
    );
    thread.join().unwrap();
}

#[test]
fn a_context_that_is_told_of_twice_breaks_the_protocol() {
    let (stream, thread) = server(|mut server| {
        server.begin(true);
        server.option(OptionCode::SetMetaContext);
        let context = crate::proto::MetaContext { id: 5, name: "base:allocation" }.encode();
        server.answer(
            OptionCode::SetMetaContext,
            &[(OptionReplyType::MetaContext, context), (OptionReplyType::Ack, vec![])],
        );
        server.go();
        let request = server.request();
        let mut out = Vec::new();
        for flags in [0, REPLY_FLAG_DONE] {
            let extents = [BlockDescriptor { length: 4096, flags: 0 }];
            append_block_status_chunk(&mut out, flags, request.cookie, 5, &extents);
        }
        server.say(&out);
    });
    let mut haggling = Haggling::over(stream).unwrap();
    haggling.set_meta_contexts("x", &["base:allocation"]).unwrap();
    let error = haggling.go("x").unwrap().block_status(0, 8192, CommandFlags::NONE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("twice"), "{error}");
    thread.join().unwrap();
}

#[test]
fn block_status_without_a_context_is_not_even_asked() {
    let (mut client, thread) = client(true, |_server| {});
    assert_eq!(client.block_status(0, 1, CommandFlags::NONE).unwrap_err().kind(), ErrorKind::Invalid);
    thread.join().unwrap();
}

/// What a handshake with a server that plays `script` fails with.
fn handshake_error(script: impl FnOnce(&mut Server) + Send + 'static) -> Error {
    let (stream, thread) = server(|mut server| {
        script(&mut server);
        // Closed only when the client is done: what it could still read must not turn into a reset.
        let _ = server.0.read_to_end(&mut Vec::new());
    });
    let error = Haggling::over(stream).and_then(|mut haggling| haggling.list()).unwrap_err();
    thread.join().unwrap();
    error
}

#[test]
fn servers_of_other_protocols_are_recognised() {
    let error = handshake_error(|server| server.say(b"SSH-2.0-OpenSSH_10.0p2 Debian-7\r\n"));
    assert_eq!(error.kind(), ErrorKind::Protocol);
    let error = handshake_error(|server| server.say(&Greeting { flags: HandshakeFlags::NONE }.encode()));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let error = handshake_error(|server| {
        server.greet(HandshakeFlags::FIXED_NEWSTYLE);
        server.option(OptionCode::StructuredReply);
        server.answer(OptionCode::StructuredReply, &[(OptionReplyType::ErrTlsReqd, vec![])]);
    });
    assert!(error.to_string().contains("it demands TLS; use nbds"), "{error}");
}

#[test]
fn a_server_that_breaks_the_handshake_is_left() {
    type Script = fn(&mut Server);
    let scripts: [(&str, Script); 5] = [
        ("no option reply", |server| server.say(&[0; 20])),
        ("not asked", |server| server.answer(OptionCode::Info, &[(OptionReplyType::Ack, vec![])])),
        ("65536 are the most", |server| {
            let mut out = Vec::new();
            append_option_reply(&mut out, OptionCode::List, OptionReplyType::Server, &[]);
            out[16..].copy_from_slice(&u32::MAX.to_be_bytes());
            server.say(&out);
        }),
        ("does not belong here", |server| {
            server.answer(OptionCode::List, &[(OptionReplyType::MetaContext, vec![0; 4])]);
        }),
        ("lists badly", |server| {
            server.answer(OptionCode::List, &[(OptionReplyType::Server, vec![0, 0, 0, 9])]);
        }),
    ];
    for (why, script) in scripts {
        let error = handshake_error(move |server| {
            server.begin(true);
            server.option(OptionCode::List);
            script(server);
        });
        assert_eq!(error.kind(), ErrorKind::Protocol, "{why}: {error}");
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
}

#[test]
fn a_server_that_breaks_the_transmission_is_left() {
    type Script = fn(&mut Server, Cookie);
    let scripts: [(&str, Script); 9] = [
        ("extended header", |server, cookie| server.say(&extended_none_chunk(cookie, 8))),
        ("no reply", |server, _| server.say(&[0; 20])),
        ("simple reply that does not belong", |server, cookie| server.say(&simple_reply(None, cookie))),
        ("chunk that does not belong", |server, _| server.say(&none_chunk(Cookie(77)))),
        ("less data", |server, cookie| server.say(&none_chunk(cookie))),
        ("data that was not asked", |server, cookie| server.say(&data_chunk_header(0, cookie, 8, 9))),
        ("data that was not asked", |server, cookie| server.say(&hole_chunk(0, cookie, u64::MAX, u32::MAX))),
        ("are the most", |server, cookie| server.say(&chunk_header(0, 77, cookie, u32::MAX))),
        ("chunk that was not asked", |server, cookie| {
            let mut out = Vec::new();
            let extents = [BlockDescriptor { length: 1, flags: 0 }];
            append_block_status_chunk(&mut out, 0, cookie, 1, &extents);
            server.say(&out);
        }),
    ];
    for (why, script) in scripts {
        let (mut client, thread) = client(true, move |mut server| {
            let cookie = server.request().cookie;
            script(&mut server, cookie);
            let _ = server.0.read_to_end(&mut Vec::new());
        });
        let error = client.read(8, &mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{why}: {error}");
        assert!(error.to_string().contains(why), "{why}: {error}");
        drop(client);
        thread.join().unwrap();
    }
}

#[test]
fn a_hang_up_is_said() {
    let (mut client, thread) = client(false, |mut server| {
        server.request();
    });
    let error = client.read(0, &mut [0; 8]).unwrap_err();
    assert_eq!(error.to_string(), "Cannot receive from the server: it hung up");
    thread.join().unwrap();
}
