//! Parsing and encoding what every request needs, and a whole handshake without a socket.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use memdev::handshake::{Environment, ExportInfo, Handshake, Knobs, Progress, Refusal};
use memdev::proto::{
    BlockSizes, ClientFlags, Command, CommandFlags, Cookie, InfoPayload, OptionCode, OptionHeader,
    REPLY_FLAG_DONE, Request, TransmissionFlags, data_chunk_header, simple_reply,
};
use std::hint::black_box;

const BATCH: u32 = 32;

fn requests(c: &mut Criterion) {
    let batch: Vec<u8> = (0..BATCH)
        .flat_map(|i| {
            let (cookie, offset) = (Cookie(u64::from(i)), u64::from(i) << 12);
            Request { flags: CommandFlags::NONE, command: Command::Read, cookie, offset, length: 4096 }
                .encode()
        })
        .collect();
    let mut group = c.benchmark_group("wire");
    group.throughput(Throughput::Elements(BATCH.into()));
    group.bench_function("parse 32 requests", |b| {
        b.iter(|| {
            let (requests, _) = black_box(&batch).as_chunks::<{ Request::SIZE }>();
            requests
                .iter()
                .map(|bytes| Request::parse(bytes).map_or(0, |request| request.offset))
                .sum::<u64>()
        });
    });
    group.bench_function("encode 32 simple replies", |b| {
        b.iter(|| {
            (0..u64::from(BATCH))
                .map(|i| simple_reply(None, Cookie(black_box(i)))[15])
                .fold(0, u8::wrapping_add)
        });
    });
    group.bench_function("encode 32 data chunk headers", |b| {
        b.iter(|| {
            (0..u64::from(BATCH))
                .map(|i| data_chunk_header(REPLY_FLAG_DONE, Cookie(black_box(i)), i << 12, 4096)[19])
                .fold(0, u8::wrapping_add)
        });
    });
    group.finish();
}

/// One export, nothing behind it.
struct One;

impl Environment for One {
    type Export = ();

    fn list(&self) -> Vec<(String, String)> {
        vec![("root".into(), String::new())]
    }

    fn describe(&self, name: &str) -> Result<ExportInfo, Refusal> {
        Ok(ExportInfo {
            name: name.to_owned(),
            description: String::new(),
            size: 1 << 30,
            flags: TransmissionFlags::HAS_FLAGS,
            block_sizes: BlockSizes::default(),
        })
    }

    fn open(&self, name: &str) -> Result<(ExportInfo, ()), Refusal> {
        self.describe(name).map(|info| (info, ()))
    }
}

fn handshake(c: &mut Criterion) {
    let flags = ClientFlags::FIXED_NEWSTYLE.union(ClientFlags::NO_ZEROES);
    let mut input = flags.bits().to_be_bytes().to_vec();
    let payload = InfoPayload::build("root", &[]);
    let length = u32::try_from(payload.len()).expect("a short payload");
    input.extend(OptionHeader { option: OptionCode::StructuredReply, length: 0 }.encode());
    input.extend(OptionHeader { option: OptionCode::Go, length }.encode());
    input.extend(payload);
    c.bench_function("wire/handshake: structured replies, go", |b| {
        b.iter(|| {
            let (mut handshake, mut output) = (Handshake::new(Knobs::default()), Vec::new());
            let (_, progress) = handshake.receive(&One, black_box(&input), &mut output);
            assert!(matches!(progress, Progress::Ready { .. }));
            output
        });
    });
}

criterion_group!(benches, requests, handshake);
criterion_main!(benches);
